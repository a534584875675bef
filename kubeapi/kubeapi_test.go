package kubeapi_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
)

// Pods are decoded one by one, and those beyond 4096 not at all; what is no list of them is an error.
func TestPods(t *testing.T) {
	s := kubeapitest.Start(t)
	c := kubeapi.New(s.Kubeconfig)
	defer c.Close()
	pods := func(n int) string { return strings.TrimSuffix(strings.Repeat(`{"metadata": {"name": "p"}},`, n), ",") }
	const noJSON = "the API server's answer is no JSON"
	for answer, want := range map[string]struct {
		n   int
		err string
	}{
		`{"kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": [` + pods(3) + `], "more": [1, {}]}`: {3, ""},
		`{"items": [` + pods(4096) + `]}`:    {4096, ""},
		`{"items": [` + pods(4097) + `]}`:    {0, "more than 4096 pods"},
		`{"items": [` + pods(4096) + `,{}}x`: {0, "more than 4096 pods"}, // the rest is not looked at
		`{"items": []}`:                      {0, ""},
		`{"items": null}`:                    {0, ""},
		`{"kind": "PodList"}`:                {0, ""},
		`{"items": [` + pods(2):              {0, noJSON},
		`{"items": {}}`:                      {0, noJSON},
		`{"items": [1]}`:                     {0, noJSON},
		`[` + pods(2) + `]`:                  {0, noJSON},
		`<html>`:                             {0, noJSON},
		`{"metadata": <html>}`:               {0, noJSON},
	} {
		s.Put("pods?fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0", answer)
		list, err := c.Pods(t.Context(), "node-1")
		if len(list) != want.n || (err == nil) != (want.err == "") || err != nil && !strings.HasSuffix(err.Error(), want.err) || want.n > 0 && list[want.n-1].Metadata.Name != "p" {
			t.Errorf("%.60s: %d pods, error %v, want %+v", answer, len(list), err, want)
		}
	}
}

// What a server says ends up in logs and on terminals: in one line, and quoted there, not here.
func TestStatusMessage(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		w.Write([]byte(`{"message": "secrets \"a\" is forbidden\u001b[2J\nUser"}`))
	})
	c := kubeapi.New(s.Kubeconfig)
	defer c.Close()
	const want = `API server: status 403: secrets "a" is forbidden\u001b[2J\u000aUser`
	if err := c.Get(t.Context(), "pods", nil, nil); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// Who does not answer, or not to the end, is named, and the file that names it.
func TestUnanswered(t *testing.T) {
	for name, begins := range map[string]bool{"not at all": false, "half": true} {
		t.Run(name, func(t *testing.T) {
			s := kubeapitest.Start(t)
			asked := make(chan struct{})
			s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if begins {
					w.Write([]byte(`{"items": [`))
					w.(http.Flusher).Flush()
				}
				close(asked)
				<-r.Context().Done()
			})
			c := kubeapi.New(s.Kubeconfig)
			defer c.Close()
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-asked
				cancel()
			}()
			_, err := c.Pods(ctx, "node-1")
			host := strings.TrimPrefix(s.URL, "https://")
			if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "API server "+host+" of kubeconfig "+s.Kubeconfig+": ") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A name that is part of a path names nothing outside of it.
func TestNames(t *testing.T) {
	s := kubeapitest.Start(t)
	s.Put("namespaces/other/secrets/theirs", "{}")
	s.Put("namespaces/one/secrets/a.b-c", "{}")
	s.Put("namespaces/one/secrets/", "{}")
	c := kubeapi.New(s.Kubeconfig)
	defer c.Close()
	if err := c.Get(t.Context(), "namespaces/one/secrets/a.b-c", nil, new(any)); err != nil {
		t.Error(err)
	}
	s.Requests()
	for _, name := range []string{"", ".", "..", "../../other/secrets/theirs", "a/../../../other/secrets/theirs", "%2e%2e", "..%2fx", "A", "a?b", "a b", "a\n", "-a", "a.", strings.Repeat("a", 254)} {
		if err := c.Get(t.Context(), "namespaces/one/secrets/"+name, nil, new(any)); err == nil || !strings.Contains(err.Error(), "no object has this path") || len(err.Error()) > 300 {
			t.Errorf("%q: %v", name, err)
		}
	}
	if got := s.Requests(); len(got) > 0 {
		t.Errorf("asked for %q", got)
	}
}
