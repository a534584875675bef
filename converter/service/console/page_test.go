package console

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/net/html"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// places are all pages, with what they show.
func places() map[string]string {
	image := imagePath(host, "team/app", "v1")
	return map[string]string{
		"registries": "/registries", "registry": registryPath(host), "read only": registryPath("other.example.com"), "filtered": registryPath(host) + "?q=base",
		"nothing fits": registryPath(host) + "?q=nowhere", "repository": repositoryPath(host, "team/app"), "storage": repositoryPath(host, "team/app", "-", "storage"),
		"tags filtered": repositoryPath(host, "team/app") + "?q=v2&done=on", "settings": settingsPath(host, "lib/base"), "inherited": settingsPath(host, "team/app"),
		"pattern": settingsPath(host, "team/*"), "new pattern": settingsPath(host, ""), "image": image, "by digest": imagePath(host, "team/app", dig("index").String()),
		"start": image + "/start", "referrers": image + "/referrers", "delete": image + "/delete", "operations": "/operations",
		"operations filtered": "/operations?state=Failed&repository=zzz", "running": operationPath(id(1)), "waiting": operationPath(id(2)), "succeeded": operationPath(id(3)),
		"failed": operationPath(id(4)), "canceled": operationPath(id(5)), "not found": "/nowhere", "no such image": imagePath("no.example.com", "x", "y"),
	}
}

// TestPages: what can be read in a page's HTML of whether everybody can use it.
func TestPages(t *testing.T) {
	for name, s := range map[string]*told{"full": example(), "empty": {registries: []service.RegistryInfo{{Name: host}}}, "none": {}} {
		_, as := serve(t, s)
		owner := as("olivia")
		for place, path := range places() {
			t.Run(name+"/"+place, func(t *testing.T) {
				status, page := owner.get(path)
				if want := http.StatusOK; name == "full" && status != want && !strings.HasPrefix(place, "no") {
					t.Errorf("status is %d", status)
				}
				checkPage(t, page)
			})
		}
		t.Run(name+"/signing in", func(t *testing.T) {
			_, page := as("").get("/login?next=/operations")
			checkPage(t, page)
			_, page, _ = as("").post("/login", url.Values{"token": {"wrong"}})
			checkPage(t, page)
		})
	}
}

func checkPage(t *testing.T, page string) {
	t.Helper()
	root := parse(t, page)
	if !strings.HasPrefix(page, "<!doctype html>") {
		t.Errorf("no doctype: %.60q", page)
	}
	if lang, _ := attr(all(root, "html")[0], "lang"); lang != "en" {
		t.Errorf("language is %q", lang)
	}
	if titles := all(all(root, "head")[0], "title"); len(titles) != 1 || !strings.HasSuffix(textOf(titles[0]), " · Artifact streaming") || strings.HasPrefix(textOf(titles[0]), "·") {
		t.Error("no title of its own")
	}
	for _, landmark := range []string{"main", "header", "footer", "h1"} {
		if n := len(all(root, landmark)); n != 1 {
			t.Errorf("%d elements %s, want 1", n, landmark)
		}
	}
	if skip := all(all(root, "body")[0])[0]; skip.Data != "a" || textOf(skip) != "Skip to the content" {
		t.Error("the first element is no skip link")
	}
	checkIDs(t, root)
	checkNames(t, root)
	checkTables(t, root)
	checkPolicy(t, root)
	level := 0
	for _, h := range all(root, "h1", "h2", "h3", "h4", "h5", "h6") {
		n := int(h.Data[1] - '0')
		if n > level+1 {
			t.Errorf("heading %q of level %d after one of level %d", textOf(h), n, level)
		}
		if level = n; textOf(h) == "" {
			t.Errorf("an empty %s", h.Data)
		}
	}
}

