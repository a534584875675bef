package serve

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// process is a service that runs in the test.
type process struct {
	addr string
	stop func() error
}

func start(t *testing.T, text string) (*process, error) {
	t.Helper()
	c, err := load(t, strings.ReplaceAll("data_dir = 'DATA'\naudit_log = ''\n"+text, "DATA", t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ready, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- Run(ctx, c, Options{Version: "test", Stdout: io.Discard, Log: slog.New(slog.DiscardHandler), Ready: func(a net.Addr) { ready <- a }})
	}()
	p := &process{}
	p.stop = func() error {
		cancel()
		err := <-ended
		ended <- err
		return err
	}
	t.Cleanup(func() { p.stop() })
	select {
	case a := <-ready:
		p.addr = a.String()
		return p, nil
	case err := <-ended:
		ended <- err
		return nil, err
	}
}

func get(t *testing.T, c *http.Client, url, token string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestServe: with TLS and tokens, who may ask for what, and the end in order.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	cert, err := node.MakeCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	const secret = "0123456789abcdefghij"
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", socket.LocalAddr().String())
	p, err := start(t, fmt.Sprintf("listen = '0.0.0.0:0'\nmetrics = '127.0.0.1:0'\n[tls]\ncertificate = %q\nkey = %q\n[[registry]]\nname = '127.0.0.1:1'\n[[token]]\nname = 'x'\nfile = %q\ngrants = [{role = 'reader'}]\n", cert.CertFile, cert.KeyFile, file))
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		t.Fatal(err)
	}
	url := "https://127.0.0.1:" + port
	want(t, socket, "READY=1\nSTATUS=serving at https://"+p.addr)
	ca, err := os.ReadFile(cert.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}, Timeout: time.Minute}
	defer c.CloseIdleConnections()
	for _, x := range []struct {
		path, token string
		status      int
		body        string
	}{
		{"/healthz", "", 200, "ok\n"}, {"/readyz", "", 200, "ok\n"}, {"/metrics", "", 401, ""}, {"/metrics", secret, 200, "streaming_service_ready 1\n"},
		{"/v1/registries", "", 401, ""}, {"/v1/registries", "wrong-wrong-wrong-wrong", 401, ""}, {"/v1/registries", secret, 200, "127.0.0.1:1"},
		{"/hooks/none", secret, 404, ""}, {"/", "", 200, "<form"}, // who is not known is sent to the page to log in
	} {
		if status, body := get(t, c, url+x.path, x.token); status != x.status || !strings.Contains(body, x.body) {
			t.Errorf("GET %s with %q: %d, %s; want %d, %s", x.path, x.token, status, body, x.status, x.body)
		}
	}
	_, text := get(t, c, url+"/metrics", secret)
	if named := regexp.MustCompile(`(?m)^[a-z_]+(\{[a-z]+="[^"]*"\})? [0-9.e+-]+$`).FindAllString(text, -1); len(named) < 15 || len(named) != strings.Count(text, "\n")-strings.Count(text, "# ") {
		t.Errorf("metrics are\n%s", text)
	}
	if err := p.stop(); err != nil {
		t.Errorf("the end: %v", err)
	}
	want(t, socket, "STOPPING=1")
}

func want(t *testing.T, socket *net.UnixConn, text string) {
	t.Helper()
	socket.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 1024)
	if n, err := socket.Read(b); err != nil || string(b[:n]) != text {
		t.Errorf("told %q, %v; want %q", b[:n], err, text)
	}
}

// TestRefusals: what cannot be served says what to do.
func TestRefusals(t *testing.T) {
	const registry = "\n[[registry]]\nname = '127.0.0.1:1'\n"
	for text, want := range map[string]string{
		"":                                  "[[registry]]",
		"listen = '0.0.0.0:0'\n" + registry: "without authentication",
		"listen = '127.0.0.1:0'\n[[webhook]]\nname = 'h'\nkind = 'distribution'\nregistry = '127.0.0.1:1'\n" + registry: "h",
		"listen = '127.0.0.1:0'\n" + registry + "username = 'me'\npassword_file = '/does/not/exist'\n":                  "/does/not/exist",
		"listen = '127.0.0.1:0'\n" + registry + "ca = '/dev/null'\n":                                                    "no certificate in PEM",
	} {
		if p, err := start(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("served %v with\n%s\n%v, want an error with %q", p, text, err, want)
		}
	}
}

// TestSessionKey: it is made once, for the user alone.
func TestSessionKey(t *testing.T) {
	c := Defaults()
	c.Data = filepath.Join(t.TempDir(), "data")
	a, err := sessionKey(c)
	if err != nil || len(a) != 32 {
		t.Fatalf("%d bytes, %v", len(a), err)
	}
	b, err := sessionKey(c)
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("another key at the second start, %v", err)
	}
	if st, err := os.Stat(filepath.Join(c.Data, "session.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestRedacted(t *testing.T) {
	if got, want := redacted("nats://me:secret@a:4222,tls://b:4222,c"), "nats://a:4222,tls://b:4222,c"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestMetricsDocumented: docs/operations.md has every metric.
func TestMetricsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range metricsOf(service.Stats{}, true, "v") {
		if !regexp.MustCompile("`" + m.Name + "(\\{|`)").Match(doc) {
			t.Errorf("docs/operations.md has no %s", m.Name)
		}
	}
}
