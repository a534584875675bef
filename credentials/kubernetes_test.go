package credentials

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
)

func dockerSecret(t *testing.T, key, host, user string) string {
	t.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":hush"))
	text := fmt.Sprintf(`{%q: {"auth": %q}}`, host, auth)
	if key == ".dockerconfigjson" {
		text = `{"auths": ` + text + `}`
	}
	b, err := json.Marshal(map[string]any{"kind": "Secret", "data": map[string][]byte{key: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const podsOfNode = "pods?fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0"

// An image is offered what its own pods refer to, and nothing else is asked for.
func TestKubernetes(t *testing.T) {
	a := kubeapitest.Start(t)
	a.Put(podsOfNode, `{"items": [
		{"metadata": {"namespace": "one"}, "spec": {"serviceAccountName": "default", "imagePullSecrets": [{"name": "regcred"}, {"name": "gone"}],
			"containers": [{"image": "r.example.com/team/app:v1"}], "initContainers": [{"image": "r.example.com/team/init"}], "volumes": [{"emptyDir": {}}, {"image": {"reference": "r.example.com/team/models"}}]}},
		{"metadata": {"namespace": "two"}, "spec": {"serviceAccountName": "builder", "containers": [{"image": "r.example.com/team/app@sha256:`+strings.Repeat("0", 64)+`"}]}},
		{"metadata": {"namespace": "three"}, "spec": {"imagePullSecrets": [{"name": "regcred"}], "containers": [{"image": "busybox"}]}}]}`)
	a.Put("namespaces/one/serviceaccounts/default", "403")
	a.Put("namespaces/two/serviceaccounts/builder", `{"secrets": [{"name": "token"}], "imagePullSecrets": [{"name": "old"}, {"name": "late"}]}`)
	a.Put("namespaces/two/secrets/late", "403") // to a kubelet, because its pod does not refer to it
	a.Put("namespaces/one/secrets/regcred", dockerSecret(t, ".dockerconfigjson", "r.example.com", "a"))
	a.Put("namespaces/two/secrets/old", dockerSecret(t, ".dockercfg", "https://r.example.com/v1/", "b"))
	a.Put("namespaces/three/secrets/regcred", dockerSecret(t, ".dockerconfigjson", "https://index.docker.io/v1/", "d"))
	s := NewKubernetes(a.Kubeconfig, "node-1")
	defer s.Close()

	got, err := s.Lookup(t.Context(), at("r.example.com/team/app"))
	if !slices.Equal(got, []Login{{"a", "hush"}, {"b", "hush"}}) || err == nil || err.Error() != "secrets one/gone: API server: status 404: it is 404" {
		t.Errorf("got %v, %v", got, err)
	}
	const ns = "/api/v1/namespaces/"
	want := []string{ns + "one/secrets/gone", ns + "one/secrets/regcred", ns + "one/serviceaccounts/default", ns + "two/secrets/late", ns + "two/secrets/old", ns + "two/serviceaccounts/builder", "/api/v1/pods"}
	if got := a.Requests(); !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	wantLogins(t, s, "docker.io/library/busybox", Login{"d", "hush"})
	if got, want := a.Requests(), []string{ns + "three/secrets/regcred"}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	for _, image := range []string{"r.example.com/team/init", "r.example.com/team/models"} {
		if got, _ := s.Lookup(t.Context(), at(image)); !slices.Equal(got, []Login{{"a", "hush"}}) {
			t.Errorf("%s: got %v", image, got)
		}
	}
	if got := a.Requests(); len(got) != 0 {
		t.Errorf("asked for %q, want what was got just now", got)
	}
	wantLogins(t, s, "r.example.com/team/other") // its pod may be there since
	if got, want := a.Requests(), []string{"/api/v1/pods"}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
}

// What a pod or a service account calls the name of a secret is none of another namespace's.
func TestKubernetesForeignNames(t *testing.T) {
	a := kubeapitest.Start(t)
	const theirs = "../../theirs/secrets/regcred"
	a.Put(podsOfNode, `{"items": [{"metadata": {"namespace": "one"}, "spec": {"serviceAccountName": "default", "containers": [{"image": "r.example.com/team/app:v1"}],
		"imagePullSecrets": [{"name": "`+theirs+`"}, {"name": "regcred"}, {}]}}]}`)
	a.Put("namespaces/one/serviceaccounts/default", `{"imagePullSecrets": [{"name": "`+theirs+`"}]}`)
	a.Put("namespaces/one/secrets/regcred", dockerSecret(t, ".dockerconfigjson", "r.example.com", "a"))
	a.Put("namespaces/theirs/secrets/regcred", dockerSecret(t, ".dockerconfigjson", "r.example.com", "b"))
	s := NewKubernetes(a.Kubeconfig, "node-1")
	defer s.Close()
	wantLogins(t, s, "r.example.com/team/app", Login{"a", "hush"})
	if got, want := a.Requests(), []string{"/api/v1/namespaces/one/secrets/regcred", "/api/v1/namespaces/one/serviceaccounts/default", "/api/v1/pods"}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
}

// One pod's many secrets do not come before all of another's, nor one namespace's many pods before all of another's.
func TestKubernetesTurns(t *testing.T) {
	a := kubeapitest.Start(t)
	var pods, refs []string
	for i := range 20 {
		refs = append(refs, fmt.Sprintf(`{"name": "wrong-%d"}`, i))
		a.Put(fmt.Sprintf("namespaces/a/secrets/wrong-%d", i), dockerSecret(t, ".dockerconfigjson", "r.example.com", fmt.Sprint("wrong-", i)))
		a.Put(fmt.Sprintf("namespaces/b/secrets/wrong-%d", i), dockerSecret(t, ".dockerconfigjson", "r.example.com", fmt.Sprint("other-", i)))
		pods = append(pods, fmt.Sprintf(`{"metadata": {"namespace": "b"}, "spec": {"imagePullSecrets": [{"name": "wrong-%d"}], "containers": [{"image": "r.example.com/team/app"}]}}`, i))
	}
	a.Put("namespaces/a/secrets/mine", dockerSecret(t, ".dockerconfigjson", "r.example.com", "mine"))
	a.Put("namespaces/z/serviceaccounts/default", `{"imagePullSecrets": [{"name": "right"}]}`)
	a.Put("namespaces/z/secrets/right", dockerSecret(t, ".dockerconfigjson", "r.example.com", "right"))
	const app = `"containers": [{"image": "r.example.com/team/app"}]`
	a.Put(podsOfNode, `{"items": [
		{"metadata": {"namespace": "a"}, "spec": {"imagePullSecrets": [`+strings.Join(refs, ",")+`], `+app+`}},
		{"metadata": {"namespace": "a"}, "spec": {"imagePullSecrets": [{"name": "mine"}], `+app+`}},
		`+strings.Join(pods, ",")+`,
		{"metadata": {"namespace": "z"}, "spec": {"serviceAccountName": "default", `+app+`}}]}`)
	s := NewKubernetes(a.Kubeconfig, "node-1")
	defer s.Close()
	got, err := s.Lookup(t.Context(), at("r.example.com/team/app"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Login{{"wrong-0", "hush"}, {"other-0", "hush"}, {"right", "hush"}, {"mine", "hush"}, {"other-1", "hush"}, {"wrong-1", "hush"}}
	if len(got) != 42 || !slices.Equal(got[:len(want)], want) {
		t.Errorf("got %v", got)
	}
}

// What had an image and is gone still serves it, beside what has it now, and the newest first; no namespace drops another's.
func TestKubernetesFormer(t *testing.T) {
	a := kubeapitest.Start(t)
	s := NewKubernetes(a.Kubeconfig, "node-1")
	defer s.Close()
	const none = `{"metadata": {"namespace": "b"}, "spec": {"containers": [{"image": "r.example.com/team/app"}]}}`
	next := func(pods string) {
		t.Helper()
		a.Put(podsOfNode, `{"items": [`+pods+none+`]}`)
		if err := s.list(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
	with := func(namespace, name string) string {
		a.Put("namespaces/"+namespace+"/secrets/"+name, dockerSecret(t, ".dockerconfigjson", "r.example.com", name))
		return fmt.Sprintf(`{"metadata": {"namespace": %q}, "spec": {"imagePullSecrets": [{"name": %q}], "containers": [{"image": "r.example.com/team/app"}]}}, `, namespace, name)
	}
	next(with("a", "good"))
	next("")
	wantLogins(t, s, "r.example.com/team/app", Login{"good", "hush"})
	for i := range formerOfOne + 2 {
		next(with("c", fmt.Sprint("c-", i)))
	}
	next("")
	next("")
	wantLogins(t, s, "r.example.com/team/app", Login{"c-5", "hush"}, Login{"good", "hush"}, Login{"c-4", "hush"}, Login{"c-3", "hush"}, Login{"c-2", "hush"})
	next(with("d", "now"))
	if got, err := s.Lookup(t.Context(), at("r.example.com/team/app")); err != nil || len(got) != 6 || got[0].User != "now" {
		t.Errorf("got %v, %v", got, err)
	}
	for i := range formerOfAll + 2 {
		next(with(fmt.Sprint("n-", i), "x"))
	}
	if n := len(s.former["r.example.com/team/app"]); n != formerOfAll {
		t.Errorf("%d are remembered, want %d", n, formerOfAll)
	}
}