// checkIDs: ids are unique, and what refers to one finds it.
func checkIDs(t *testing.T, root *html.Node) {
	t.Helper()
	ids := map[string]bool{}
	for _, n := range all(root) {
		if id, ok := attr(n, "id"); ok {
			if ids[id] || id == "" || strings.ContainsAny(id, " <>\"'") {
				t.Errorf("id %q is there twice, or none", id)
			}
			ids[id] = true
		}
	}
	for _, n := range all(root) {
		for _, key := range []string{"for", "aria-labelledby", "aria-describedby", "aria-controls"} {
			list, _ := attr(n, key)
			for _, id := range strings.Fields(list) {
				if !ids[id] {
					t.Errorf("%s=%q of %s is nowhere", key, id, n.Data)
				}
			}
		}
		if to, _ := attr(n, "href"); strings.HasPrefix(to, "#") && !ids[to[1:]] {
			t.Errorf("link to %s, which is nowhere", to)
		}
	}
}

// checkNames: each control, landmark that is there more than once, and drawing has a name.
func checkNames(t *testing.T, root *html.Node) {
	t.Helper()
	labels := map[string]string{}
	for _, l := range all(root, "label") {
		to, _ := attr(l, "for")
		labels[to] = textOf(l)
	}
	navs := map[string]bool{}
	for _, n := range all(root, "a", "button", "summary", "input", "select", "textarea", "nav", "progress", "svg", "form", "fieldset") {
		name, _ := attr(n, "aria-label")
		if by, ok := attr(n, "aria-labelledby"); ok {
			name = by
		}
		id, _ := attr(n, "id")
		kind, _ := attr(n, "type")
		switch n.Data {
		case "a", "button", "summary":
			name += textOf(n)
			if method, _ := attr(n, "type"); n.Data == "button" && method == "" && !within(n, "form") {
				t.Errorf("button %q sends no form", name)
			}
		case "input", "select", "textarea":
			name += labels[id]
			if kind == "hidden" {
				continue
			}
		case "nav":
			if navs[name] {
				t.Errorf("two navigations are called %q", name)
			}
			navs[name] = true
		case "svg":
			if hidden, _ := attr(n, "aria-hidden"); hidden == "true" {
				continue
			}
			if role, _ := attr(n, "role"); role != "img" {
				t.Error("a drawing is neither hidden nor an image")
			}
		case "fieldset":
			if l := all(n, "legend"); len(l) > 0 {
				name = textOf(l[0])
			}
		case "form":
			continue
		}
		if strings.TrimSpace(name) == "" {
			t.Errorf("%s %v has no name", n.Data, n.Attr)
		}
		if index, ok := attr(n, "tabindex"); ok && index != "0" && index != "-1" {
			t.Errorf("tabindex %s changes the order of %q", index, name)
		}
	}
}

func within(n *html.Node, name string) bool {
	for p := range n.Ancestors() {
		if p.Data == name {
			return true
		}
	}
	return false
}

func checkTables(t *testing.T, root *html.Node) {
	t.Helper()
	for _, table := range all(root, "table") {
		if c := all(table, "caption"); len(c) != 1 || textOf(c[0]) == "" {
			t.Error("a table without a caption")
		}
		for _, th := range all(table, "th") {
			want := "col"
			if within(th, "tbody") {
				want = "row"
			}
			if scope, _ := attr(th, "scope"); scope != want || textOf(th) == "" {
				t.Errorf("header %q has scope %q, want %q", textOf(th), scope, want)
			}
		}
		for _, tr := range all(all(table, "tbody")[0], "tr") {
			if len(all(tr, "th")) != 1 {
				t.Errorf("row %q has no header", textOf(tr))
			}
			if got, want := len(all(tr, "th", "td")), len(all(all(table, "thead")[0], "th")); got != want {
				t.Errorf("row %q has %d cells below %d headers", textOf(tr), got, want)
			}
		}
		if index, _ := attr(table.Parent, "tabindex"); index != "0" {
			t.Error("a table that may be wider than the screen cannot be scrolled with the keyboard")
		}
	}
}

