package console

import (
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// TestImpossibleNames: what no repository can be called is not found, whatever one may do in what a pattern makes of it.
func TestImpossibleNames(t *testing.T) {
	s := example()
	_, as := serve(t, s)
	for _, name := range []string{"team/app:x-public", "Team/app"} {
		if status, _ := as("olivia").get(imagePath(host, name, "v1")); status != http.StatusNotFound {
			t.Errorf("%s is %d", name, status)
		}
		if status, _, _ := as("olivia").post(imagePath(host, name, "v1")+"/create", url.Values{"digest": {dig("index").String()}}); status != http.StatusNotFound || len(s.done()) > 0 {
			t.Errorf("%s is %d, and %q was done", name, status, s.done())
		}
	}
}

// TestRoles: what somebody may not do is not offered, and is refused; what they may not see does not exist.
func TestRoles(t *testing.T) {
	s := example()
	s.image.Last = &s.operations[2]
	_, as := serve(t, s)
	image := imagePath(host, "team/app", "v1")
	turn := registryPath(host, "-", "switch")
	pages := []string{registryPath(host), repositoryPath(host, "team/app"), image, image + "/referrers", operationPath(id(1))}
	offered := map[string][]string{
		"olivia": {turn, image + "/create", operationPath(id(1), "cancel"), image + "/delete"},
		"walter": {image + "/create", operationPath(id(1), "cancel")},
		"rita":   nil,
	}
	for name, want := range offered {
		b := as(name)
		var got []string
		for _, path := range pages {
			status, page := b.get(path)
			if status != http.StatusOK {
				t.Errorf("%s: %s is %d", name, path, status)
			}
			root := parse(t, page)
			got = append(got, forms(root)...)
			for _, a := range all(root, "a") {
				if to, _ := attr(a, "href"); strings.HasSuffix(to, "/delete") {
					got = append(got, to)
				}
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if got = slices.Compact(got); !slices.Equal(got, want) {
			t.Errorf("%s is offered %q, want %q", name, got, want)
		}
	}
	for name, may := range map[string][4]bool{"olivia": {true, true, true, true}, "walter": {true, true, false, false}, "rita": {}} {
		for i, form := range []struct {
			path   string
			values url.Values
		}{
			{image + "/create", url.Values{"digest": {dig("index").String()}}}, {operationPath(id(1), "cancel"), nil},
			{turn, url.Values{"repository": {"team/app"}, "active": {"true"}}}, {image + "/delete", url.Values{"digest": {dig("index").String()}}},
		} {
			before := len(s.done())
			status, _, _ := as(name).post(form.path, form.values)
			did := len(s.done()) > before
			if want := map[bool]int{true: http.StatusSeeOther, false: http.StatusForbidden}[may[i]]; status != want || did != may[i] {
				t.Errorf("%s: POST %s is %d, want %d; done: %v", name, form.path, status, want, did)
			}
		}
	}
	for _, line := range []string{`"who":"olivia"`, `"action":"convert"`, `"action":"cancel"`, `"action":"settings"`, `"action":"delete"`, `"outcome":"denied"`} {
		if !strings.Contains(s.audit.String(), line) {
			t.Errorf("the audit log has no %s:\n%s", line, s.audit.String())
		}
	}
	if status, _ := as("rita").get(image + "/delete"); status != http.StatusForbidden {
		t.Errorf("a reader's page of deletion is %d", status)
	}
	before := len(s.done())
	for _, path := range append(pages, image+"/create", image+"/delete", operationPath(id(1), "events"), operationPath(id(1), "cancel"), settingsPath(host, "team/app")) {
		status, page := as("nadia").get(path)
		if path == registryPath(host) {
			if status != http.StatusOK || strings.Contains(page, "team/app") {
				t.Errorf("somebody without a role sees %s: %d", path, status)
			}
			continue
		}
		if status == http.StatusOK || strings.Contains(page, "alice") {
			t.Errorf("somebody without a role sees %s: %d", path, status)
		}
		if status, _, _ := as("nadia").post(path, url.Values{"digest": {dig("index").String()}, "repository": {"team/app"}}); status == http.StatusSeeOther {
			t.Errorf("somebody without a role changes %s", path)
		}
	}
	if status, _, _ := as("nadia").post(turn, url.Values{"repository": {"team/app"}}); status != http.StatusNotFound {
		t.Errorf("somebody without a role switches: %d", status)
	}
	if _, page := as("nadia").get("/operations"); strings.Contains(page, "team/app") {
		t.Error("somebody without a role sees operations")
	}
	if len(s.done()) != before {
		t.Errorf("somebody without a role did %q", s.done()[before:])
	}
}

// TestForms: each form does what it says, once, and leads to a page of ours.
func TestForms(t *testing.T) {
	image := imagePath(host, "team/app", "v1")
	d := dig("index").String()
	for _, c := range []struct {
		name, path string
		form       url.Values
		told       func(*told)
		did, to    string
	}{
		{"create", image + "/create", url.Values{"digest": {d}}, nil, "submit " + host + "/team/app@" + d + " tag=v1 platforms=[] force=false by olivia", image + "?done=created"},
		{"create some", image + "/create", url.Values{"digest": {d}, "platforms": {"chosen"}, "platform": {"linux/amd64"}, "force": {"true"}}, nil,
			"submit " + host + "/team/app@" + d + " tag=v1 platforms=[linux/amd64] force=true by olivia", image + "?done=created"},
		{"create by digest", imagePath(host, "team/app", d, "create"), url.Values{"digest": {d}}, nil, "submit " + host + "/team/app@" + d + " tag= platforms=[] force=false by olivia", imagePath(host, "team/app", d) + "?done=created"},
		{"is being created", image + "/create", url.Values{"digest": {d}}, func(s *told) { s.existed = true }, "submit", operationPath(id(1)) + "?done=ongoing"},
		{"is there", image + "/create", url.Values{"digest": {d}}, func(s *told) { s.submitErr = service.ErrExists }, "submit", image + "?done=exists"},
		{"cancel", operationPath(id(1), "cancel"), nil, nil, "cancel " + id(1) + " by olivia", operationPath(id(1)) + "?done=canceling"},
		{"cancel from the image", operationPath(id(1), "cancel"), url.Values{"from": {"image"}}, nil, "cancel", image + "?done=canceling"},
		{"cancel from elsewhere", operationPath(id(1), "cancel"), url.Values{"from": {"https://evil.example.com"}}, nil, "cancel", operationPath(id(1)) + "?done=canceling"},
		{"cancel what has ended", operationPath(id(3), "cancel"), nil, nil, "cancel", operationPath(id(3)) + "?done=ended"},
		{"switch off", registryPath(host, "-", "switch"), url.Values{"repository": {"team/app"}, "active": {"false"}, "q": {"app"}, "page": {"3"}}, nil,
			"settings team/app active=false existing=false rules={Platforms:[linux/amd64] MinSize:50000000 Keep:10} by olivia", registryPath(host) + "?page=3&q=app&done=off#" + anchor("switch", "team/app")},
		{"switch on", registryPath(host, "-", "switch"), url.Values{"repository": {"lib/base"}, "active": {"true"}, "q": {"&done=x#//evil.example.com"}, "page": {"//evil.example.com"}}, nil,
			"settings lib/base active=true existing=false", registryPath(host) + "?q=%26done%3Dx%23%2F%2Fevil.example.com&done=on#" + anchor("switch", "lib/base")},
		{"switch on with what exists", registryPath(host, "-", "switch"), url.Values{"repository": {"lib/base"}, "active": {"true"}, "existing": {"true"}, "from": {"repository"}}, nil,
			"settings lib/base active=true existing=true", repositoryPath(host, "lib/base") + "?done=existing"},
		{"settings", registryPath(host, "-", "settings"), url.Values{"repository": {"lib/base"}, "active": {"true"}, "platforms": {"linux/arm64, linux/amd64"}, "minsize": {"1.5 MB"}, "keep": {"7"}}, nil,
			"settings lib/base active=true existing=false rules={Platforms:[linux/arm64 linux/amd64] MinSize:1500000 Keep:7} by olivia", repositoryPath(host, "lib/base") + "?done=saved"},
		{"new pattern", registryPath(host, "-", "settings"), url.Values{"repository": {" lib/* "}, "new": {"true"}, "active": {"true"}, "existing": {"true"}}, nil,
			"settings lib/* active=true existing=true", registryPath(host) + "?done=saved#" + anchor("switch", "lib/*")},
		{"remove settings", registryPath(host, "-", "forget"), url.Values{"repository": {"team/*"}}, nil, "forget team/*", registryPath(host) + "?done=forgotten"},
		{"delete", image + "/delete", url.Values{"digest": {d}}, nil, "delete " + host + "/team/app@" + d + " by olivia", image + "?done=deleted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := example()
			if c.told != nil {
				c.told(s)
			}
			_, as := serve(t, s)
			status, page, to := as("olivia").post(c.path, c.form)
			if status != http.StatusSeeOther || to != c.to {
				t.Errorf("answer is %d to %q, want %q\n%s", status, to, c.to, page)
			}
			if did := s.done(); len(did) != 1 || !strings.HasPrefix(did[0], c.did) {
				t.Errorf("did %q, want %q", did, c.did)
			}
		})
	}
}

// TestWrongForms: what cannot be meant changes nothing, and what was entered is there to be corrected.
func TestWrongForms(t *testing.T) {
	image := imagePath(host, "team/app", "v1")
	settings := registryPath(host, "-", "settings")
	for _, c := range []struct {
		name, path string
		form       url.Values
		status     int
		says       string
	}{
		{"no digest", image + "/create", nil, http.StatusBadRequest, "cannot be read"},
		{"wrong digest", image + "/delete", url.Values{"digest": {"sha256:0"}}, http.StatusBadRequest, "cannot be read"},
		{"wrong platform", image + "/create", url.Values{"digest": {dig("x").String()}, "platforms": {"chosen"}, "platform": {"plan9/amd64"}}, http.StatusBadRequest, "cannot be read"},
		{"no name", settings, url.Values{"new": {"true"}}, http.StatusUnprocessableEntity, "Write the name of a repository"},
		{"wrong name", settings, url.Values{"new": {"true"}, "repository": {"Team App"}}, http.StatusUnprocessableEntity, `"Team App" is no repository`},
		{"wrong size", settings, url.Values{"repository": {"lib/base"}, "minsize": {"big"}}, http.StatusUnprocessableEntity, `"big" is no size`},
		{"wrong number", settings, url.Values{"repository": {"lib/base"}, "keep": {"-1"}}, http.StatusUnprocessableEntity, `"-1" is no number of tags`},
		{"wrong platforms", settings, url.Values{"repository": {"lib/base"}, "platforms": {"linux/amd64 windows/amd64"}}, http.StatusUnprocessableEntity, `"windows/amd64" is no Linux platform`},
		{"too large", settings, url.Values{"repository": {strings.Repeat("a", 1<<17)}}, http.StatusBadRequest, "cannot be read"},
		{"no such registry", pathOf("registries", "no.example.com", "-", "switch"), url.Values{"repository": {"x"}}, http.StatusNotFound, "What to do"},
		{"switch of nothing", registryPath(host, "-", "switch"), nil, http.StatusBadRequest, "cannot be read"},
		{"no method", image, nil, http.StatusMethodNotAllowed, "another kind"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := example()
			_, as := serve(t, s)
			status, page, _ := as("olivia").post(c.path, c.form)
			checkPage(t, page)
			if text := textOf(parse(t, page)); status != c.status || !strings.Contains(text, c.says) {
				t.Errorf("answer is %d, want %d with %q:\n%s", status, c.status, c.says, text)
			}
			if did := s.done(); len(did) != 0 {
				t.Errorf("did %q", did)
			}
		})
	}
	s := example()
	s.submitErr = &converter.Error{Code: converter.ImageNotRunnable, Err: service.ErrInvalid}
	_, as := serve(t, s)
	status, page, _ := as("olivia").post(image+"/create", url.Values{"digest": {dig("index").String()}})
	checkPage(t, page)
	if text := textOf(parse(t, page)); status != http.StatusUnprocessableEntity || !strings.Contains(text, converter.ImageNotRunnable.Message()) {
		t.Errorf("what cannot be converted: %d\n%s", status, text)
	}
}

// TestSigningIn: nothing is seen before, everything goes on where it was meant to, and never elsewhere.
func TestSigningIn(t *testing.T) {
	s := example()
	_, as := serve(t, s)
	nobody := as("")
	if status, page, to := nobody.do(http.MethodGet, "/operations?state=Failed", nil); status != http.StatusSeeOther || !strings.HasPrefix(to, "/login?next=") || strings.Contains(page, "team/app") {
		t.Errorf("without a session: %d to %q", status, to)
	}
	if status, _, to := nobody.post("/login", url.Values{"token": {tokenOf("rita")}, "next": {"/operations?state=Failed"}}); status != http.StatusSeeOther || to != "/operations?state=Failed" {
		t.Errorf("signed in: %d to %q", status, to)
	}
	for _, elsewhere := range []string{"https://evil.example.com/", "//evil.example.com/", `/\evil.example.com`, "javascript:alert(1)"} {
		status, _, to := as("").post("/login", url.Values{"token": {tokenOf("rita")}, "next": {elsewhere}})
		if u, err := url.Parse(to); status != http.StatusSeeOther || err != nil || u.Host != "" || u.Scheme != "" || !strings.HasPrefix(to, "/") || strings.HasPrefix(to, "//") || strings.HasPrefix(to, `/\`) {
			t.Errorf("next=%q: %d to %q", elsewhere, status, to)
		}
	}
	b := as("rita")
	if _, page := b.get("/operations"); !strings.Contains(page, "Sign out") || !strings.Contains(page, "rita") {
		t.Error("it is not said who is signed in")
	}
	b.post("/logout", nil)
	if status, _ := b.get("/operations"); status != http.StatusSeeOther {
		t.Errorf("after signing out: %d", status)
	}
	for path, kind := range map[string]string{"/static/console.css": "text/css", "/static/console.js": "text/javascript", "/static/icon.svg": "image/svg+xml"} {
		answer, err := as("").Get(nobody.base + path)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if got := answer.Header.Get("Content-Type"); answer.StatusCode != http.StatusOK || !strings.HasPrefix(got, kind) {
			t.Errorf("%s is %d, %s", path, answer.StatusCode, got)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, nobody.base+operationPath(id(1), "cancel"), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Sec-Fetch-Site", "cross-site")
	answer, err := as("olivia").Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if page, err := io.ReadAll(answer.Body); err != nil || answer.StatusCode != http.StatusForbidden || len(s.done()) != 0 {
		t.Errorf("a form of another site: %d, done %q, %v", answer.StatusCode, s.done(), err)
	} else {
		checkPage(t, string(page))
	}
	if status, _ := as("").get("/static/../console.go"); status == http.StatusOK {
		t.Error("files beside the static ones are served")
	}
}
