package install

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProxied finds kubelets by what they were started with: the command line counts before the configuration, and a later file of that before an earlier one. What others call a kubelet
// is none, and what is no file, or a large one, is not waited for.
func TestProxied(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	const other = "/run/containerd/containerd.sock"
	socket := filepath.Join(dir, "cri.sock")
	write := func(name, endpoint string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), fmt.Appendf(nil, "kind: KubeletConfiguration\nimageServiceEndpoint: %q\n", endpoint), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ours.yaml", "unix://"+socket)
	write("other.yaml", "unix://"+other)
	write("ours/10.conf", "unix://"+other)
	write("ours/20.conf", "unix://"+dir+"//cri.sock")
	write("ours/30.json", "unix://"+other)
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	write("large.yaml", "unix://"+socket)
	if err := os.Truncate(filepath.Join(dir, "large.yaml"), maxConfig+1); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		want string // "" if it does not
		uid  uint32
	}{
		{name: "kubelet", args: []string{"--image-service-endpoint=unix://" + socket}, want: "--image-service-endpoint"},
		{name: "kubelet", args: []string{"--image-service-endpoint=unix://" + socket}, uid: 65534},
		{name: "kubelet", args: []string{"--config", dir + "/pipe"}},
		{name: "kubelet", args: []string{"--config", dir + "/large.yaml"}},
		{name: "kubelet", args: []string{"--config", "/dev/zero"}},
		{name: "k3s", args: []string{"agent", "--image-service-endpoint", socket}, want: "--image-service-endpoint"},
		{name: "kubelet", args: []string{"--config", dir + "/ours.yaml"}, want: "imageServiceEndpoint in " + dir + "/ours.yaml"},
		{name: "/usr/bin/kubelet", args: []string{"--config=ours.yaml"}, want: "imageServiceEndpoint in ours.yaml"},
		{name: "kubelet", args: []string{"--config=" + dir + "/other.yaml", "--config-dir=" + dir + "/ours"}, want: "imageServiceEndpoint in " + dir + "/ours/20.conf"},
		{name: "kubelet", args: []string{"--config", dir + "/ours.yaml", "--image-service-endpoint", "unix://" + other}},
		{name: "kubelet", args: []string{"--config", dir + "/other.yaml"}},
		{name: "kubelet", args: []string{"--config", dir + "/none.yaml"}},
		{name: "other", args: []string{"--config", dir + "/ours.yaml"}},
	} {
		p := &exec.Cmd{Path: "/bin/sh", Args: append([]string{c.name, "-c", "read line"}, c.args...), Dir: dir}
		if c.uid != 0 {
			p.Dir, p.SysProcAttr = "/", &unix.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
		}
		in, err := p.StdinPipe()
		if err == nil {
			err = p.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		own := fmt.Sprintf("(process %d) ", p.Process.Pid)
		list := slices.DeleteFunc(kubeletsAt(func(s string) bool { return s == socket }), func(s string) bool { return !strings.Contains(s, own) })
		if c.want == "" && len(list) > 0 || c.want != "" && (len(list) != 1 || !strings.HasSuffix(list[0], ", by "+c.want)) {
			t.Errorf("%s %q: got %q, want %q", c.name, c.args, list, c.want)
		}
		io.WriteString(in, "end\n") // it may be gone
		p.Wait()
	}
}
