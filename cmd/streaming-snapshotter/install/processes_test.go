package install

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestProxied finds kubelets by what they were started with: the command line counts before the configuration, and a later file of that before an earlier one.
func TestProxied(t *testing.T) {
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
	for _, c := range []struct {
		name string
		args []string
		want string // "" if it does not
	}{
		{"kubelet", []string{"--image-service-endpoint=unix://" + socket}, "--image-service-endpoint"},
		{"k3s", []string{"agent", "--image-service-endpoint", socket}, "--image-service-endpoint"},
		{"kubelet", []string{"--config", dir + "/ours.yaml"}, "imageServiceEndpoint in " + dir + "/ours.yaml"},
		{"/usr/bin/kubelet", []string{"--config=ours.yaml"}, "imageServiceEndpoint in ours.yaml"},
		{"kubelet", []string{"--config=" + dir + "/other.yaml", "--config-dir=" + dir + "/ours"}, "imageServiceEndpoint in " + dir + "/ours/20.conf"},
		{"kubelet", []string{"--config", dir + "/ours.yaml", "--image-service-endpoint", "unix://" + other}, ""},
		{"kubelet", []string{"--config", dir + "/other.yaml"}, ""},
		{"kubelet", []string{"--config", dir + "/none.yaml"}, ""},
		{"other", []string{"--config", dir + "/ours.yaml"}, ""},
	} {
		p := &exec.Cmd{Path: "/bin/sh", Args: append([]string{c.name, "-c", "read line"}, c.args...), Dir: dir}
		in, err := p.StdinPipe()
		if err == nil {
			err = p.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		own := fmt.Sprintf("(process %d) ", p.Process.Pid)
		list := slices.DeleteFunc(proxied(func(s string) bool { return s == socket }), func(s string) bool { return !strings.Contains(s, own) })
		if c.want == "" && len(list) > 0 || c.want != "" && (len(list) != 1 || !strings.HasSuffix(list[0], ", by "+c.want)) {
			t.Errorf("%s %q: got %q, want %q", c.name, c.args, list, c.want)
		}
		io.WriteString(in, "end\n") // it may be gone
		p.Wait()
	}
}
