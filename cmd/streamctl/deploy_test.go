package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"sigs.k8s.io/yaml"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streamctl/serve"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
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
						VolumeMounts                                []struct{ Name, MountPath string }
						Resources                                   struct{ Requests, Limits map[string]string }
						StartupProbe, LivenessProbe, ReadinessProbe struct {
							HTTPGet struct {
								Path string
								Port string
							}
						}
					}
					TerminationGracePeriodSeconds int
					Volumes                       []struct {
						Name      string
						ConfigMap *struct{ Name string }
						EmptyDir  *struct{ SizeLimit string }
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
	for _, probe := range []string{p.StartupProbe.HTTPGet.Port, p.LivenessProbe.HTTPGet.Port, p.ReadinessProbe.HTTPGet.Port} {
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
		if v.EmptyDir != nil && quantity(t, v.EmptyDir.SizeLimit) <= int64(c.Limits.Disk) {
			t.Errorf("layers may have %d bytes, and the pod is evicted at %s", c.Limits.Disk, v.EmptyDir.SizeLimit)
		}
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
	if most := int64(c.Limits.Memory) + serve.BesideMemory; quantity(t, p.Resources.Limits["memory"]) < most+most/8 {
		t.Errorf("Go keeps the process within %d bytes as far as it can, and the pod is killed at %s", most, p.Resources.Limits["memory"])
	}
	if need := c.Times.Drain.D + c.Times.Shutdown.D + c.Times.Lease.D; time.Duration(pod.TerminationGracePeriodSeconds)*time.Second < need {
		t.Errorf("it may take %v to end, and has %d s", need, pod.TerminationGracePeriodSeconds)
	}
	for _, file := range []string{c.NATS.PasswordFile, c.SessionKey, c.TLS.Key, c.TLS.Certificate, c.Tokens[0].File, c.Data, p.Args[1][len("--config="):]} {
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
	var policy struct {
		Spec struct {
			Ingress []struct {
				From []struct {
					PodSelector struct{ MatchLabels map[string]string }
				}
				Ports []struct{ Port int }
			}
		}
	}
	decode(t, "networkpolicy.yaml", &policy)
	if in := policy.Spec.Ingress[0]; in.From[0].PodSelector.MatchLabels["app.kubernetes.io/name"] != deployment || in.Ports[0].Port != 4222 || !strings.HasSuffix(c.NATS.URL, ":4222") {
		t.Errorf("%s is let in by %+v", c.NATS.URL, policy.Spec)
	}
}

// quantity is what Kubernetes calls a quantity of bytes.
func quantity(t *testing.T, s string) int64 {
	t.Helper()
	n, err := tomlfile.ParseSize(s + "B")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestNATSValues: a NATS server with what our values add to its chart's configuration, in which the chart makes << X >> of a string X without quotes, lets in the service, as
// serve.toml has it, and nobody else; and its pods are such as the namespace takes.
func TestNATSValues(t *testing.T) {
	c, err := serve.Load(filepath.Join(deployed, "serve.toml"))
	if err != nil {
		t.Fatal(err)
	}
	type restricted struct {
		AllowPrivilegeEscalation *bool
		Capabilities             struct{ Drop []string }
	}
	var v struct {
		Config struct {
			Cluster struct {
				Enabled  bool
				Replicas int
			}
			Jetstream struct{ Enabled bool }
			Merge     map[string]any
		}
		Container struct {
			Env map[string]struct {
				ValueFrom struct{ SecretKeyRef struct{ Name, Key string } }
			}
			Merge struct{ SecurityContext restricted }
		}
		Reloader struct {
			Merge struct{ SecurityContext restricted }
		}
		PodTemplate struct {
			Merge struct {
				Spec struct {
					SecurityContext struct {
						RunAsNonRoot   bool
						SeccompProfile struct{ Type string }
					}
				}
			}
		}
	}
	decode(t, "nats-values.yaml", &v)
	if !v.Config.Cluster.Enabled || !v.Config.Jetstream.Enabled || v.Config.Cluster.Replicas < 3 {
		t.Errorf("NATS is %+v", v.Config)
	}
	for _, s := range []restricted{v.Container.Merge.SecurityContext, v.Reloader.Merge.SecurityContext} {
		if s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) {
			t.Errorf("not restricted: %+v", s)
		}
	}
	if s := v.PodTemplate.Merge.Spec.SecurityContext; !s.RunAsNonRoot || s.SeccompProfile.Type != "RuntimeDefault" {
		t.Errorf("not restricted: %+v", s)
	}
	merged, err := json.Marshal(v.Config.Merge)
	if err != nil {
		t.Fatal(err)
	}
	merged = regexp.MustCompile(`"\\u003c\\u003c\s+(.*?)\s+\\u003e\\u003e"`).ReplaceAll(merged, []byte("$1"))
	dir := t.TempDir()
	file := filepath.Join(dir, "nats.conf")
	text := fmt.Sprintf("jetstream: {store_dir: %q}\n%s\n", dir, merged[1:len(merged)-1])
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const password = "p0123456789abcdef0123456789abcdef"
	for name := range v.Container.Env {
		t.Setenv(name, password)
	}
	o, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	o.Host, o.Port, o.NoSigs, o.NoLog = "127.0.0.1", -1, true, true
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	defer s.WaitForShutdown()
	defer s.Shutdown()
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("the NATS server does not start")
	}
	for _, who := range [][]nats.Option{nil, {nats.UserInfo(c.NATS.Username, "wrong")}} {
		if conn, err := nats.Connect(s.ClientURL(), who...); err == nil {
			conn.Close()
			t.Error("anybody gets in")
		}
	}
	conn, err := nats.Connect(s.ClientURL(), nats.UserInfo(c.NATS.Username, password))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err == nil {
		_, err = js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "x"})
	}
	if err != nil {
		t.Error(err)
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