// checkPolicy: nothing that the content security policy would forbid, and nothing from or to elsewhere.
func checkPolicy(t *testing.T, root *html.Node) {
	t.Helper()
	for _, n := range all(root) {
		for _, a := range n.Attr {
			if strings.HasPrefix(a.Key, "on") || a.Key == "style" {
				t.Errorf("%s has the attribute %s", n.Data, a.Key)
			}
			if a.Key == "href" || a.Key == "src" || a.Key == "action" || a.Key == "formaction" {
				if u, err := url.Parse(a.Val); err != nil || u.Scheme != "" || u.Host != "" || a.Val == "" || strings.HasPrefix(a.Val, "//") || strings.HasPrefix(a.Val, `/\`) {
					t.Errorf("%s leads to %q", n.Data, a.Val)
				}
			}
		}
		switch n.Data {
		case "style", "iframe", "object", "embed", "base":
			t.Errorf("an element %s", n.Data)
		case "script":
			if src, _ := attr(n, "src"); !strings.HasPrefix(src, "/static/console.js?v=") || textOf(n) != "" {
				t.Errorf("a script of %q", src)
			}
		}
	}
}

// TestHostile: names and messages that come from registries, images and people are text wherever they are shown.
func TestHostile(t *testing.T) {
	evil := `"><script id="evil">alert(1)</script><img src=x onerror=alert(1)>'{{.}}javascript:alert(1)`
	s := example()
	image := service.Image{Registry: host, Repository: "team/" + evil, Digest: dig("x")}
	o := service.Operation{ID: id(9), Image: image, Tag: evil, By: evil, CancelBy: evil, State: service.Failed, Asked: now, ErrorCode: "EVIL<b>", Message: evil, Worker: evil, Warnings: []string{evil}, Platforms: []string{evil},
		Artifacts: []service.Artifact{{Platform: evil, Subject: digest.Digest("sha256:" + evil), Digest: digest.Digest(evil)}}}
	running := o
	running.ID, running.State, running.Progress = id(8), service.Running, service.Progress{Total: 1, Layers: 1, Platform: evil}
	s.operations = []service.Operation{o, running}
	s.registries[0].NoCatalog = evil
	s.repositories = []service.RepositoryInfo{{Registry: host, Name: image.Repository, Settings: service.Settings{Repository: evil + "*", By: evil, Changed: now, Active: true}}}
	s.settings = []service.Settings{{Registry: host, Repository: evil + "*", By: evil, Changed: now}}
	s.tags = []service.TagInfo{{Name: evil, Digest: digest.Digest(evil)}}
	s.image = service.ImageInfo{Image: image, Tag: evil, MediaType: evil, Last: &o, Platforms: []service.PlatformInfo{{Platform: "linux/" + evil, Digest: digest.Digest(evil),
		Layers:    []service.LayerInfo{{Digest: digest.Digest(evil), MediaType: evil}},
		Referrers: []service.ReferrerInfo{{Digest: digest.Digest(evil), ArtifactType: evil, MediaType: evil, Annotations: map[string]string{evil: evil}}},
		Streaming: &service.StreamingInfo{Artifact: digest.Digest(evil), Profile: evil, Layers: []service.LayerMap{{Source: digest.Digest(evil), TarSize: -5, Hot: []service.Span{{Off: -9, Len: 1 << 62}}}}},
		Starts:    &service.StartsInfo{Nodes: -1, Variants: []service.StartsOfOne{{Artifact: digest.Digest(evil), Profile: evil, Reads: service.StartTimes{Count: 1, Median: -1, P90: 1e300}}}}}}}
	_, as := serve(t, s)
	owner := as("olivia")
	tag := imagePath(host, image.Repository, evil)
	for _, path := range []string{
		registryPath(host), registryPath(host) + "?q=" + url.QueryEscape(evil), repositoryPath(host, image.Repository), tag, tag + "/start", tag + "/referrers", tag + "/delete", "/operations",
		"/operations?state=" + url.QueryEscape(evil) + "&registry=" + url.QueryEscape(evil) + "&repository=" + url.QueryEscape(evil), operationPath(id(9)), operationPath(id(8)),
		"/" + url.PathEscape(evil), registryPath(host) + "?done=" + url.QueryEscape(evil),
	} {
		status, page := owner.get(path)
		checkPage(t, page)
		root := parse(t, page)
		if n := len(all(root, "script")); n != 1 || len(all(root, "img", "b")) != 0 {
			t.Errorf("%s: %d scripts, and elements of somebody else's", path, n)
		}
		if status == http.StatusOK && !strings.Contains(path, "?") && !strings.Contains(textOf(root), "alert(1)") {
			t.Errorf("%s does not show the name", path)
		}
	}
}
