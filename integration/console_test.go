package integration_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
	wire "github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// screenshots is where TestConsole writes pictures of the pages, for docs/console.md, if it is to.
var screenshots = flag.String("screenshots", "", "write pictures of the console into this directory")

// consoleOf is a conversion service with its console, for one registry.
type consoleOf struct {
	asked
	registry *registrytest.Registry
	name     string // of the registry
	url      string
	start    func(ctx context.Context, registry, repository string, r wire.Report) (service.Reported, error) // has it told of a start
}

// asked is what a test asks the service itself, beside the pages.
type asked interface {
	Resolve(ctx context.Context, registry, repository, ref string) (service.Image, error)
	Image(ctx context.Context, registry, repository, ref string) (service.ImageInfo, error)
	Last(ctx context.Context, i service.Image) (service.Operation, error)
	Submit(ctx context.Context, r service.Request) (op service.Operation, existed bool, err error)
	Settings(ctx context.Context, registry, repository string) (service.Settings, error)
	SetSettings(ctx context.Context, s service.Settings, existing bool) (service.Settings, error)
}

// tokenOf is what somebody signs in with.
func tokenOf(name string) string { return "the token of " + name + ", whole" }

// sumOf is what the configuration has of it.
func sumOf(name string) string {
	sum := sha256.Sum256([]byte(tokenOf(name)))
	return hex.EncodeToString(sum[:])
}

// consoleRoles are those of the people of the tests.
var consoleRoles = map[string]access.Role{"olivia": access.Owner, "rita": access.Reader}

// startConsole runs `streamctl serve` until the test ends, and asks it as olivia.
func startConsole(t *testing.T) *consoleOf {
	t.Helper()
	registry := startRegistry(t, registrytest.Options{})
	more := "[times]\nreconcile = '1h'\n"
	for name, role := range consoleRoles {
		more += fmt.Sprintf("[[token]]\nname = %q\nsha256 = %q\ngrants = [{ role = %q }]\n", name, sumOf(name), role)
	}
	s := startService(t, registry.Host(), more)
	url := "http://" + s.addr
	olivia, err := client.New(client.Config{Server: url, Timeout: 20 * time.Second, Token: func() (string, error) { return tokenOf("olivia"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	return &consoleOf{olivia, registry, registry.Host(), url, func(ctx context.Context, registry, repository string, r wire.Report) (got service.Reported, err error) {
		return got, tellOfStart(ctx, url+"/v1/registries/"+registry+"/repositories/"+repository+"/_starts", r, &got)
	}}
}

// tellOfStart posts a report, as nodes do.
func tellOfStart(ctx context.Context, url string, r wire.Report, got *service.Reported) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+tokenOf("olivia"))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(got)
}

// push pushes an image, and returns it as the service names it.
func (c *consoleOf) push(t *testing.T, repository, tag string, img v1.Image) service.Image {
	t.Helper()
	if err := ociimage.Push(t.Context(), img, c.registry.Host()+"/"+repository+":"+tag); err != nil {
		t.Fatal(err)
	}
	image, err := c.Resolve(t.Context(), c.name, repository, tag)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// hold lets half of the image's largest layer through, and the rest when release is called.
func (c *consoleOf) hold(t *testing.T, img v1.Image) (release func()) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var name string
	var size int64
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if n, err := l.Size(); err != nil {
			t.Fatal(err)
		} else if n > size {
			name, size = d.String(), n
		}
	}
	open := make(chan struct{})
	remove := c.registry.Inject(func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+name)
	}, -1,
		func(_ *registrytest.Registry, next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(&held{w, r, size / 2, open}, r) })
		})
	release = sync.OnceFunc(func() { remove(); close(open) })
	t.Cleanup(release)
	return release
}

// held is an answer of which left bytes go at once, and the rest when open is closed.
type held struct {
	http.ResponseWriter
	r    *http.Request
	left int64
	open chan struct{}
}

