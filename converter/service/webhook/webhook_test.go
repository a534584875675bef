package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access/oidctest"
)

const secret = "secret-0123456789abcdef"

// noted is a Handler that keeps events, and fails for repositories that a test says.
type noted struct {
	mu     sync.Mutex
	events []service.Event
	fail   map[string]error
	by     []string
}

func (n *noted) Handle(ctx context.Context, e service.Event) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
	id := access.From(ctx)
	n.by = append(n.by, id.Kind+" "+id.Name)
	return n.fail[e.Repository]
}

func (n *noted) take() []service.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	events := n.events
	n.events = nil
	return events
}

func handler(t *testing.T, n Handler, sources ...Source) *Server {
	t.Helper()
	h, err := New(sources, n, nil)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// post delivers a body; the headers are pairs.
func post(h http.Handler, target string, body []byte, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("POST", target, bytes.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func payload(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	pushDigest  = "sha256:fea8895f450959fa676bcc1df0611ea93823a735a01205fd8622846041d0c7cf"
	harborDgst  = "sha256:8a9e9863dbb6e10edb5adfe917c00da84e1700fa76e7ed02476aa6e6fb8ee0d8"
	acrDigest   = "sha256:80f0d5c8786bb9e621a45ece0db56d11cdc624ad20da9fe62e9d25490f331d7d"
	gridDigest  = "sha256:213bbc182920ab41e18edc2001e06abcca6735d87782d9cef68abd83941cf0e5"
	zotDigest   = "sha256:3c1bc5b8a8e3d7bb1d8f0f5a4e1ad2f7c0a9a7a1b8e0d1f8f7f1c2d3e4f5a6b7"
	garDigest   = "sha256:6ec128e26cd5faef7dc3f7a2a1b8e0d1f8f7f1c2d3e4f5a6b7c8d9e0f1a2b3c4"
	jfrogDigest = "sha256:35c4a2c15539c6c1e4e5fa4e554dac323ad0107d8eb5c582d6ff386b383b7dce"
	ecrHost     = "123456789012.dkr.ecr.us-west-2.amazonaws.com"
	garHost     = "us-west1-docker.pkg.dev"
)

// TestVendors: each vendor's documented payload, as the vendor sends it.
func TestVendors(t *testing.T) {
	structured := []string{"Content-Type", "application/cloudevents+json; charset=utf-8"}
	ce := func(kind string) []string {
		return []string{"Content-Type", "application/json", "Ce-Specversion", "1.0", "Ce-Id", "ce-1", "Ce-Source", "zotregistry.dev", "Ce-Type", kind}
	}
	for _, c := range []struct {
		kind, file string
		headers    []string
		source     Source // Registry is example.com unless it has one
		want       []service.Event
	}{
		{kind: "distribution", file: "distribution-push", want: []service.Event{
			{Repository: "library/test", Digest: pushDigest, ID: "asdf-asdf-asdf-asdf-0", By: "test-actor"}}},
		{kind: "distribution", file: "distribution-pull"},
		{kind: "distribution", file: "distribution-delete", want: []service.Event{
			{Kind: service.Deleted, Repository: "library/test", Digest: "sha256:d89e1bee20d9cb344674e213b581f14fbd8e70274ecf9d10c514bab78a307845", ID: "9c4f2a9e-2c0f-4e5e-8b2c-1f5d0f1f3b57"}}},
		{kind: "harbor", file: "harbor-push", want: []service.Event{{Repository: "test-webhook/debian", Tag: "latest", Digest: harborDgst, By: "admin"}}},
		{kind: "harbor", file: "harbor-push-untagged", want: []service.Event{{Repository: "test-webhook/debian", Digest: harborDgst, By: "admin"}}},
		{kind: "harbor", file: "harbor-delete", want: []service.Event{{Kind: service.Deleted, Repository: "test-webhook/debian", Tag: "latest", Digest: harborDgst, By: "admin"}}},
		{kind: "harbor", file: "harbor-cloudevents-push", headers: structured, want: []service.Event{
			{Repository: "test-webhook/debian", Tag: "latest", Digest: harborDgst, ID: "66e18103-09c1-41f6-982f-37df223f3eeb", By: "harbor-jobservice"}}},
		{kind: "harbor", file: "harbor-scan"},
		{kind: "acr", file: "acr-push", want: []service.Event{{Repository: "hello-world", Tag: "v1", Digest: acrDigest, ID: "cb8c3971-9adc-488b-bdd8-43cbb4974ff5"}}},
		{kind: "acr", file: "acr-delete", want: []service.Event{{Kind: service.Deleted, Repository: "hello-world", Digest: acrDigest, ID: "afc359ce-df7f-4e32-bdde-1ff8aa80927b"}}},
		{kind: "eventgrid", file: "eventgrid-push", want: []service.Event{{Repository: "aci-helloworld", Tag: "v1", Digest: gridDigest, ID: "831e1650-001e-001b-66ab-eeb76e069631"}}},
		{kind: "eventgrid", file: "eventgrid-cloudevents-push", want: []service.Event{{Repository: "aci-helloworld", Tag: "v1", Digest: gridDigest, ID: "831e1650-001e-001b-66ab-eeb76e069631"}}},
		{kind: "eventgrid", file: "eventgrid-cloudevents-delete", headers: structured, want: []service.Event{
			{Kind: service.Deleted, Repository: "aci-helloworld", Digest: gridDigest, ID: "f06e3921-301f-42ec-b368-212f7d5354bd"}}},
		{kind: "eventgrid", file: "eventgrid-validation"},
		{kind: "zot", file: "zot-updated", headers: ce("zotregistry.image.updated"), want: []service.Event{{Repository: "golang", Tag: "latest", Digest: zotDigest, ID: "ce-1", By: "admin"}}},
		{kind: "zot", file: "zot-updated", headers: ce("zotregistry.image.lint_failed")},
		{kind: "zot", file: "zot-deleted", headers: ce("zotregistry.image.deleted"), want: []service.Event{{Kind: service.Deleted, Repository: "golang", Digest: zotDigest, ID: "ce-1", By: "admin"}}},
		{kind: "zot", file: "zot-repository-created", headers: ce("zotregistry.repository.created")},
		{kind: "zot", file: "zot-structured", headers: structured, want: []service.Event{
			{Repository: "golang", Tag: "latest", Digest: zotDigest, ID: "c7a9f6c0-5d43-4d7d-8a4f-6c3b2a1f0e9d", By: "admin"}}},
		{kind: "ecr", file: "ecr-push", source: Source{Registry: ecrHost}, want: []service.Event{{Repository: "my-repository-name", Tag: "latest", ID: "13cde686-328b-6117-af20-0e5566167482"}}},
		{kind: "ecr", file: "ecr-delete", source: Source{Registry: ecrHost}, want: []service.Event{
			{Kind: service.Deleted, Repository: "my-repository-name", Tag: "latest", ID: "dd3b46cb-2c74-f49e-393b-28286b67279d"}}},
		{kind: "ecr", file: "ecr-scan", source: Source{Registry: ecrHost}},
		{kind: "ecr", file: "ecr-push", source: Source{Registry: strings.Replace(ecrHost, "us-west-2", "us-west-1", 1)}},
		{kind: "ecr", file: "ecr-push", source: Source{Registry: strings.Replace(ecrHost, "1234", "2234", 1)}},
		{kind: "gar", file: "gar-insert", source: Source{Registry: garHost}, want: []service.Event{
			{Repository: "my-project/my-repo/hello-world", Tag: "1.1", Digest: garDigest, ID: "2070443601311540"}}},
		{kind: "gar", file: "gar-insert-untagged", source: Source{Registry: garHost}, want: []service.Event{
			{Repository: "my-project/my-repo/hello-world", Digest: garDigest, ID: "2070443601311540"}}},
		{kind: "gar", file: "gar-delete-tag", source: Source{Registry: garHost}, want: []service.Event{
			{Kind: service.Deleted, Repository: "my-project/my-repo/hello-world", Tag: "1.1", ID: "2070443601311540"}}},
		{kind: "gar", file: "gar-unwrapped", headers: []string{"X-Goog-Pubsub-Message-Id", "7"}, source: Source{Registry: garHost}, want: []service.Event{
			{Repository: "my-project/my-repo/hello-world", Tag: "1.1", Digest: garDigest, ID: "7"}}},
		{kind: "gar", file: "gar-insert", source: Source{Registry: "us-west2-docker.pkg.dev"}},
		{kind: "jfrog", file: "jfrog-pushed", want: []service.Event{{Repository: "docker-remote-cache/library/ubuntu", Tag: "latest", Digest: jfrogDigest}}},
		{kind: "jfrog", file: "jfrog-pushed", source: Source{RepositoryKey: "docker-remote-cache"}, want: []service.Event{{Repository: "library/ubuntu", Tag: "latest", Digest: jfrogDigest}}},
		{kind: "jfrog", file: "jfrog-pushed", source: Source{RepositoryKey: "docker-local"}},
		{kind: "jfrog", file: "jfrog-pushed-flat", want: []service.Event{{Repository: "docker-remote-cache/library/ubuntu", Tag: "latest", Digest: jfrogDigest}}},
		{kind: "jfrog", file: "jfrog-deleted", source: Source{RepositoryKey: "sample_repo"}, want: []service.Event{{Kind: service.Deleted, Repository: "sample_arch", Tag: "sample_image"}}},
		{kind: "jfrog", file: "jfrog-artifact"},
		{kind: "dockerhub", file: "dockerhub-push", want: []service.Event{{Repository: "svendowideit/testhook", Tag: "latest", By: "trustedbuilder"}}},
	} {
		t.Run(c.file+" "+c.source.Registry+c.source.RepositoryKey, func(t *testing.T) {
			s := c.source
			s.Name, s.Kind, s.Header, s.Secret = "hook", c.kind, "Authorization", []byte(secret)
			if s.Registry == "" {
				s.Registry = "example.com"
			}
			for i := range c.want {
				c.want[i].Registry, c.want[i].Source = s.Registry, c.kind
			}
			n := &noted{}
			w := post(handler(t, n, s), "/hooks/hook", payload(t, c.file), append(c.headers, "Authorization", "Bearer "+secret)...)
			if w.Code != 200 {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			if got := n.take(); !slices.Equal(got, c.want) {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
			for _, by := range n.by {
				if by != "webhook hook" {
					t.Errorf("asked by %q", by)
				}
			}
		})
	}
}

func TestEventGridHandshakes(t *testing.T) {
	source := Source{Name: "grid", Kind: "eventgrid", Registry: "demo.azurecr.io", Query: "code", Secret: []byte(secret)}
	header := source
	header.Name, header.Query, header.Header = "header", "", "X-Secret"
	other := header
	other.Name, other.Kind = "other", "acr"
	h := handler(t, &noted{}, source, header, other)
	w := post(h, "/hooks/grid?code="+secret, payload(t, "eventgrid-validation"), "Aeg-Event-Type", "SubscriptionValidation")
	var answer map[string]string
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || w.Code != 200 || answer["validationResponse"] != "512d38b6-c7b8-40c8-89fe-f46f9e9622b6" ||
		w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	for _, target := range []string{"/hooks/grid", "/hooks/grid?code=x", "/hooks/header?code=" + secret} {
		if w := post(h, target, payload(t, "eventgrid-validation")); w.Code != 401 || strings.Contains(w.Body.String(), "512d38b6") {
			t.Errorf("%s without the secret: %d %s", target, w.Code, w.Body)
		}
	}
	for _, c := range []struct {
		name, target, origin, rate string
		status                     int
		wantRate                   string
	}{
		{"asks", "/hooks/grid?code=" + secret, "eventgrid.azure.net", "", 200, "6000"},
		{"asks for a rate", "/hooks/grid?code=" + secret, "eventgrid.azure.net", "120", 200, "120"},
		{"asks for a high rate", "/hooks/grid?code=" + secret, "eventgrid.azure.net", "1000000", 200, "6000"},
		{"asks for no rate", "/hooks/grid?code=" + secret, "eventgrid.azure.net", "-1", 200, "6000"},
		{"a region's", "/hooks/header", "westeurope-1.eventgrid.azure.net", "", 200, "6000"},
		{"without the secret", "/hooks/grid", "eventgrid.azure.net", "", 401, ""},
		{"another origin", "/hooks/header", "evil.example.com", "", 403, ""},
		{"one that ends like it", "/hooks/header", "evileventgrid.azure.net", "", 403, ""},
		{"one that begins like it", "/hooks/header", "eventgrid.azure.net.example.com", "", 403, ""},
		{"no origin", "/hooks/header", "", "", 403, ""},
		{"another kind", "/hooks/other", "eventgrid.azure.net", "", 405, ""},
		{"no such webhook", "/hooks/none", "eventgrid.azure.net", "", 405, ""},
	} {
		r := httptest.NewRequest("OPTIONS", c.target, nil)
		r.Header.Set("WebHook-Request-Origin", c.origin)
		if c.rate != "" {
			r.Header.Set("WebHook-Request-Rate", c.rate)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		origin := ""
		if c.status == 200 {
			origin = c.origin
		}
		if w.Code != c.status || w.Header().Get("WebHook-Allowed-Origin") != origin || w.Header().Get("WebHook-Allowed-Rate") != c.wantRate {
			t.Errorf("%s: %d %v, want %d and rate %q", c.name, w.Code, w.Header(), c.status, c.wantRate)
		}
	}
}

// sign is the HMAC of a body, as senders write it.
func sign(key string, body []byte) string {
	m := hmac.New(sha256.New, []byte(key))
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}

// Whoever is not the source is refused, and what it sends is noted by nobody.
func TestAuthentication(t *testing.T) {
	i := oidctest.Start(t)
	body := payload(t, "acr-push")
	basic := func(user, password string) string {
		r := httptest.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, password)
		return r.Header.Get("Authorization")
	}
	base := Source{Name: "hook", Kind: "acr", Registry: "example.com", Secret: []byte(secret)}
	byHeader, byAuthorization, byQuery, byHMAC, basicAuth, byOIDC := base, base, base, base, base, base
	byHeader.Header, byAuthorization.Header, byQuery.Query, byHMAC.HMAC, basicAuth.Username = "X-Secret", "authorization", "code", "x-jfrog-event-auth", "zot"
	const email, audience = "pubsub@project.iam.gserviceaccount.com", "https://convert.example.com/hooks/hook"
	byOIDC.Issuer, byOIDC.Audience, byOIDC.Claims = i.URL, audience, map[string]string{"email": email}
	token := func(changes ...any) string {
		c := map[string]any{"sub": "1", "aud": audience, "email": email, "email_verified": true}
		for n := 0; n < len(changes); n += 2 {
			c[changes[n].(string)] = changes[n+1]
		}
		return "Bearer " + i.Token(c)
	}
	for _, c := range []struct {
		name    string
		source  Source
		query   string
		headers []string
		want    int
	}{
		{"header", byHeader, "", []string{"X-Secret", secret}, 200},
		{"header, none", byHeader, "", nil, 401},
		{"header, empty", byHeader, "", []string{"X-Secret", ""}, 401},
		{"header, wrong", byHeader, "", []string{"X-Secret", secret + "x"}, 401},
		{"header, twice", byHeader, "", []string{"X-Secret", secret, "X-Secret", "x"}, 401},
		{"header, in another", byHeader, "", []string{"Authorization", secret}, 401},
		{"header, in the query", byHeader, "?X-Secret=" + secret, nil, 401},
		{"bearer", byAuthorization, "", []string{"Authorization", "Bearer " + secret}, 200},
		{"bare", byAuthorization, "", []string{"Authorization", secret}, 200},
		{"another scheme", byAuthorization, "", []string{"Authorization", "Basic " + secret}, 401},
		{"query", byQuery, "?code=" + secret, nil, 200},
		{"query, none", byQuery, "", nil, 401},
		{"query, wrong", byQuery, "?code=" + secret[1:], nil, 401},
		{"query, twice", byQuery, "?code=x&code=" + secret, nil, 401},
		{"HMAC", byHMAC, "", []string{"X-JFrog-Event-Auth", sign(secret, body)}, 200},
		{"HMAC with its name", byHMAC, "", []string{"X-JFrog-Event-Auth", "sha256=" + sign(secret, body)}, 200},
		{"HMAC, none", byHMAC, "", nil, 401},
		{"HMAC, empty", byHMAC, "", []string{"X-JFrog-Event-Auth", ""}, 401},
		{"HMAC of another body", byHMAC, "", []string{"X-JFrog-Event-Auth", sign(secret, append(slices.Clone(body), ' '))}, 401},
		{"HMAC by another secret", byHMAC, "", []string{"X-JFrog-Event-Auth", sign("x"+secret, body)}, 401},
		{"HMAC, the secret itself", byHMAC, "", []string{"X-JFrog-Event-Auth", secret}, 401},
		{"HMAC, a part", byHMAC, "", []string{"X-JFrog-Event-Auth", sign(secret, body)[:32]}, 401},
		{"basic", basicAuth, "", []string{"Authorization", basic("zot", secret)}, 200},
		{"basic, another user", basicAuth, "", []string{"Authorization", basic("zog", secret)}, 401},
		{"basic, another password", basicAuth, "", []string{"Authorization", basic("zot", "x")}, 401},
		{"basic, none", basicAuth, "", nil, 401},
		{"OIDC", byOIDC, "", []string{"Authorization", token()}, 200},
		{"OIDC, none", byOIDC, "", nil, 401},
		{"OIDC, no token", byOIDC, "", []string{"Authorization", "Bearer " + secret}, 401},
		{"OIDC, another audience", byOIDC, "", []string{"Authorization", token("aud", "x")}, 401},
		{"OIDC, another account", byOIDC, "", []string{"Authorization", token("email", "x@y.iam.gserviceaccount.com")}, 401},
		{"OIDC, an account that is not verified", byOIDC, "", []string{"Authorization", token("email_verified", false)}, 401},
		{"OIDC, expired", byOIDC, "", []string{"Authorization", token("exp", time.Now().Add(-time.Minute).Unix())}, 401},
		{"OIDC, another issuer", byOIDC, "", []string{"Authorization", token("iss", "https://accounts.google.com")}, 401},
		{"OIDC, not signed", byOIDC, "", []string{"Authorization", "Bearer " + i.Signed(map[string]any{"alg": "none"},
			map[string]any{"sub": "1", "aud": audience, "email": email, "email_verified": true}, func(string) []byte { return nil })}, 401},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := &noted{}
			w := post(handler(t, n, c.source), "/hooks/hook"+c.query, body, c.headers...)
			if w.Code != c.want || len(n.take()) != map[int]int{200: 1, 401: 0}[c.want] {
				t.Errorf("%d %s, want %d", w.Code, w.Body, c.want)
			}
		})
	}
	h := handler(t, &noted{}, byOIDC)
	valid := token()
	i.Close()
	if w := post(h, "/hooks/hook", body, "Authorization", valid); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("while the issuer is down: %d %s", w.Code, w.Body)
	}
}

func TestConfigurations(t *testing.T) {
	good := Source{Name: "hook", Kind: "acr", Registry: "example.com", Header: "X-Secret", Secret: []byte(secret)}
	change := func(f func(*Source)) []Source {
		s := good
		f(&s)
		return []Source{s}
	}
	oidc := func(f func(*Source)) []Source {
		return change(func(s *Source) {
			s.Header, s.Secret, s.Issuer, s.Audience, s.Claims = "", nil, "https://accounts.google.com", "x", map[string]string{"email": "x"}
			f(s)
		})
	}
	for _, c := range []struct {
		name    string
		sources []Source
		want    string
	}{
		{"no authentication", change(func(s *Source) { s.Header = "" }), "0 of header"},
		{"two", change(func(s *Source) { s.Query = "code" }), "2 of header"},
		{"no secret", change(func(s *Source) { s.Secret = nil }), "0 bytes"},
		{"a short secret", change(func(s *Source) { s.Secret = []byte("secret") }), "6 bytes"},
		{"no registry", change(func(s *Source) { s.Registry = "" }), "registry"},
		{"no name", change(func(s *Source) { s.Name = "" }), "name"},
		{"a path as name", change(func(s *Source) { s.Name = "a/b" }), "name"},
		{"no such kind", change(func(s *Source) { s.Kind = "quay" }), "must be one of acr, distribution"},
		{"twice", []Source{good, good}, "two of the name"},
		{"no audience", oidc(func(s *Source) { s.Audience = "" }), "audience"},
		{"no claim", oidc(func(s *Source) { s.Claims = nil }), "claim"},
		{"an empty claim", oidc(func(s *Source) { s.Claims = map[string]string{"email": ""} }), "claim"},
		{"an issuer without TLS", oidc(func(s *Source) { s.Issuer = "http://accounts.google.com" }), "https"},
	} {
		if _, err := New(c.sources, &noted{}, nil); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: error %v, want one of %q", c.name, err, c.want)
		}
	}
	if _, err := New(append(oidc(func(s *Source) { s.Name = "other" }), good), &noted{}, nil); err != nil {
		t.Error(err)
	}
}

// A delivery has arrived when all of its events are noted.
func TestNoting(t *testing.T) {
	var events []string
	for _, name := range []string{"a", "b", "c"} {
		events = append(events, fmt.Sprintf(`{"action":"push","target":{"mediaType":"application/vnd.oci.image.index.v1+json","digest":%q,"repository":%q,"tag":"1"}}`, pushDigest, name))
	}
	body := []byte(`{"events":[` + strings.Join(events, ",") + `]}`)
	source := Source{Name: "hook", Kind: "distribution", Registry: "example.com", Header: "X-Secret", Secret: []byte(secret)}
	for _, c := range []struct {
		name string
		fail map[string]error
		want int
	}{
		{"all", nil, 200},
		{"the queue is down for one", map[string]error{"b": fmt.Errorf("put: %w", service.ErrUnavailable)}, 503},
		{"an unknown failure", map[string]error{"a": errors.New("x")}, 503},
		{"one that will never be known", map[string]error{"b": fmt.Errorf("b: %w", service.ErrNotFound), "c": service.ErrInvalid}, 200},
	} {
		n := &noted{fail: c.fail}
		h := handler(t, n, source)
		for range 2 { // the sender tries again
			w := post(h, "/hooks/hook", body, "X-Secret", secret)
			if w.Code != c.want || (w.Header().Get("Retry-After") != "") != (c.want == 503) {
				t.Errorf("%s: %d %s, want %d", c.name, w.Code, w.Body, c.want)
			}
			if got := n.take(); len(got) != 3 {
				t.Errorf("%s: %d events were handed on, want all 3", c.name, len(got))
			}
		}
	}
}

// What nobody sends is refused, and names that cannot be any go nowhere.
func TestPayloads(t *testing.T) {
	source := Source{Name: "hook", Kind: "distribution", Registry: "example.com", Header: "X-Secret", Secret: []byte(secret)}
	n := &noted{}
	h := handler(t, n, source)
	event := func(repository, tag, dgst string) string {
		b, err := json.Marshal(map[string]any{"action": "push", "target": map[string]string{
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "repository": repository, "tag": tag, "digest": dgst}})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	list := func(events ...string) string { return `{"events":[` + strings.Join(events, ",") + `]}` }
	good := event("app", "1", pushDigest)
	for _, c := range []struct {
		name, body string
		status     int
		want       int // events
	}{
		{"good", list(good), 200, 1},
		{"a layer", list(strings.Replace(good, "image.manifest.v1+json", "image.layer.v1.tar+gzip", 1)), 200, 0},
		{"no media type", list(strings.Replace(good, "application/vnd.oci.image.manifest.v1+json", "", 1)), 200, 0},
		{"no event", `{"events":[]}`, 200, 0},
		{"something else", `{}`, 200, 0},
		{"no JSON", `<events/>`, 400, 0},
		{"empty", ``, 400, 0},
		{"cut off", list(good)[:40], 400, 0},
		{"more behind", list(good) + "{}", 400, 0},
		{"a list", `[]`, 400, 0},
		{"other types", `{"events":[{"action":7}]}`, 400, 0},
		{"a thousand", list(slices.Repeat([]string{good}, maxEvents)...), 200, maxEvents},
		{"more", list(slices.Repeat([]string{good}, maxEvents+1)...), 400, 0},
		{"large", list(good, `{"x":"`+strings.Repeat("x", maxBody)+`"}`), 413, 0},
		{"beside a good one", list(event("../x", "1", pushDigest), good), 200, 1},
		{"upper case", list(event("App", "1", pushDigest)), 200, 0},
		{"a host before it", list(event("evil.example.com:80/app", "1", pushDigest)), 200, 0},
		{"a long name", list(event(strings.Repeat("a", 256), "1", pushDigest)), 200, 0},
		{"no repository", list(event("", "1", pushDigest)), 200, 0},
		{"a query", list(event("app?x=1", "1", pushDigest)), 200, 0},
		{"a tag only", list(event("app", "1", "")), 200, 1},
		{"a digest only", list(event("app", "", pushDigest)), 200, 1},
		{"neither", list(event("app", "", "")), 200, 0},
		{"neither that is one", list(event("app", "a/b", "sha256:x")), 200, 0},
		{"a digest of an unknown algorithm", list(event("app", "", "md5:"+strings.Repeat("a", 32))), 200, 0},
		{"a long tag", list(event("app", strings.Repeat("a", 129), "")), 200, 0},
	} {
		w := post(h, "/hooks/hook", []byte(c.body), "X-Secret", secret)
		got := n.take()
		if w.Code != c.status || len(got) != c.want {
			t.Errorf("%s: %d and %d events, want %d and %d", c.name, w.Code, len(got), c.status, c.want)
		}
	}
	if w := post(h, "/hooks/other", []byte(list(good)), "X-Secret", secret); w.Code != 404 {
		t.Errorf("another webhook: %d", w.Code)
	}
	r := httptest.NewRequest("GET", "/hooks/hook", nil)
	r.Header.Set("X-Secret", secret)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 405 {
		t.Errorf("GET: %d", w.Code)
	}
}

// Deliveries that are not authenticated are not read, and those at once are bounded.
func TestDeliveriesAreBounded(t *testing.T) {
	release := make(chan struct{})
	arrived := make(chan struct{}, maxDeliveries)
	h := handler(t, handle(func(context.Context, service.Event) error {
		arrived <- struct{}{}
		<-release
		return nil
	}), Source{Name: "hook", Kind: "acr", Registry: "example.com", Header: "X-Secret", Secret: []byte(secret)},
		Source{Name: "other", Kind: "acr", Registry: "example.com", HMAC: "X-Signature", Secret: []byte(secret)})
	var wait sync.WaitGroup
	for range maxDeliveries {
		wait.Go(func() {
			if w := post(h, "/hooks/hook", payload(t, "acr-push"), "X-Secret", secret); w.Code != 200 {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
		<-arrived
	}
	if w := post(h, "/hooks/hook", payload(t, "acr-push"), "X-Secret", secret); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("one more: %d %s", w.Code, w.Body)
	}
	// While the places are taken: who is not authenticated gets none, and other sources have their own.
	r := httptest.NewRequest("POST", "/hooks/hook", unreadable{t})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 401 {
		t.Errorf("not authenticated: %d", w.Code)
	}
	if w := post(h, "/hooks/other", payload(t, "acr-push"), "X-Signature", "00"); w.Code != 401 {
		t.Errorf("another source: %d %s", w.Code, w.Body)
	}
	close(release)
	wait.Wait()
	if got, want := h.Counts(), [...]int64{Accepted: maxDeliveries, Refused: 2, Invalid: 0, Unavailable: 1}; got != want {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// Strangers who begin deliveries and send no body keep out nobody who sends one, where that alone tells who it is.
func TestSlowStrangers(t *testing.T) {
	h := handler(t, &noted{}, Source{Name: "hook", Kind: "acr", Registry: "example.com", HMAC: "X-Signature", Secret: []byte(secret)})
	server := httptest.NewServer(h)
	defer server.Close()
	for range maxDeliveries {
		c, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "POST /hooks/hook HTTP/1.1\r\nHost: x\r\nX-Signature: 00\r\nContent-Length: 1000\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	k := h.hooks["hook"]
	for n := 0; n < maxDeliveries; runtime.Gosched() {
		k.mu.Lock()
		n = len(k.unknown)
		k.mu.Unlock()
	}
	body := payload(t, "acr-push")
	req, err := http.NewRequest("POST", server.URL+"/hooks/hook", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Signature", sign(secret, body))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("the source itself: %s", resp.Status)
	}
}

type handle func(context.Context, service.Event) error

func (f handle) Handle(ctx context.Context, e service.Event) error { return f(ctx, e) }

type unreadable struct{ t *testing.T }

func (u unreadable) Read([]byte) (int, error) {
	u.t.Error("the body was read")
	return 0, io.EOF
}

// FuzzDecode: no payload of any kind makes a decoder panic, or an event that is not about the source's registry and possible names.
func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) < 25 {
		f.Fatal(files, err)
	}
	kinds := Kinds()
	for _, file := range files {
		kind, _, _ := strings.Cut(filepath.Base(file), "-")
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(slices.Index(kinds, kind)), "application/json", "zotregistry.image.updated", b)
		f.Add(uint8(slices.Index(kinds, kind)), "application/cloudevents+json", "", b)
	}
	f.Fuzz(func(t *testing.T, kind uint8, contentType, eventType string, body []byte) {
		s := Source{Kind: kinds[int(kind)%len(kinds)], Registry: "us-west1-docker.pkg.dev"}
		d, err := decoders[s.Kind](s, http.Header{"Content-Type": {contentType}, "Ce-Type": {eventType}}, body)
		if err != nil {
			return
		}
		for _, e := range d.events {
			if e.Registry != s.Registry || e.Source != s.Kind || service.CheckRepository(e.Repository) != nil ||
				e.Tag != "" && !service.IsTag(e.Tag) || e.Digest != "" && e.Digest.Validate() != nil ||
				e.Kind == service.Pushed && e.Tag == "" && e.Digest == "" || len(e.ID) > 3*128 || len(e.By) > 3*128 {
				t.Errorf("%s: %+v", s.Kind, e)
			}
		}
		if len(d.events) > len(body) {
			t.Errorf("%d events of %d bytes", len(d.events), len(body))
		}
		if _, err := json.Marshal(d.answer); err != nil {
			t.Error(err)
		}
	})
}
