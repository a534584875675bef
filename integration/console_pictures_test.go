package integration_test

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/console"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// startConsoleOf runs a console in this process, for a registry under a name that pictures are to show: for a process of its own that would be another host.
func startConsoleOf(t *testing.T, registry *registrytest.Registry, name string) *consoleOf {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	nats, err := embedded.Start(t.Context(), tempDir(t), log)
	if err != nil {
		t.Fatal(err)
	}
	served := service.NewRegistry(registry.Host(), converter.RegistryOptions{}, 0)
	served.Name = name
	s, err := service.New(t.Context(), service.Config{
		Conn: nats.Conn, Sole: true, Name: "worker-1", Registries: []service.Registry{served},
		Convert: converter.Options{TempDir: tempDir(t)}, Static: true, Reconcile: time.Hour, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	var tokens []access.Token
	for name, role := range consoleRoles {
		tokens = append(tokens, access.Token{Name: name, SHA256: sumOf(name), Grants: []access.Grant{{Role: role}}})
	}
	gate, err := access.New(access.Config{Tokens: tokens})
	if err != nil {
		t.Fatal(err)
	}
	closing := make(chan struct{})
	page, err := console.New(console.Config{Service: s, Gate: gate, Version: "v1.0.0", Closing: closing, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(gate.Browser(page, page.Login))
	t.Cleanup(func() {
		close(closing)
		server.Close()
		cancel()
		running.Wait()
		if err := nats.Close(); err != nil {
			t.Error(err)
		}
	})
	return &consoleOf{s, registry, served.Name, server.URL, s.Report}
}

// drawPictures writes the pictures of docs/console.md, of a registry whose images are interesting to look at.
func drawPictures(t *testing.T, dir string) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const host = "registry.example.com"
	c := startConsoleOf(t, startRegistry(t, registrytest.Options{}), host)
	b := startBrowser(t, c.url)
	nginx, err := ociimage.Built("nginx")
	if err != nil {
		t.Fatal(err)
	}
	var image service.Image
	for _, tag := range []string{"1.22.0", "1.22.1", "1.22.2"} {
		image = c.push(t, "shop/nginx", tag, nginx)
	}
	for i, repository := range []string{"shop/cart", "shop/checkout", "shop/frontend", "lib/base", "team/tools"} {
		c.push(t, repository, "v1.4.0", small(t, uint64(10+i)))
	}
	for _, s := range []service.Settings{{Repository: "shop/*", Active: true}, {Repository: "shop/cart"}, {Repository: "lib/base", Active: true}} {
		s.Registry, s.By = host, "olivia"
		if _, err := c.SetSettings(t.Context(), s, false); err != nil {
			t.Fatal(err)
		}
	}
	submit := func(i service.Image, tag string) service.Operation {
		o, _, err := c.Submit(t.Context(), service.Request{Image: i, Tag: tag, By: "olivia"})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	done := c.ended(t, submit(image, "1.22.2"))
	if done.State != service.Succeeded {
		t.Fatalf("operation is %+v", done)
	}
	for n := range 240 { // as a fleet would, before and after the image had its profile
		spread := float64(n*n%97) / 97
		c.report(t, done, n, "none", 2.6+3*spread*spread)
		if n%2 == 0 {
			c.report(t, done, n, "static", 0.9+1.4*spread*spread)
		}
	}
	img := small(t, 9)
	checkout := c.push(t, "shop/checkout", "v1.5.0", img)
	release := c.hold(t, img)
	going := submit(checkout, "v1.5.0")
	b.signIn("olivia")
	registry := "/registries/" + host
	for _, p := range []struct {
		name, path, waits, scheme string
		width, height             int64
	}{
		{"repositories", registry, "", "light", 1200, 820},
		{"repository", registry + "/shop/nginx", "", "light", 1200, 820},
		{"image", registry + "/shop/nginx/-/image/1.22.2", "", "dark", 1200, 900},
		{"start", registry + "/shop/nginx/-/image/1.22.2/start", "", "light", 1200, 900},
		{"start-dark", registry + "/shop/nginx/-/image/1.22.2/start", "", "dark", 1200, 900},
		{"times", registry + "/shop/nginx/-/image/1.22.2/start#platform-1-times", "", "light", 1200, 560},
		{"progress", "/operations/" + going.ID, `document.querySelector("progress").value > 0`, "light", 1200, 640},
		{"narrow", registry + "/shop/checkout/-/image/v1.5.0", `document.querySelector("progress").value > 0`, "dark", 390, 844},
		{"narrow-start", registry + "/shop/nginx/-/image/1.22.2/start", "", "light", 390, 844},
		{"operations", "/operations", "", "dark", 1200, 560},
		{"settings", registry + "/-/settings?repository=shop/nginx", "", "light", 1200, 900},
		{"delete", registry + "/shop/nginx/-/image/1.22.2/delete", "", "light", 1200, 560},
		{"referrers", registry + "/shop/nginx/-/image/1.22.2/referrers", "", "light", 1200, 640},
		{"error", "/nowhere", "", "light", 1200, 560},
	} {
		b.look(p.scheme, p.width, p.height)
		b.open(p.path)
		b.moveAway()
		if p.waits != "" {
			b.wait(p.waits)
		}
		b.draw(filepath.Join(dir, p.name+".png"))
	}
	release()
}

// draw writes a picture of what is shown.
func (b *browser) draw(file string) {
	b.t.Helper()
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(file, png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}
