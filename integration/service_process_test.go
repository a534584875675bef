package integration_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// daemon is a process at a fixed address that can be killed and started again.
type daemon struct {
	t    *testing.T
	name string // of its host, as it sees it
	addr string
	args []string
	up   func(addr string) error // nil once it answers
	cmd  *exec.Cmd
}

// run starts the process, which ends with the test.
func (d *daemon) run() {
	d.t.Helper()
	d.name = fmt.Sprintf("host%x", rand.Uint32())
	d.start()
	d.t.Cleanup(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		if err := d.cmd.Wait(); err != nil {
			d.t.Errorf("%q: %v", d.args, err)
		}
	})
}

func (d *daemon) start() {
	d.t.Helper()
	// On a host of its own, as far as its name goes, which processes of the service have in theirs.
	d.cmd = exec.Command("unshare", append([]string{"--uts", "sh", "-c", `echo "$0" > /proc/sys/kernel/hostname && exec "$@"`, d.name}, d.args...)...)
	d.cmd.Stdout, d.cmd.Stderr = d.t.Output(), d.t.Output()
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// restart kills the process, by SIGKILL, and starts another one.
func (d *daemon) restart() {
	d.t.Helper()
	d.cmd.Process.Kill()
	d.cmd.Wait()
	d.start()
	d.await()
}

func (d *daemon) await() {
	d.t.Helper()
	within(d.t, time.Minute, d.args[0]+" answers", func() bool { return d.up(d.addr) == nil })
}

// address is one that nobody has, and that no connection gets by chance while its process is started again.
func address(t *testing.T) string {
	t.Helper()
	addr, err := node.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// natsProgram builds the NATS server.
var natsProgram = sync.OnceValues(func() (string, error) {
	root, err := node.Root()
	if err != nil {
		return "", err
	}
	program := filepath.Join(os.TempDir(), "nats-server")
	c := exec.Command("go", "build", "-o", program, "github.com/nats-io/nats-server/v2")
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return program, nil
})

// newNATS is a NATS server that does not run yet; more is what its configuration has besides.
func newNATS(t *testing.T, addr, more string) *daemon {
	t.Helper()
	program, err := natsProgram()
	if err != nil {
		t.Fatal(err)
	}
	dir := tempDir(t)
	config := filepath.Join(dir, "nats.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, "server_name: %q\nlisten: %q\njetstream: {store_dir: %q}\n%s", addr, addr, dir, more), 0o600); err != nil {
		t.Fatal(err)
	}
	return &daemon{t: t, addr: addr, args: []string{program, "--config", config}, up: func(addr string) error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	}}
}

// startNATS runs that many NATS servers, several as a cluster.
func startNATS(t *testing.T, n int) (servers []*daemon) {
	t.Helper()
	var routes []string
	for range n {
		routes = append(routes, address(t))
	}
	for i := range n {
		more := ""
		if n > 1 {
			more = fmt.Sprintf("cluster: {name: test, listen: %q, routes: [nats://%s]}\n", routes[i], strings.Join(routes, ", nats://"))
		}
		d := newNATS(t, address(t), more)
		d.run()
		servers = append(servers, d)
	}
	return servers
}

func urls(servers []*daemon) string {
	var list []string
	for _, s := range servers {
		list = append(list, "nats://"+s.addr)
	}
	return strings.Join(list, ",")
}

// serviceDaemon is `streamctl serve`.
type serviceDaemon struct {
	daemon
	client *client.Client
}

// startService runs a process of the service for the registry at host. more is what the configuration has besides, tables.
func startService(t *testing.T, host, more string) *serviceDaemon {
	t.Helper()
	dir := tempDir(t)
	s := &serviceDaemon{daemon: daemon{t: t, addr: address(t), up: ready}}
	config := filepath.Join(dir, "serve.toml")
	text := fmt.Sprintf("listen = %q\ndata_dir = %q\naudit_log = ''\nlog_format = 'json'\n[[registry]]\nname = %q\n%s", s.addr, dir, host, more)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.args = []string{"streamctl", "serve", "--config", config}
	var err error
	if s.client, err = client.New(client.Config{Server: "http://" + s.addr, Timeout: 20 * time.Second}); err != nil {
		t.Fatal(err)
	}
	s.run()
	s.await()
	return s
}

func ready(addr string) error {
	resp, err := http.Get("http://" + addr + "/readyz")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", resp.Status)
	}
	return nil
}
