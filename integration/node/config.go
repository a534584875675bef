package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Root returns the directory of this module, from the working directory upwards.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "deploy/containerd")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("not in a checkout of streaming-snapshotter")
}

// containerdConfig is what a node in a directory needs and deploy/containerd does not say. The placeholders are DIR, PAUSE and PLUGINS, which is where CNI's are.
// restrict_oom_score_adj is for machines where root lacks CAP_SYS_RESOURCE.
const containerdConfig = `version = 3
root = "DIR/c"
state = "DIR/run/c"
imports = ["DIR/conf.d/*.toml"]
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile"]

[grpc]
  address = "DIR/run/c.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "DIR/opt"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "PAUSE"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "DIR/certs.d"
[plugins.'io.containerd.transfer.v1.local']
  config_path = "DIR/certs.d"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["PLUGINS"]
  conf_dir = "DIR/cni"
  use_internal_loopback = true
`

// containerdConfig17 is containerdConfig for containerd 1.7.
const containerdConfig17 = `version = 2
root = "DIR/c"
state = "DIR/run/c"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile"]

[grpc]
  address = "DIR/run/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "DIR/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "DIR/cni"
    conf_dir = "DIR/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "DIR/certs.d"
`

const snapshotterConfig = `address = "DIR/run/s.sock"
cri_containerd = "DIR/run/c.sock"
root = "DIR/s"
hosts_dir = "DIR/certs.d"
mount_mode = %q
stream = [%s]
log_level = "debug"
%s
`

const crictlConfig = `runtime-endpoint: unix://DIR/run/c.sock
image-endpoint: unix://DIR/run/c.sock
timeout: 300
`

func (n *Node) writeConfigs() error {
	var stream []string
	for _, s := range n.o.Stream {
		stream = append(stream, fmt.Sprintf("%q", s))
	}
	plugins := "DIR/cni"
	if n.o.Kubelet != nil {
		dir, err := KubernetesDir()
		if err != nil {
			return err
		}
		plugins = dir
	}
	files := map[string]string{
		"containerd.toml":  strings.NewReplacer("PAUSE", n.o.Pause, "PLUGINS", plugins).Replace(containerdConfig),
		"snapshotter.toml": fmt.Sprintf(snapshotterConfig, n.o.Mode, strings.Join(stream, ", "), n.o.Config),
		"crictl.yaml":      crictlConfig,
	}
	if n.o.Kubelet != nil {
		files["cni/pods.conflist"] = PodNetwork
	}
	if n.o.Pull != Plain {
		root, err := Root()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(root, "deploy/containerd", string(n.o.Pull)+".toml"))
		if err != nil {
			return err
		}
		dropIn := strings.NewReplacer(
			"/run/streaming-snapshotter/snapshotter.sock", "DIR/run/s.sock",
			"/var/lib/streaming-snapshotter", "DIR/s",
			`snapshotter = "`+Snapshotter+`"`, `snapshotter = "`+n.Snapshotter()+`"`,
			"proxy_plugins."+Snapshotter, "proxy_plugins."+n.Snapshotter(),
		).Replace(string(b))
		if n.o.Pull == Old { // whose drop-ins replace CRI's settings as a whole
			files["containerd.toml"] = strings.ReplaceAll(containerdConfig17, "PAUSE", n.o.Pause) + dropIn
		} else {
			files["conf.d/streaming-snapshotter.toml"] = dropIn
		}
	}
	for name, text := range files {
		if err := os.WriteFile(n.path(name), []byte(strings.ReplaceAll(text, "DIR", n.Dir)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func dial(socket string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	return c.Close()
}