func (h *held) Write(p []byte) (n int, err error) {
	if n = int(min(h.left, int64(len(p)))); n > 0 {
		if n, err = h.ResponseWriter.Write(p[:n]); err != nil {
			return n, err
		}
		h.left -= int64(n)
		http.NewResponseController(h.ResponseWriter).Flush()
	}
	if n == len(p) {
		return n, nil
	}
	select {
	case <-h.open:
	case <-h.r.Context().Done():
		return n, http.ErrAbortHandler
	}
	m, err := h.ResponseWriter.Write(p[n:])
	return n + m, err
}

// artifacts is how many platforms of an image stream, as the registry has it.
func (c *consoleOf) artifacts(t *testing.T, i service.Image) (n int) {
	t.Helper()
	info, err := c.Image(t.Context(), i.Registry, i.Repository, i.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range info.Platforms {
		if p.Streaming != nil {
			n++
		}
	}
	return n
}

// report has a node report a start of the image that an operation has converted.
func (c *consoleOf) report(t *testing.T, op service.Operation, node int, profile string, reads float64) {
	t.Helper()
	a := op.Artifacts[0]
	r := wire.Report{Node: fmt.Sprintf("%032x", node), Starts: []wire.Start{{
		Manifest: a.Subject, Artifact: a.Digest, Profile: profile, Pull: 0.2, Reads: reads, Bytes: 40e6, Missed: int64(reads * 1e6), Misses: 9,
	}}}
	if got, err := c.start(t.Context(), op.Registry, op.Repository, r); err != nil || got.Counted != 1 {
		t.Fatalf("report: %+v, %v", got, err)
	}
}

func (c *consoleOf) last(t *testing.T, i service.Image) service.Operation {
	t.Helper()
	o, err := c.Last(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// ended waits for the end of an operation, which is the last of its image.
func (c *consoleOf) ended(t *testing.T, o service.Operation) service.Operation {
	t.Helper()
	id := o.ID
	within(t, time.Minute, "operation "+id+" ends", func() bool {
		o = c.last(t, o.Image)
		return o.ID != id || o.State.Ended()
	})
	return o
}

// signIn fills in the form.
func (b *browser) signIn(name string) {
	b.t.Helper()
	b.open("/login")
	b.enter("#token", tokenOf(name))
	b.click("main form button")
	b.shows("Repositories")
}

// small is the image that the tests convert.
func small(t *testing.T, seed uint64) v1.Image {
	t.Helper()
	g, err := guest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := ociimage.Small(tempDir(t), g, seed)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestConsole uses the console in a real Chromium, as people do: with the mouse, with the keyboard, and without scripts; and has an
// accessibility checker look at each page, light and dark, wide and narrow.
func TestConsole(t *testing.T) {
	axe := axeScript(t)
	c := startConsole(t)
	b := startBrowser(t, c.url)
	img := small(t, 1)
	image := c.push(t, "shop/app", "v1", img)
	for _, tag := range []string{"v2", "v3"} {
		c.push(t, "shop/app", tag, img)
	}
	c.push(t, "lib/base", "latest", small(t, 2))
	registry := "/registries/" + c.name
	// What was converted once is not converted again, but taken from the record: who holds a layer up needs an image of their own.
	keys, plain := small(t, 4), small(t, 5)
	keysImage := c.push(t, "shop/keys", "v1", keys)
	c.push(t, "shop/plain", "v1", plain)
	page := registry + "/shop/plain/-/image/v1"

	b.open("/")
	b.at("/login?next=%2F")
	b.accessible(axe, "", "signing in")
	b.signIn("olivia")
	b.at(registry)
	t.Run("mouse", func(t *testing.T) { withMouse(t, c, b, img, image, registry) })
	t.Run("keyboard", func(t *testing.T) { withKeyboard(t, c, b, keys, keysImage, registry) })
	t.Run("accessible", func(t *testing.T) { checkAccessible(t, c, b, axe, image, registry) })
	t.Run("without scripts", func(t *testing.T) {
		b.t = t
		b.scripts(false)
		defer b.scripts(true)
		release := c.hold(t, plain)
		b.open(page)
		b.click(".head form button.primary")
		b.shows("Running")
		release()
		b.shows("Streaming") // the page reloads itself
		b.wait(`!document.querySelector("noscript meta")`)
	})
	if *screenshots != "" {
		t.Run("pictures", func(t *testing.T) { drawPictures(t, *screenshots) })
	}
	t.Run("reader", func(t *testing.T) {
		b.t = t
		b.open(registry)
		b.click(".who button")
		b.at("/login")
		b.signIn("rita")
		b.open(page)
		b.shows("Essentials")
		b.wait(`document.querySelectorAll("main form[method=post]").length === 0 && !document.querySelector('main a[href$="/delete"]')`)
	})
}

func withMouse(t *testing.T, c *consoleOf, b *browser, img v1.Image, image service.Image, registry string) {
	b.t = t
	b.open(registry)
	b.enter("#q", "op/ap")
	b.click(".filter button")
	b.at(registry + "?q=op%2Fap")
	b.wait(`document.querySelectorAll("tbody tr").length === 1`)

	b.click("[role=switch]")
	b.shows("Artifact streaming is active")
	b.wait(`document.activeElement.matches("[role=switch][aria-checked=true]")`)
	if s, err := c.Settings(t.Context(), image.Registry, image.Repository); err != nil || !s.Active || s.By != "olivia" {
		t.Errorf("settings are %+v, %v", s, err)
	}
	b.click("[role=switch]")
	b.shows("Artifact streaming is inactive")
	if s, err := c.Settings(t.Context(), image.Registry, image.Repository); err != nil || s.Active {
		t.Errorf("settings are %+v, %v", s, err)
	}
	b.click("tbody th a")
	b.shows("Tags 3")
	b.click(`tbody th a[href$="/v1"]`)
	b.shows("Create streaming artifact")

	// Create, watch, and cancel: the page changes by itself.
	release := c.hold(t, img)
	b.click(".head form button.primary")
	b.shows("Running")
	b.text(`window.stays = "yes"`)
	b.wait(`document.querySelector("progress")?.value > 0`)
	if o := c.last(t, image); o.By != "olivia" || o.Tag != "v1" || o.State != service.Running {
		t.Errorf("operation is %+v", o)
	}
	b.click("#cancel")
	b.shows("Not streaming")
	b.wait(`!document.querySelector("progress")`)
	release()
	if o := c.last(t, image); o.State != service.Canceled || o.CancelBy != "olivia" || c.artifacts(t, image) != 0 {
		t.Errorf("operation is %+v, with %d artifacts", o, c.artifacts(t, image))
	}

	release = c.hold(t, img)
	b.click(".head form button.primary")
	b.shows("Running")
	b.text(`window.stays = "yes"`)
	release()
	b.wait(`document.querySelector(".head .badge")?.innerText === "Streaming"`)
	if b.text(`String(window.stays)`) != "yes" {
		t.Error("the page was loaded again")
	}
	if n := c.artifacts(t, image); n != 1 {
		t.Errorf("%d artifacts", n)
	}
	b.click(`.tabs a[href$="/start"]`)
	b.shows("A start reads")
	b.wait(`document.querySelectorAll("svg[role=img] [class^=heat]").length > 0`)
	b.click(`.tabs a[href$="/referrers"]`)
	b.shows("Streaming artifact")

	b.click(`a[href$="/delete"]`)
	b.shows("This cannot be undone")
	if n := c.artifacts(t, image); n != 1 {
		t.Errorf("%d artifacts before it is confirmed", n)
	}
	b.click("#delete")
	b.shows("The streaming artifacts of this image are deleted")
	if n := c.artifacts(t, image); n != 0 {
		t.Errorf("%d artifacts are left", n)
	}
}

func withKeyboard(t *testing.T, c *consoleOf, b *browser, img v1.Image, image service.Image, registry string) {
	b.t = t
	b.open(registry)
	b.tabTo(".skip")
	b.press("\r")
	b.wait(`document.activeElement.id === "main"`)
	b.tabTo("#q")
	b.press("keys\r")
	b.at(registry + "?q=keys")
	b.tabTo("[role=switch]")
	b.press(" ")
	b.shows("Artifact streaming is active")
	b.wait(`document.activeElement.matches("[role=switch][aria-checked=true]")`)
	b.press(" ")
	b.shows("Artifact streaming is inactive")

	// No traps: the focus goes through the page, and out of it.
	b.open(registry + "/shop/keys")
	seen := map[string]bool{}
	for range 200 {
		b.press("\t")
		if b.focus() == "none" {
			break
		}
		where := b.text(`String([...document.querySelectorAll("*")].indexOf(document.activeElement))`)
		if seen[where] {
			t.Fatalf("the focus comes back to %s", b.text(`document.activeElement.outerHTML`))
		}
		seen[where] = true
	}
	if b.focus() != "none" || len(seen) < 12 {
		t.Errorf("the focus stays in the page, or goes by what can be used: %d places", len(seen))
	}

	b.tabTo(`tbody th a[href$="/v1"]`)
	b.press("\r")
	b.shows("Create streaming artifact")
	release := c.hold(t, img)
	b.tabTo(".head form button.primary")
	b.press("\r")
	b.shows("Running")
	b.tabTo("#cancel")
	b.press("\r")
	b.wait(`!document.querySelector("progress") && document.readyState === "complete"`)
	if o := c.last(t, image); o.State != service.Canceled {
		t.Errorf("operation is %+v", o)
	}
	release()
	b.tabTo(".head form button.primary")
	b.press(" ")
	b.wait(`document.querySelector(".head .badge")?.innerText === "Streaming"`)
	b.tabTo(".head a.danger")
	b.press("\r")
	b.shows("This cannot be undone")
	b.tabTo("#delete")
	b.press("\r")
	b.shows("The streaming artifacts of this image are deleted")
	if n := c.artifacts(t, image); n != 0 {
		t.Errorf("%d artifacts are left", n)
	}
}

// checkAccessible looks at each page, with everything there is to see on it.
func checkAccessible(t *testing.T, c *consoleOf, b *browser, axe string, image service.Image, registry string) {
	b.t = t
	convert := func(i service.Image, tag string) service.Operation {
		o, _, err := c.Submit(t.Context(), service.Request{Image: i, Tag: tag, By: "olivia"})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	done := convert(image, "v1")
	if done = c.ended(t, done); done.State != service.Succeeded {
		t.Fatalf("operation is %+v", done)
	}
	if _, err := c.SetSettings(t.Context(), service.Settings{Registry: image.Registry, Repository: "shop/*", Active: true, By: "olivia"}, false); err != nil {
		t.Fatal(err)
	}
	for n := range 30 {
		c.report(t, done, n, "none", 3+float64(n)/10)
		c.report(t, done, n, "static", 1+float64(n)/20)
	}
	other := small(t, 3)
	held := c.push(t, "shop/other", "v1", other)
	defer c.hold(t, other)()
	going := convert(held, "v1")
	app := registry + "/shop/app"
	pages := []string{
		registry, registry + "?q=nothing", registry + "/-/settings", registry + "/-/settings?repository=shop/app", app, app + "/-/storage", app + "/-/image/v1", app + "/-/image/v1/start",
		app + "/-/image/v1/referrers", app + "/-/image/v1/delete", registry + "/shop/other/-/image/v1", registry + "/lib/base/-/image/latest/start", "/registries", "/operations",
		"/operations?state=Failed", "/operations/" + done.ID, "/operations/" + going.ID, "/nowhere",
	}
	rules := []string{"", "color-contrast", "none"} // of the looks below: what is so in one look is so in another, apart from these
	if os.Getenv("FULL") != "" {
		rules = []string{"", "", "", ""}
	}
	for i, rule := range rules {
		scheme, width := []string{"light", "dark", "light", "dark"}[i], []int64{1280, 1280, 390, 390}[i]
		b.look(scheme, width, 900)
		for _, path := range pages {
			b.open(path)
			b.accessible(axe, rule, scheme+" "+path)
		}
	}
	b.look("light", 1280, 900)
}
