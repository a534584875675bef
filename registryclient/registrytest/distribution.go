package registrytest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Distribution says how Debian's docker-registry runs: the CNCF's distribution 2.8, which has no referrers API.
type Distribution struct {
	Deletes       bool   // manifests can be deleted
	Notify        string // URL that it tells of pushes and deletions; "" is none
	Authorization string // header of what it sends there
}

// StartDistribution runs docker-registry until the test ends, and returns its host. Without it the test is skipped.
func StartDistribution(t *testing.T, d Distribution) string {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (apt-get install docker-registry)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	text := fmt.Sprintf(`version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: %v}}
http: {addr: "%s"}
`, dir, d.Deletes, host)
	if d.Notify != "" {
		text += fmt.Sprintf("notifications: {endpoints: [{name: test, url: %q, headers: {Authorization: [%q]}, timeout: 10s, threshold: 1, backoff: 100ms}]}\n", d.Notify, d.Authorization)
	}
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(bin, "serve", config)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
	})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if resp, err := http.Get("http://" + host + "/v2/"); err == nil {
			resp.Body.Close()
			return host
		}
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("docker-registry: %v\n%s", err, out.String())
		case <-ctx.Done():
			t.Fatal("docker-registry does not answer")
		case <-tick.C:
		}
	}
}
