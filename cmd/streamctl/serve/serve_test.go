package serve

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/metrics"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/webhook"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// served is a service that runs in the test.
type served struct {
	addr  string
	ready chan net.Addr
	ended chan error // has how it ended
	end   func()     // begins that
}

func start(t *testing.T, text string, change ...func(*Options)) (*served, error) {
	t.Helper()
	c, err := load(t, strings.ReplaceAll("data_dir = 'DATA'\naudit_log = ''\n"+text, "DATA", t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	p := begin(t, c, change...)
	return p, p.await()
}

// begin runs a service that may not be ready for long.
func begin(t *testing.T, c Config, change ...func(*Options)) *served {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	p := &served{ready: make(chan net.Addr, 1), ended: make(chan error, 1), end: cancel}
	o := Options{Version: "test", Stdout: io.Discard, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Ready: func(a net.Addr) { p.ready <- a }}
	for _, f := range change {
		f(&o)
	}
	go func() { p.ended <- Run(ctx, c, o) }()
	t.Cleanup(func() { p.stop() })
	return p
}

// await waits until the service is ready, or has ended.
func (p *served) await() error {
	select {
	case a := <-p.ready:
		p.addr = a.String()
		return nil
	case err := <-p.ended:
		p.ended <- err
		return err
	}
}

func (p *served) stop() error {
	p.end()
	err := <-p.ended
	p.ended <- err
	return err
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
		{"/hooks/none", secret, 405, ""}, {"/", "", 200, "<form"}, // who is not known is sent to the page to log in
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

// TestDrain: while load balancers may still send requests, they are answered, and /readyz says that no more should come.
func TestDrain(t *testing.T) {
	t.Parallel()
	drained := make(chan struct{})
	done := sync.OnceFunc(func() { close(drained) })
	defer done()
	p, err := start(t, "listen = '127.0.0.1:0'\n[times]\ndrain = '1h'\n[[registry]]\nname = '127.0.0.1:1'\n", func(o *Options) { o.drained = drained })
	if err != nil {
		t.Fatal(err)
	}
	p.end()
	if body := asked(t, "http://"+p.addr+"/readyz", 503); !strings.Contains(body, "stopping") {
		t.Error(body)
	}
	if status, body := get(t, http.DefaultClient, "http://"+p.addr+"/v1/registries", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	done()
	if err := p.stop(); err != nil {
		t.Error(err)
	}
}

// TestRenewedCertificate: who renews the certificate replaces the files, at any moment in between the one before is served.
func TestRenewedCertificate(t *testing.T) {
	dir := t.TempDir()
	cert, err := node.MakeCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	other, err := node.MakeCertificate(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p, err := start(t, fmt.Sprintf("listen = '127.0.0.1:0'\n[tls]\ncertificate = %q\nkey = %q\n[[registry]]\nname = '127.0.0.1:1'\n", cert.CertFile, cert.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	served := func() string {
		t.Helper()
		c, err := tls.Dial("tcp", p.addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return string(c.ConnectionState().PeerCertificates[0].Raw)
	}
	first := served()
	for _, pair := range [][2]string{{other.CertFile, cert.CertFile}, {other.KeyFile, cert.KeyFile}} {
		if served() != first {
			t.Error("another certificate before both files are there")
		}
		if err := os.Rename(pair[0], pair[1]); err != nil {
			t.Fatal(err)
		}
	}
	if served() == first {
		t.Error("the old certificate is served")
	}
}

// TestAuditFileMovedAway: the next line begins another file, as with logrotate.
func TestAuditFileMovedAway(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit")
	a, err := openAudit(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for n, line := range []string{"one\n", "two\n"} {
		if n > 0 {
			if err := os.Rename(name, name+".1"); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if _, err := io.WriteString(a, line); err != nil {
				t.Fatal(err)
			}
		}
	}
	for file, want := range map[string]string{name + ".1": "one\none\n", name: "two\ntwo\n"} {
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%s has %q, %v; want %q", file, b, err, want)
		}
	}
}

// TestDeeds: what the service does by itself is in the audit log, under its own name.
func TestDeeds(t *testing.T) {
	var b bytes.Buffer
	gate, err := newGate(Config{Data: t.TempDir()}, &b, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	deeds(gate)(service.Deed{Action: "delete", Image: service.Image{Registry: "r", Repository: "team/app", Digest: "sha256:1"}, Target: "sha256:2", Detail: "gone"})
	if got := b.String(); !strings.Contains(got, `"who":"streamctl","kind":"service","action":"delete","registry":"r","repository":"team/app","target":"sha256:1","outcome":"ok","detail":"sha256:2: gone"}`) {
		t.Error(got)
	}
}

// TestLogFormat: structured as JSON, or as text.
func TestLogFormat(t *testing.T) {
	for format, want := range map[string]string{"json": `"level":"WARN","msg":"x","n":1}`, "text": "level=WARN msg=x n=1"} {
		c, err := load(t, "log_level = 'warn'\nlog_format = '"+format+"'\n")
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		log := c.Log(&b)
		log.Info("not")
		log.Warn("x", "n", 1)
		if !strings.HasSuffix(b.String(), want+"\n") || strings.Count(b.String(), "\n") != 1 {
			t.Errorf("%s: %s", format, &b)
		}
	}
}

// TestPullOnly: what the configuration says of a registry the service knows.
func TestPullOnly(t *testing.T) {
	c, err := load(t, "[[registry]]\nname = 'a.example'\n[[registry]]\nname = 'b.example'\npull_only = true\n")
	if err != nil {
		t.Fatal(err)
	}
	sc, err := serviceConfig(c, Options{})
	if err != nil || sc.Registries[0].PullOnly || !sc.Registries[1].PullOnly {
		t.Errorf("%+v, %v", sc.Registries, err)
	}
}

// TestMemoryThere: the smallest limit of the process's cgroups, of both versions, and in a container, where they are elsewhere.
func TestMemoryThere(t *testing.T) {
	const none = "9223372036854771712\n"
	machine, err := memoryThere("/does/not/exist", "/does/not/exist")
	if err != nil || machine < 1<<20 {
		t.Fatal(machine, err)
	}
	for _, c := range []struct {
		name, list string
		files      map[string]string
		want       int64
	}{
		{"version 2", "0::/a/b\n", map[string]string{"a/b/memory.max": "max\n", "a/memory.max": "4096\n"}, 4096},
		{"the smaller one", "0::/a/b\n", map[string]string{"a/b/memory.max": "2048\n", "a/memory.max": "4096\n"}, 2048},
		{"version 2 in a container", "0::/\n", map[string]string{"memory.max": "8192\n"}, 8192},
		{"version 1", "5:cpu,cpuacct:/c\n4:memory:/a\n", map[string]string{"memory/a/memory.limit_in_bytes": "4096\n", "memory/memory.limit_in_bytes": none}, 4096},
		{"version 1 in a container", "4:memory:/kubepods/x\n", map[string]string{"memory/memory.limit_in_bytes": "8192\n"}, 8192},
		{"none", "0::/a\n", map[string]string{"a/memory.max": "max\n"}, machine},
		{"more than there is", "4:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": none}, machine},
	} {
		dir := t.TempDir()
		c.files["list"] = c.list
		for name, text := range c.files {
			file := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := memoryThere(filepath.Join(dir, "list"), dir); err != nil || got != c.want {
			t.Errorf("%s: %d, %v; want %d", c.name, got, err, c.want)
		}
	}
}

// TestLimitsSettle: what the configuration does not say has a bound all the same.
func TestLimitsSettle(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
	there, err := memoryThere("/proc/self/cgroup", "/sys/fs/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var l limits
	if err := l.settle(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	if got := debug.SetMemoryLimit(-1); int64(l.Memory) != there/2 || l.Disk <= 1 || got != min(there/2+BesideMemory, there/10*9) {
		t.Errorf("%+v, and Go's limit is %d, of %d", l, got, there)
	}
	said := limits{Memory: 1 << 20, Disk: 1 << 20}
	if err := said.settle("/does/not/exist"); err != nil || said.Memory != 1<<20 || said.Disk != 1<<20 {
		t.Errorf("%+v, %v", said, err)
	}
	if got := debug.SetMemoryLimit(-1); got != 1<<20+BesideMemory {
		t.Errorf("Go's limit is %d", got)
	}
	t.Setenv("GOMEMLIMIT", "1GiB")
	debug.SetMemoryLimit(12345678)
	if err := said.settle(""); err != nil || debug.SetMemoryLimit(-1) != 12345678 {
		t.Errorf("GOMEMLIMIT does not count: %v", err)
	}
}

// TestRefusals: what cannot be served says what to do.
func TestRefusals(t *testing.T) {
	const registry = "\n[[registry]]\nname = '127.0.0.1:1'\n"
	for text, want := range map[string]string{
		"":                                  "[[registry]]",
		"listen = '0.0.0.0:0'\n" + registry: "without authentication",
		"listen = '127.0.0.1:0'\n[[webhook]]\nname = 'h'\nkind = 'distribution'\nregistry = '127.0.0.1:1'\nheader = 'X'\nsecret_file = '/does/not/exist'\n" + registry: "webhook h",
		"listen = '127.0.0.1:0'\n" + registry + "username = 'me'\npassword_file = '/does/not/exist'\n":                                                                 "/does/not/exist",
		"listen = '127.0.0.1:0'\n" + registry + "ca = '/dev/null'\n":                                                                                                   "no certificate in PEM",
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

// TestAutoMetrics: that auto-conversion fails can be seen.
func TestAutoMetrics(t *testing.T) {
	var s service.Stats
	s.Auto = service.AutoStats{Events: 1, Due: 2, Deleted: 3, Reconciled: time.Unix(4, 0), ReconcileFailures: map[string]uint64{"b.example": 6, "a.example": 5}}
	var b bytes.Buffer
	if err := metrics.Write(&b, "", metricsOf(s, [len(webhook.Results)]int64{webhook.Refused: 7}, true, "v")); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"events_total 1", "tags_due 2", "artifacts_deleted_total 3", "last_reconcile_timestamp_seconds 4", "reconcile_failures_total{registry=\"a.example\"} 5\nreconcile_failures_total{registry=\"b.example\"} 6",
		"webhook_deliveries_total{result=\"refused\"} 7",
	} {
		if !strings.Contains(b.String(), "\n"+line+"\n") {
			t.Errorf("no %s in\n%s", line, &b)
		}
	}
}

// TestMetricsDocumented: docs/service.md has every metric.
func TestMetricsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/service.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range metricsOf(service.Stats{}, [len(webhook.Results)]int64{}, true, "v") {
		if !regexp.MustCompile("`" + m.Name + "(\\{|`)").Match(doc) {
			t.Errorf("docs/service.md has no %s", m.Name)
		}
	}
}
