package rest

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// TestAzure asks what az acr artifact-streaming asks, in its order and with its bodies.
func TestAzure(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/deep/app", "v1", "amd64")
	const repository = "/acr/v1/team/deep/app/_streaming"
	one := repository + "/" + image.Digest.String()
	const format = `{"conversionFormat":"overlaybd","conversionVersion":"v1"}`

	if a := w.ask(access.Reader, "GET", one, ""); a.status != 404 || a.code() != "NOT_FOUND" {
		t.Errorf("of an image that was never converted: %d %s", a.status, a.body)
	}
	var asked struct {
		ID     string        `json:"id"`
		Status service.State `json:"status"`
	}
	a := w.ask(access.Writer, "POST", one, format)
	a.read(t, 202, &asked)
	location := "/acr/v1/team/deep/app/_operations/" + asked.ID
	if h := a.header; h.Get("Operation-Id") != asked.ID || h.Get("Operation-Location") != location || h.Get("Location") != location || asked.Status.Ended() {
		t.Errorf("%+v with headers %v", asked, h)
	}
	w.ended(asked.ID, service.Succeeded)

	var op service.AzureOperation
	w.ask(access.Reader, "GET", location, "").read(t, 200, &op)
	if op.Name != "ArtifactStreamingConversion" || op.Resource != "team/deep/app@"+image.Digest.String() || op.Status != service.Succeeded || op.Progress != "100%" || op.Start.IsZero() || op.End.IsZero() {
		t.Errorf("operation %+v", op)
	}
	for _, a := range []answer{w.ask(access.Reader, "GET", one, ""), w.ask(access.Writer, "POST", one, format)} {
		again := asked
		if a.read(t, 200, &again); again.ID != asked.ID || again.Status != service.Succeeded {
			t.Errorf("the image's conversion is %+v", again)
		}
	}
	if a := w.ask(access.Writer, "POST", location+":cancel", ""); a.status != 409 || a.code() != "OPERATION_ENDED" {
		t.Errorf("cancel what has ended: %d %s", a.status, a.body)
	}
	if a := w.ask(access.Reader, "GET", "/acr/v1/team/other/_operations/"+asked.ID, ""); a.status != 404 {
		t.Errorf("of another repository: %d %s", a.status, a.body)
	}

	var settings service.AzureSettings
	if w.ask(access.Reader, "GET", repository, "").read(t, 200, &settings); settings.Active || settings.Format != "tar-index" || settings.Version != "v1" {
		t.Errorf("settings of a new repository: %+v", settings)
	}
	if w.ask(access.Owner, "POST", repository, `{"convertPushedImages":true,"conversionFormat":"overlaybd","conversionVersion":"v1"}`).read(t, 200, &settings); !settings.Active || settings.Status != service.Succeeded {
		t.Errorf("switched on: %+v", settings)
	}
	if w.ask(access.Reader, "GET", repository, "").read(t, 200, &settings); !settings.Active {
		t.Errorf("settings: %+v", settings)
	}
}

// TestRequests asks for what changes nothing, in the same world.
func TestRequests(t *testing.T) {
	w := newWorld(t)
	t.Run("refused", func(t *testing.T) { refused(t, w) })
	t.Run("security", func(t *testing.T) { security(t, w) })
	t.Run("wrong", func(t *testing.T) { wrong(t, w) })
	t.Run("which registry", func(t *testing.T) { whichRegistry(t, w) })
}

