package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// get asks the daemon at address: its socket, or a TCP address.
func get(t *testing.T, network, address, path string) (code int, body string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}}
	resp, err := c.Get("http://daemon" + path)
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

// freeAddress returns a TCP address that nobody listens at.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// The socket gives all, the TCP address what everybody may see. Labels are a few known words, whatever was pulled.
func TestAdmin(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	config := writeConfig(t, root, address)
	tcp := freeAddress(t)
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']\nmetrics = '"+tcp+"'")
	p := serving(t, config, address)
	t.Cleanup(func() { // when the container is unmounted
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
		if _, err := os.Lstat(adminSocket(root)); !os.IsNotExist(err) {
			t.Errorf("the socket: %v, want it gone", err)
		}
	})
	c, _ := streamed(t, connect(t, address), reg.Host()+"/app")
	if err := os.CopyFS(t.TempDir(), os.DirFS(c)); err != nil {
		t.Fatal(err)
	}
	(&reasonNode{root: root, address: address}).pull(t, image(t, reg.Host()+"/plain:v1", false))
	for path, public := range map[string]bool{"/healthz": true, "/readyz": true, "/metrics": true, "/status": false, "/debug/pprof/": false, "/debug/pprof/goroutine?debug=1": false} {
		if code, body := get(t, "unix", adminSocket(root), path); code != http.StatusOK {
			t.Errorf("%s: %d %s", path, code, body)
		}
		want := http.StatusNotFound
		if public {
			want = http.StatusOK
		}
		if code, _ := get(t, "tcp", tcp, path); code != want {
			t.Errorf("%s at %s: %d, want %d", path, tcp, code, want)
		}
	}
	if st, err := os.Stat(adminSocket(root)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	_, text := get(t, "tcp", tcp, "/metrics")
	samples := parseMetrics(t, text)
	for sample, want := range map[string]float64{
		"ready": 1, "safe_mode": 0, "paused": 0, "pulls_streamed_total": 1, `pulls_normal_total{reason="NO_ARTIFACT"}`: 1, `pulls_normal_total{reason="AUTH"}`: 0, "images": 1, "images_mounted": 1,
		`mounts{by="daemon"}`: 1, `mounts{by="files"}`: 0, `registry_hosts{state="ok"}`: 1, "reads_failed_total": 0, "proofs_overdue": 0, "layers_quarantined": 0, "pull_seconds_count": 1, `pull_seconds_bucket{le="+Inf"}`: 1,
	} {
		if got, is := samples[metricPrefix+sample]; !is || got != want {
			t.Errorf("%s is %v, want %v", sample, got, want)
		}
	}
	for _, sample := range []string{`chunks_total{from="on_demand"}`, "registry_requests_total", "registry_received_bytes_total", "cache_bytes", "cache_limit_bytes", "images_bytes", "images_local_bytes", "heap_bytes", "goroutines"} {
		if samples[metricPrefix+sample] <= 0 {
			t.Errorf("%s is %v", sample, samples[metricPrefix+sample])
		}
	}
	if strings.Contains(text, reg.Host()) || strings.Contains(text, "sha256") || strings.Contains(text, "app") {
		t.Errorf("a label names an image or a host:\n%s", text)
	}
	checkDashboard(t, samples)
	command(t, "pause", "--config", config)
	if _, text := get(t, "tcp", tcp, "/metrics"); parseMetrics(t, text)[metricPrefix+"paused"] != 1 {
		t.Errorf("it does not say that it is paused:\n%s", text)
	}
}

var (
	sampleLine = regexp.MustCompile(`^([a-z_]+)(?:\{([a-z]+)="([^"\\]*)"\})? ([-+0-9.eE]+)$`)
	typeLine   = regexp.MustCompile(`^# TYPE ([a-z_]+) (gauge|counter|histogram)$`)
)

// parseMetrics reads the text format strictly: each metric has one HELP and one TYPE, in front of its samples, which are there once.
func parseMetrics(t *testing.T, text string) map[string]float64 {
	t.Helper()
	samples := map[string]float64{}
	types := map[string]string{}
	name, help := "", ""
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if h, ok := strings.CutPrefix(line, "# HELP "); ok {
			help, _, _ = strings.Cut(h, " ")
			continue
		}
		if m := typeLine.FindStringSubmatch(line); m != nil {
			if name = m[1]; types[name] != "" || help != name {
				t.Errorf("metric %s is there twice, or without help", name)
			}
			types[name] = m[2]
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("line %q", line)
			continue
		}
		base := m[1]
		if types[name] == "histogram" {
			base = regexp.MustCompile("_(bucket|sum|count)$").ReplaceAllString(base, "")
		}
		if base != name || (types[name] == "counter") != strings.HasSuffix(name, "_total") || !slices.Contains([]string{"", "version", "reason", "by", "from", "state", "le"}, m[2]) {
			t.Errorf("line %q of metric %s, a %s", line, name, types[name])
		}
		key, _, _ := strings.Cut(line, " ")
		if _, twice := samples[key]; twice {
			t.Errorf("sample %s is there twice", key)
		}
		n, err := strconv.ParseFloat(m[4], 64)
		if err != nil {
			t.Errorf("line %q: %v", line, err)
		}
		samples[key] = n
	}
	return samples
}

