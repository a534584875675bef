package main

import (
	"bufio"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// A proxy that containerd has and the daemon has not is a trap, however it is written; no value of it is shown.
func TestCheckProxies(t *testing.T) {
	run := func(env ...string) int {
		c := exec.Command("sleep", "infinity")
		c.Env = append(env, "PATH=/usr/bin:/bin")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.Process.Kill()
			c.Wait()
		})
		return c.Process.Pid
	}
	none, upper, lower, empty := run("NO_PROXY=x"), run("HTTPS_PROXY=http://me:secret@p", "HTTP_PROXY=http://p"), run("https_proxy=http://p", "http_proxy=http://p"), run("HTTPS_PROXY=")
	for _, c := range []struct {
		containerd, daemon int
		trap               bool
	}{{none, none, false}, {none, upper, false}, {upper, lower, false}, {upper, none, true}, {lower, empty, true}, {empty, none, false}, {upper, 0, false}, {0, upper, false}} {
		var r checkReport
		r.checkProxies(c.containerd, c.daemon)
		if len(r.Unknown) > 0 || slices.ContainsFunc(r.Traps, func(t traps.Trap) bool { return t.Code == noHTTPProxy && !strings.Contains(t.Text+t.Remedy, "secret") }) != c.trap {
			t.Errorf("%+v: traps %+v, unknown %q", c, r.Traps, r.Unknown)
		}
	}
}

// Registries are asked through the proxy of the environment.
func TestHTTPProxy(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(asked)
				return
			}
			if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				asked <- r.Method + " " + r.Host
			}
			c.Write([]byte("HTTP/1.1 403 Forbidden\r\n\r\n"))
			c.Close()
		}
	}()
	t.Setenv("HTTPS_PROXY", "http://"+l.Addr().String())
	t.Setenv("NO_PROXY", "")
	root := filepath.Join(t.TempDir(), "root")
	config := writeConfig(t, root, root+".sock")
	addConfig(t, config, "stream = ['registry.example.com/*']\nresolve_timeout = '2s'\ndocker_config = false")
	p := start(t, "check", "--config", config, "--containerd", root+".none", "registry.example.com/team/app:v1")
	p.wait()
	l.Close()
	n := 0
	for got := range asked {
		if n++; got != "CONNECT registry.example.com:443" {
			t.Errorf("the proxy is asked for %s", got)
		}
	}
	if n == 0 {
		t.Errorf("the proxy is not asked\n%s", &p.stderr)
	}
}