// refused: what cannot be converted is said before it is queued, with Azure's codes.
func refused(t *testing.T, w *world) {
	config := w.registry.PutBlob("team/app", []byte(`{"mediaType":"application/vnd.example"}`))
	helm := w.registry.PutManifest("team/app", "helm", "application/vnd.oci.image.manifest.v1+json", fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":%q,"size":39},"layers":[]}`, config))
	for name, c := range map[string]struct {
		digest digest.Digest
		status int
		codes  string
	}{
		"nothing": {digest.FromString("nothing"), 404, "RESOURCE_NOT_FOUND NOT_FOUND"},
		"a chart": {helm, 409, string(converter.ImageNotRunnable) + " " + string(converter.UnsupportedMediaType)},
	} {
		for _, path := range []string{"/acr/v1/team/app/_streaming/" + c.digest.String(), "/v1/registries/_/repositories/team/app/_images/" + c.digest.String() + "/_artifacts"} {
			a := w.ask(access.Writer, "POST", path, "")
			if a.status != c.status || !strings.Contains(c.codes, a.code()) || a.code() == "" {
				t.Errorf("%s: %d %s, want %d %s", name, a.status, a.body, c.status, c.codes)
			}
		}
	}
}

// TestRights: each route of a repository is for those who have its role there, and for all others it is not there.
func TestRights(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/app", "v1", "amd64")
	var op service.Operation
	w.ask(access.Writer, "POST", "/v1/registries/_/repositories/team/app/_images/v1/_artifacts", "").read(t, 202, &op)
	w.ended(op.ID, service.Succeeded)
	bodies := map[string]string{
		"POST /acr/v1/{repository}/_streaming": `{"convertPushedImages":false}`,
		"PUT " + ofRepository + "/_settings":   `{"convertPushedImages":false}`,
		"POST " + ofRepository + "/_starts":    startsReport(image),
	}
	for _, rt := range routes() {
		if rt.role == access.None {
			continue
		}
		path := strings.NewReplacer("{registry}", w.host, "{repository}", "team/app", "{digest}", image.Digest.String(), "{reference}", "v1", "{id}", op.ID).Replace(rt.path)
		body := bodies[rt.method+" "+rt.path]
		for _, role := range []access.Role{access.None, access.Reader, access.Writer, access.Owner, access.Reporter} {
			if rt.action == "delete" && role == access.Owner {
				continue // TestClient
			}
			a := w.ask(role, rt.method, path, body)
			outcome := "denied"
			reports := rt.role == access.Reporter
			switch {
			case role == access.None, role == access.Reporter && !reports:
				if a.status != 404 || a.code() != "NOT_FOUND" {
					t.Errorf("%s %s of one who may see nothing: %d %s", rt.method, rt.path, a.status, a.body)
				}
			case role < rt.role && (!reports || role != access.Owner):
				if a.status != 403 || a.code() != "DENIED" || !strings.Contains(a.body, rt.role.String()) {
					t.Errorf("%s %s of a %s: %d %s", rt.method, rt.path, role, a.status, a.body)
				}
			default:
				if a.status != 200 && a.code() != "ARTIFACT_EXISTS" && a.code() != "OPERATION_ENDED" && (rt.method != "DELETE" || a.code() != "NOT_FOUND") {
					t.Errorf("%s %s of a %s: %d %s", rt.method, rt.path, role, a.status, a.body)
				}
				outcome = "ok"
				if a.status != 200 {
					outcome = "failed"
				}
			}
			if e := w.lastAudit(); rt.action != "" && (!rt.quiet || outcome != "ok") && (e["action"] != rt.action || e["outcome"] != outcome || e["repository"] != "team/app" || e["registry"] != w.host || e["who"] != "a "+role.String()) {
				t.Errorf("%s %s of a %s (%s) is audited as %v", rt.method, rt.path, role, outcome, e)
			}
		}
		if strings.Contains(path, "team/app") {
			if a := w.ask(access.Owner, rt.method, strings.Replace(path, "team/app", "others/app", 1), body); a.status != 404 {
				t.Errorf("%s %s in another's repository: %d %s", rt.method, rt.path, a.status, a.body)
			}
		}
	}
	for path, key := range map[string]string{"/v1/registries": "registries", "/v1/operations": "operations"} {
		if a := w.ask(access.None, "GET", path, ""); a.body != `{"`+key+`":[]}`+"\n" {
			t.Errorf("%s of one who may see nothing: %s", path, a.body)
		}
		if a := w.ask(access.Reader, "GET", path, ""); a.status != 200 || !strings.Contains(a.body, w.host) {
			t.Errorf("%s: %s", path, a.body)
		}
	}
	if a := w.ask(access.Owner, "PUT", "/v1/registries/_/repositories/t*/_settings", `{"convertPushedImages":true}`); a.status != 403 {
		t.Errorf("a pattern that is wider than the right: %d %s", a.status, a.body)
	}
	for _, repository := range []string{"team/*", "team/a*"} {
		var s service.Settings
		w.ask(access.Owner, "PUT", "/v1/registries/_/repositories/"+repository+"/_settings", `{"convertPushedImages":true}`).read(t, 200, &s)
		if s.Repository != repository || !s.Active || s.By != "a owner" {
			t.Errorf("settings %+v", s)
		}
	}
}

// startsReport is one of a start that counts for nothing: the image has no such artifact.
func startsReport(i service.Image) string {
	return fmt.Sprintf(`{"node":%q,"starts":[{"manifest":%q,"artifact":%q,"profile":"none","pull":0.5,"wait":1,"reads":2.5,"bytes":1,"missedBytes":1,"misses":1}]}`,
		strings.Repeat("0", 32), i.Digest, i.Digest)
}

// TestReport: what a node reports is there for who may see the image, and nobody else's word is taken.
func TestReport(t *testing.T) {
	w := newWorld(t)
	image := w.push("team/app", "v1", "amd64")
	var op service.Operation
	w.ask(access.Writer, "POST", "/v1/registries/_/repositories/team/app/_images/v1/_artifacts", "").read(t, 202, &op)
	op = w.ended(op.ID, service.Succeeded)
	const path = "/v1/registries/_/repositories/team/app/_starts"
	good := strings.Replace(startsReport(image), `"artifact":"`+image.Digest.String(), `"artifact":"`+op.Artifacts[0].Digest.String(), 1)
	for body, counted := range map[string]int{startsReport(image): 0, good: 1} {
		var done service.Reported
		if w.ask(access.Reporter, "POST", path, body).read(t, 200, &done); done != (service.Reported{Taken: 1, Counted: counted}) {
			t.Errorf("%s: %+v, want %d counted", body, done, counted)
		}
	}
	for _, wrong := range []string{
		"", "{}", strings.Replace(good, "2.5", "-1", 1), strings.Replace(good, `"misses"`, `"host":"node-1","misses"`, 1), strings.Replace(good, "2.5", "99999", 1),
	} {
		if a := w.ask(access.Reporter, "POST", path, wrong); a.status != 400 || a.code() != "INVALID" {
			t.Errorf("%s: %d %s", wrong, a.status, a.body)
		}
	}
	if a := w.ask(access.Reporter, "POST", path, good+strings.Repeat(" ", maxBody)); a.status != 413 {
		t.Errorf("a large body: %d %s", a.status, a.body)
	}
	info, err := w.client(access.Reader).Image(t.Context(), w.host, "team/app", "v1")
	if err != nil || info.Platforms[0].Starts == nil {
		t.Fatalf("%+v, %v", info, err)
	}
	if s := info.Platforms[0].Starts; s.Nodes != 1 || len(s.Variants) != 1 || !s.Variants[0].Current || s.Variants[0].Starts != 1 || s.Variants[0].Reads.Count != 1 {
		t.Errorf("starts are %+v", s)
	}
}

// security: each scheme of the document lets in, and without one nothing is answered.
func security(t *testing.T, w *world) {
	doc := strict(t)
	if len(doc.Components.SecuritySchemes) != len(doc.Security) {
		t.Errorf("%d schemes, of which %d let in", len(doc.Components.SecuritySchemes), len(doc.Security))
	}
	for name, s := range doc.Components.SecuritySchemes {
		r, err := http.NewRequestWithContext(t.Context(), "GET", w.server.URL+"/v1/registries", nil)
		if err != nil {
			t.Fatal(err)
		}
		switch s.Value.Scheme {
		case "bearer":
			r.Header.Set("Authorization", "Bearer "+token(access.Reader))
		case "basic":
			r.SetBasicAuth("anybody", token(access.Reader))
		default:
			t.Fatalf("scheme %s is %+v", name, s.Value)
		}
		a, err := w.server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if a.Body.Close(); a.StatusCode != 200 {
			t.Errorf("%s: status %d", name, a.StatusCode)
		}
	}
	for _, rt := range routes() {
		a := w.ask(nobody, rt.method, strings.NewReplacer("{", "", "}", "").Replace(rt.path), "")
		if a.status != 401 || a.code() != "UNAUTHORIZED" || a.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s %s: %d %s", rt.method, rt.path, a.status, a.body)
		}
	}
}

