package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streamctl/serve"
)

const deployed = "../../deploy/service"

// accepts says whether a command line is one of ours.
func accepts(t *testing.T, args []string) {
	t.Helper()
	cmd, rest, err := newRoot().Find(args)
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	if err != nil || cmd.RunE == nil || cmd.Flags().NArg() != 0 {
		t.Errorf("streamctl %q: %v", args, err)
	}
}

// TestDeployService: what deploy/service says to this program it takes, its configuration is one, and what its parts name of each other is there.
func TestDeployService(t *testing.T) {
	c, err := serve.Load(filepath.Join(deployed, "serve.toml"))
	if err != nil {
		t.Fatal(err)
	}
	var o struct {
		Resources          []string
		ConfigMapGenerator []struct {
			Name  string
			Files []string
		}
	}
	decode(t, "kustomization.yaml", &o)
	for _, name := range slices.Concat(o.Resources, o.ConfigMapGenerator[0].Files) {
		if _, err := os.Stat(filepath.Join(deployed, name)); err != nil {
			t.Error(err)
		}
	}
	var d struct {
		Metadata struct{ Name string }
		Spec     struct {
			Replicas *int
			Selector struct{ MatchLabels map[string]string }
			Template struct {
				Metadata struct{ Labels, Annotations map[string]string }
				Spec     struct {
					Containers []struct {
						Args  []string
						Env   []struct{ Name, Value string }
						Ports []struct {
							Name          string
							ContainerPort int
						}
						VolumeMounts                  []struct{ Name, MountPath string }
						Resources                     struct{ Requests map[string]string }
						LivenessProbe, ReadinessProbe struct {
							HTTPGet struct {
								Path string
								Port string
							}
						}
					}
					Volumes []struct {
						Name      string
						ConfigMap *struct{ Name string }
					}
				}
			}
		}
	}
	decode(t, "deployment.yaml", &d)
	pod := d.Spec.Template.Spec
	p := pod.Containers[0]
	accepts(t, p.Args)
	var ports []string
	for _, port := range p.Ports {
		ports = append(ports, port.Name)
	}
	if got := []string{c.Listen, c.Metrics}; !slices.Equal(got, []string{":8443", ":9468"}) || p.Ports[0].ContainerPort != 8443 || p.Ports[1].ContainerPort != 9468 {
		t.Errorf("serve.toml listens on %q, the pod on %+v", got, p.Ports)
	}
	for _, probe := range []string{p.LivenessProbe.HTTPGet.Port, p.ReadinessProbe.HTTPGet.Port} {
		if !slices.Contains(ports, probe) {
			t.Errorf("a probe of port %q", probe)
		}
	}
	mounts := map[string]string{}
	for _, m := range p.VolumeMounts {
		mounts[m.Name] = m.MountPath
	}
	for _, v := range pod.Volumes {
		if mounts[v.Name] == "" {
			t.Errorf("volume %s is mounted nowhere", v.Name)
		}
		delete(mounts, v.Name)
		if v.ConfigMap != nil && v.ConfigMap.Name != o.ConfigMapGenerator[0].Name {
			t.Errorf("the configuration is in %s, and %s is made", v.ConfigMap.Name, o.ConfigMapGenerator[0].Name)
		}
	}
	if len(mounts) > 0 {
		t.Errorf("mounts without volumes: %v", mounts)
	}
	for key, value := range d.Spec.Selector.MatchLabels {
		if d.Spec.Template.Metadata.Labels[key] != value {
			t.Errorf("the pods have no label %s=%s", key, value)
		}
	}
	if d.Spec.Replicas != nil || p.Resources.Requests["cpu"] == "" {
		t.Error("the autoscaler says how many pods there are, of the processor time that they request")
	}
	for _, file := range []string{c.SessionKey, c.TLS.Key, c.TLS.Certificate, c.Tokens[0].File, c.Data, p.Args[1][len("--config="):]} {
		if !slices.ContainsFunc(p.VolumeMounts, func(m struct{ Name, MountPath string }) bool { return strings.HasPrefix(file+"/", m.MountPath+"/") }) {
			t.Errorf("%s is in no volume", file)
		}
	}
	checkOthers(t, d.Metadata.Name, ports, c)
}

func checkOthers(t *testing.T, deployment string, ports []string, c serve.Config) {
	t.Helper()
	var h struct {
		Spec struct {
			ScaleTargetRef           struct{ Kind, Name string }
			MinReplicas, MaxReplicas int
		}
	}
	decode(t, "autoscaler.yaml", &h)
	if r := h.Spec.ScaleTargetRef; r.Kind != "Deployment" || r.Name != deployment || h.Spec.MinReplicas < 2 || h.Spec.MaxReplicas <= h.Spec.MinReplicas {
		t.Errorf("the autoscaler is %+v", h.Spec)
	}
	var s struct {
		Spec struct{ Ports []struct{ TargetPort string } }
	}
	decode(t, "service.yaml", &s)
	if !slices.Contains(ports, s.Spec.Ports[0].TargetPort) {
		t.Errorf("the service is %+v", s.Spec)
	}
	var n struct {
		Config struct {
			Cluster struct {
				Enabled  bool
				Replicas int
			}
			Jetstream struct{ Enabled bool }
		}
	}
	decode(t, "nats-values.yaml", &n)
	if !n.Config.Cluster.Enabled || !n.Config.Jetstream.Enabled || n.Config.Cluster.Replicas < c.NATS.Replicas {
		t.Errorf("NATS is %+v, and the service wants %d replicas", n.Config, c.NATS.Replicas)
	}
}

// decode decodes the first document of a file.
func decode(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(deployed, name))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n---\n")
	if err := yaml.Unmarshal([]byte(first), v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// TestUnit: systemd understands the unit, which runs a command of ours with the directories that are the defaults.
func TestUnit(t *testing.T) {
	file := filepath.Join(deployed, "streamctl.service")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/streamctl (.*)$`).FindStringSubmatch(string(b))
	if m == nil {
		t.Fatal("the unit runs something else")
	}
	accepts(t, strings.Fields(m[1]))
	if want := "StateDirectory=" + filepath.Base(serve.Defaults().Data) + "\n"; filepath.Dir(serve.Defaults().Data) != "/var/lib" || !strings.Contains(string(b), want) {
		t.Errorf("the unit has no %q, and data_dir is %s", want, serve.Defaults().Data)
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip(err)
	}
	// It wants the program to be there.
	dir := t.TempDir()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(dir, "streamctl.service")
	if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(b), "/usr/local/bin/streamctl", program)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", unit).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