// checkDashboard wants each metric that the dashboard and the alerts of docs/operations.md ask for to be there, with the labels that the dashboard asks by.
func checkDashboard(t *testing.T, samples map[string]float64) {
	t.Helper()
	b, err := os.ReadFile("../../deploy/grafana/streaming-snapshotter.json")
	docs, docsErr := os.ReadFile("../../docs/operations.md")
	if err := errors.Join(err, docsErr); err != nil {
		t.Fatal(err)
	}
	b = append(b, docs...)
	have := map[string]bool{}
	for key := range samples {
		name, label, _ := strings.Cut(key, "{")
		label, _, _ = strings.Cut(label, "=")
		have[name], have[name+" "+label] = true, true
	}
	asked := regexp.MustCompile(metricPrefix+`([a-z_]+)(?:\{instance=~\\"\$node\\"(?:,([a-z]+)[!=])?)?`).FindAllStringSubmatch(string(b), -1)
	if len(asked) < 20 {
		t.Fatalf("only %d metrics in the dashboard", len(asked))
	}
	for _, m := range asked {
		name := metricPrefix + m[1]
		if !have[name] || m[2] != "" && !have[name+" "+m[2]] {
			t.Errorf("the dashboard asks for %s by %q, which is not there", name, m[2])
		}
	}
	for _, m := range regexp.MustCompile(`sum by \(([a-z]+)\) \([a-z]*\(?`+metricPrefix+`([a-z_]+)`).FindAllStringSubmatch(string(b), -1) {
		if m[1] != "instance" && !have[metricPrefix+m[2]+" "+m[1]] {
			t.Errorf("the dashboard asks for %s by %s, which it has not", m[2], m[1])
		}
	}
}

// Metrics, for which everybody may ask, do not walk over the cache's files each time. Whoever asks for the status has all as it is.
func TestWalks(t *testing.T) {
	root := t.TempDir()
	var k walks
	a := &admin{ask: func(age time.Duration) status {
		return status{CacheBytes: k.get(root, &node{}, &pulls{}, age).cacheBytes}
	}}
	ask := func(path string) string {
		w := httptest.NewRecorder()
		a.private().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Body.String()
	}
	bytesOf := func(text string) float64 { return parseMetrics(t, text)[metricPrefix+"cache_bytes"] }
	before := bytesOf(ask("/metrics"))
	if err := os.Mkdir(filepath.Join(root, "cache"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "cache", "more"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	k.at = time.Now().Add(time.Minute) // the walk was a moment ago, however long this took
	if after := bytesOf(ask("/metrics")); before != 0 || after != before {
		t.Errorf("%v bytes, and after a moment %v", before, after)
	}
	if s := ask("/status"); strings.Contains(s, `"cache_bytes":0,`) {
		t.Errorf("status: %s", s)
	}
	k.last.cacheBytes, k.at = 0, time.Now().Add(-maxAge)
	if after := bytesOf(ask("/metrics")); after < 1<<20 {
		t.Errorf("%v bytes after a while", after)
	}
}

// In safe mode the daemon is alive and not ready.
func TestAdminInSafeMode(t *testing.T) {
	n := newReasonNode(t, "", maxFailedStarts)
	askStatus(t, n.config, func(status) bool { return true }) // it answers
	if code, body := get(t, "unix", adminSocket(n.root), "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "safe mode: ") {
		t.Errorf("readyz: %d %s", code, body)
	}
	if code, body := get(t, "unix", adminSocket(n.root), "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d %s", code, body)
	}
	_, text := get(t, "unix", adminSocket(n.root), "/metrics")
	if s := parseMetrics(t, text); s[metricPrefix+"ready"] != 0 || s[metricPrefix+"safe_mode"] != 1 {
		t.Errorf("metrics:\n%s", text)
	}
	n.daemon.signal(unix.SIGTERM)
	if err := n.daemon.wait(); err != nil {
		t.Errorf("%v\n%s", err, &n.daemon.stderr)
	}
}

// An address for metrics that is taken does not keep the daemon from serving containerd, nor the socket from answering.
func TestMetricsAddressTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	address := filepath.Join(dir, "s.sock")
	config := writeConfig(t, filepath.Join(dir, "root"), address)
	addConfig(t, config, fmt.Sprintf("metrics = %q", l.Addr()))
	p := serving(t, config, address)
	s := askStatus(t, config, func(s status) bool { return len(s.Problems) > 0 })
	if !strings.Contains(s.Problems[0], "address already in use") {
		t.Errorf("problems: %q", s.Problems)
	}
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
}

// The TCP address takes so many connections at a time, and one more when one of them ends.
func TestPublic(t *testing.T) {
	if s := publicServer(nil); s.ReadTimeout <= 0 || s.WriteTimeout <= 0 || s.IdleTimeout <= 0 {
		t.Errorf("it waits without end: %+v", s)
	}
	tcp := freeAddress(t)
	stop, err := (&admin{}).serve(t.TempDir(), tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	connect := func() (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", tcp)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c, bufio.NewReader(c)
	}
	ask := func(c net.Conn, r *bufio.Reader) {
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: daemon\r\n\r\n"); err != nil {
			t.Error(err)
			return
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		io.Copy(io.Discard, resp.Body)
	}
	var first net.Conn
	var of *bufio.Reader
	for range maxPublic {
		first, of = connect()
		ask(first, of)
	}
	more, ofMore := connect()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		ask(more, ofMore)
	}()
	for range 200 { // in which the other would be answered
		ask(first, of)
	}
	select {
	case <-answered:
		t.Errorf("connection %d is answered beside the others", maxPublic+1)
	default:
	}
	first.Close()
	<-answered
}