// wrong: what is wrong is named, and what would be right.
func wrong(t *testing.T, w *world) {
	dgst := digest.FromString("x").String()
	const settings = "/v1/registries/_/repositories/team/app/_settings"
	for name, c := range map[string]struct {
		method, path, body string
		headers            []string
		status             int
		want               string // in the message
	}{
		"unknown field":           {"PUT", settings, `{"convertPushedImages":true,"existing":true}`, nil, 400, `unknown field \"existing\"`},
		"unknown field of a rule": {"PUT", settings, `{"convertPushedImages":true,"rules":{"minimum":1}}`, nil, 400, `unknown field \"minimum\"`},
		"no field":                {"PUT", settings, `{}`, nil, 400, "lacks convertPushedImages"},
		"no body":                 {"POST", "/acr/v1/team/app/_streaming", ``, nil, 400, "lacks convertPushedImages"},
		"wrong type":              {"PUT", settings, `{"convertPushedImages":"yes"}`, nil, 400, "convertPushedImages"},
		"two objects":             {"PUT", settings, `{"convertPushedImages":true}{}`, nil, 400, "follows"},
		"no JSON":                 {"PUT", settings, `convertPushedImages=true`, nil, 400, "the body"},
		"body of a form":          {"PUT", settings, `{"convertPushedImages":true}`, []string{"Content-Type", "text/plain"}, 415, "application/json"},
		"large body":              {"PUT", settings, `{"convertPushedImages":true}` + strings.Repeat(" ", maxBody), nil, 413, "65536 bytes"},
		"body that nobody reads":  {"POST", "/v1/registries/_/repositories/team/app/_images/v1/_artifacts:verify", `{"id":1}`, nil, 400, `unknown field \"id\"`},
		"negative size":           {"PUT", settings, `{"convertPushedImages":true,"rules":{"minSize":-1}}`, nil, 400, ""},
		"unknown platform":        {"POST", "/v1/registries/_/repositories/team/app/_images/" + dgst + "/_artifacts", `{"platforms":["a b"]}`, nil, 400, "a b"},
		"another tag":             {"POST", "/v1/registries/_/repositories/team/app/_images/v1/_artifacts", `{"tag":"v2"}`, nil, 400, "v2"},
		"unknown format":          {"POST", "/acr/v1/team/app/_streaming/" + dgst, `{"conversionFormat":"nydus"}`, nil, 400, "tar-index"},
		"unknown version":         {"POST", "/acr/v1/team/app/_streaming/" + dgst, `{"conversionVersion":"v9"}`, nil, 400, "v1"},
		"unknown parameter":       {"GET", "/v1/operations?repo=x", "", nil, 400, "registry, repository, digest, status, limit"},
		"parameter of no route":   {"GET", settings + "?x=1", "", nil, 400, "has none"},
		"parameter twice":         {"GET", "/v1/operations?limit=1&limit=2", "", nil, 400, "2 times"},
		"limit":                   {"GET", "/v1/operations?limit=0", "", nil, 400, "1 to 1000"},
		"status":                  {"GET", "/v1/operations?status=running", "", nil, 400, "NotStarted Running Succeeded Failed Canceled"},
		"digest of a filter":      {"GET", "/v1/operations?digest=v1", "", nil, 400, "sha256"},
		"existing":                {"PUT", settings + "?existing=maybe", `{"convertPushedImages":true}`, nil, 400, "maybe"},
		"name":                    {"GET", "/v1/registries/_/repositories/Team/app/_settings", "", nil, 400, "lower-case"},
		"long name":               {"GET", "/v1/registries/_/repositories/" + strings.Repeat("a", 256) + "/_tags", "", nil, 400, "aaa"},
		"pattern for a name":      {"GET", "/v1/registries/_/repositories/team/*/_tags", "", nil, 400, "team/*"},
		"reference":               {"GET", "/v1/registries/_/repositories/team/app/_images/sha256:12", "", nil, 400, "sha256:12"},
		"digest":                  {"GET", "/acr/v1/team/app/_streaming/latest", "", nil, 400, "latest"},
		"id":                      {"GET", "/v1/operations/12", "", nil, 400, "UUID"},
		"operation":               {"GET", "/v1/operations/8f4ba2c5-0c1e-4c0c-9d7b-0f3f3c1d2e4f", "", nil, 404, "8f4ba2c5"},
		"tag":                     {"GET", "/v1/registries/_/repositories/team/app/_images/v9/_digest", "", nil, 404, "v9"},
		"registry":                {"GET", "/v1/registries/elsewhere.example.com/repositories", "", nil, 404, "/v1/registries"},
		"method":                  {"POST", settings, "", nil, 405, "DELETE, GET, PUT"},
		"path":                    {"GET", "/v1/images", "", nil, 404, "/openapi.json"},
	} {
		t.Run(name, func(t *testing.T) {
			a := w.ask(access.Owner, c.method, c.path, c.body, c.headers...)
			if a.status != c.status || a.code() == "" || !strings.Contains(a.body, c.want) {
				t.Errorf("%d %s, want %d with %q", a.status, a.body, c.status, c.want)
			}
			if c.status == 405 && a.header.Get("Allow") != c.want {
				t.Errorf("Allow: %s", a.header.Get("Allow"))
			}
		})
	}
	if a := w.ask(access.Reader, "GET", "/acr/v1/team/app/_streaming?api-version=2023-01-01", ""); a.status != 200 {
		t.Errorf("az may send what it likes in the query: %d %s", a.status, a.body)
	}
	if a := w.ask(access.Reader, "GET", "/acr/v1/team%2Fapp/_streaming", ""); a.status != 200 {
		t.Errorf("an escaped slash: %d %s", a.status, a.body)
	}
}

