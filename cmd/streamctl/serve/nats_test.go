package serve

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// startNATS runs a NATS server until the test ends, or its Shutdown.
func startNATS(t *testing.T, o server.Options) *server.Server {
	t.Helper()
	o.Host, o.NoSigs, o.NoLog = "127.0.0.1", true, true
	if o.Port == 0 {
		o.Port = port(t, free(t))
	}
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("the NATS server does not start")
	}
	return s
}

// external is a configuration with a NATS server outside; more is what it says of that besides.
func external(t *testing.T, url string, more ...string) Config {
	t.Helper()
	c, err := load(t, fmt.Sprintf("data_dir = %q\naudit_log = ''\nlisten = '127.0.0.1:0'\nmetrics = %q\n[[registry]]\nname = '127.0.0.1:1'\n[nats]\nurl = %q\n%s",
		t.TempDir(), free(t), url, strings.Join(more, "")))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// free is an address that nobody has.
func free(t *testing.T) string {
	t.Helper()
	addr, err := node.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func port(t *testing.T, addr string) int {
	t.Helper()
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(p)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// asked asks until there is an answer with that status, and returns it.
func asked(t *testing.T, url string, status int) string {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var resp *http.Response
		if resp, err = http.Get(url); err != nil {
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode == status {
			return string(body)
		}
		err = fmt.Errorf("%s %s", resp.Status, body)
	}
	t.Fatalf("GET %s: %v, want %d", url, err, status)
	return ""
}

// TestNATSAway: a service whose NATS is away lives, says what it waits for, and works when NATS is there, and again after an outage.
func TestNATSAway(t *testing.T) {
	o := server.Options{JetStream: true, StoreDir: t.TempDir(), Port: port(t, free(t))}
	c := external(t, fmt.Sprintf("nats://127.0.0.1:%d", o.Port))
	c.Listen = free(t)
	p := begin(t, c)
	if body := asked(t, "http://"+c.Metrics+"/healthz", 200); body != "ok\n" {
		t.Error(body)
	}
	for _, at := range []string{c.Metrics, c.Listen} {
		if body := asked(t, "http://"+at+"/readyz", 503); !strings.Contains(body, "waits for NATS") {
			t.Error(body)
		}
	}
	if body := asked(t, "http://"+c.Metrics+"/metrics", 200); !strings.Contains(body, "streaming_service_ready 0\n") {
		t.Error(body)
	}
	for _, path := range []string{"/v1/registries", "/", "/hooks/x"} {
		if body := asked(t, "http://"+c.Listen+path, 503); !strings.Contains(body, "waits for NATS") {
			t.Errorf("%s: %s", path, body)
		}
	}
	again := startNATS(t, o)
	if err := p.await(); err != nil {
		t.Fatal(err)
	}
	asked(t, "http://"+c.Metrics+"/readyz", 200)
	asked(t, "http://"+c.Listen+"/v1/registries", 200)
	again.Shutdown()
	again.WaitForShutdown()
	if body := asked(t, "http://"+c.Metrics+"/readyz", 503); strings.Contains(body, "127.0.0.1") {
		t.Errorf("anybody hears %s", body)
	}
	startNATS(t, o)
	asked(t, "http://"+c.Metrics+"/readyz", 200)
	if err := p.stop(); err != nil {
		t.Error(err)
	}
}

// TestStoppedWhileNATSIsAway: that is an end like another.
func TestStoppedWhileNATSIsAway(t *testing.T) {
	c := external(t, "nats://"+free(t))
	p := begin(t, c)
	asked(t, "http://"+c.Metrics+"/healthz", 200)
	if err := p.stop(); err != nil {
		t.Error(err)
	}
}

// TestNATSRefuses: a server that does not know us is an error at once, at the start and later, and with the right credentials, and TLS, it is not.
func TestNATSRefuses(t *testing.T) {
	cert, err := node.MakeCertificate(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert.CertFile, cert.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	o := server.Options{
		JetStream: true, StoreDir: t.TempDir(), Port: port(t, free(t)), Username: "streamctl", Password: "right-0123456789",
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
	}
	nats := startNATS(t, o)
	password := filepath.Join(t.TempDir(), "password")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(password, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := external(t, fmt.Sprintf("tls://127.0.0.1:%d", o.Port))
	c.NATS.Username, c.NATS.PasswordFile, c.NATS.CA = "streamctl", password, cert.CAFile
	if err := begin(t, c).await(); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "password_file") {
		t.Errorf("without the file: %v", err)
	}
	refused := func(p *served) {
		t.Helper()
		if err := p.await(); err == nil || !strings.Contains(err.Error(), "Authorization Violation") || !strings.Contains(err.Error(), c.NATS.URL) {
			t.Errorf("got %v, want an error that says who refuses us", err)
		}
	}
	write("wrong")
	refused(begin(t, c))
	write("right-0123456789")
	p := begin(t, c)
	if err := p.await(); err != nil {
		t.Fatal(err)
	}
	// The password is another after a restart of the server: with the old one the service ends, rather than to try for ever.
	nats.Shutdown()
	nats.WaitForShutdown()
	o.Password = "other-0123456789"
	startNATS(t, o)
	refused(p)
	write("other-0123456789")
	if err := begin(t, c).await(); err != nil {
		t.Error(err)
	}
}

// TestNoJetStream: a server that never can do what we need is an error.
func TestNoJetStream(t *testing.T) {
	nats := startNATS(t, server.Options{})
	if err := begin(t, external(t, nats.ClientURL())).await(); err == nil || !strings.Contains(err.Error(), nats.ClientURL()) {
		t.Error(err)
	}
}

// TestNATSNever: what a server will not do as long as it is configured as it is, is an error at the start, that says of what.
func TestNATSNever(t *testing.T) {
	for _, c := range []struct {
		name, more, want string
		prepare          func(jetstream.JetStream) error
	}{
		{"one server, three replicas", "replicas = 3\n", "non-clustered", func(jetstream.JetStream) error { return nil }},
		{"a stream of others has the subjects", "", "overlap", func(js jetstream.JetStream) error {
			_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "others", Subjects: []string{"streaming.>"}})
			return err
		}},
		{"a stream of others has the name", "", "storage", func(js jetstream.JetStream) error {
			_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "streaming-work", Subjects: []string{"others.>"}, Storage: jetstream.MemoryStorage})
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startNATS(t, server.Options{JetStream: true, StoreDir: t.TempDir()})
			conn, err := nats.Connect(s.ClientURL())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			js, err := jetstream.New(conn)
			if err == nil {
				err = c.prepare(js)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := begin(t, external(t, s.ClientURL(), c.more)).await(); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), s.ClientURL()) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

// TestReplicas: who logs in at one replica is known at the other.
func TestReplicas(t *testing.T) {
	nats := startNATS(t, server.Options{JetStream: true, StoreDir: t.TempDir()})
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(strings.Repeat("k", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	const secret = "0123456789abcdefghij"
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	var replicas []*served
	for range 2 {
		c := external(t, nats.ClientURL())
		c.SessionKey, c.Tokens = key, []token{{Name: "x", File: file, Grants: []grant{{Role: access.Owner}}}}
		p := begin(t, c)
		if err := p.await(); err != nil {
			t.Fatal(err)
		}
		replicas = append(replicas, p)
	}
	jar, err := cookiejar.New(nil) // which heeds no ports
	if err != nil {
		t.Fatal(err)
	}
	c := &http.Client{Jar: jar}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+replicas[0].addr+"/login", strings.NewReader(url.Values{"token": {secret}}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if status, body := get(t, c, "http://"+replicas[1].addr+"/operations", ""); status != 200 || !strings.Contains(body, `title="x"`) {
		t.Errorf("at the other replica: %d %s", status, body)
	}
}