// whichRegistry: of a request that names none it is the one of the Host, or else the default one.
func whichRegistry(t *testing.T, w *world) {
	all := &access.Identity{Name: "all", Grants: []access.Grant{{Role: access.Owner}}}
	ask := func(c Config, host string) string {
		t.Helper()
		h, err := New(w.svc, c)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequestWithContext(access.With(t.Context(), all), "PUT", "http://"+host+"/v1/registries/_/repositories/x/_settings", strings.NewReader(`{"convertPushedImages":false}`))
		r.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		return rec.Body.String()
	}
	for _, c := range []struct{ fallback, host, want string }{
		{"", "other.example.com", `"registry":"other.example.com"`},
		{"", "other.example.com:8443", `"registry":"other.example.com"`},
		{"", w.host, `"registry":"` + w.host + `"`},
		{"", "service.example.com", "names no registry"},
		{w.host, "service.example.com", `"registry":"` + w.host + `"`},
		{w.host, "other.example.com", `"registry":"other.example.com"`},
	} {
		if got := ask(Config{Default: c.fallback}, c.host); !strings.Contains(got, c.want) {
			t.Errorf("default %q, host %q: %s, want %s", c.fallback, c.host, got, c.want)
		}
	}
	if _, err := New(w.svc, Config{Default: "elsewhere.example.com"}); err == nil {
		t.Error("a default that is none of the registries is taken")
	}
}
