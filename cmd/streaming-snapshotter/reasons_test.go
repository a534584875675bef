package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// reasonNode is a daemon that streams from the repositories team/* of registries of this machine.
type reasonNode struct {
	root, address, config string
	daemon                *process
	api                   *kubeapitest.Server // of Kubernetes, in which the node is node-1
	ca                    *trusttest.CA       // whom it trusts, where the policy is signed
	notation              string              // its notation_dir
}

// signatureReasons are those of the policy signed.
var signatureReasons = []reason.Code{reason.SignatureMissing, reason.SignatureInvalid, reason.SignatureUntrusted, reason.SignatureExpired, reason.SignatureRevoked, reason.SignatureUnchecked}

func newReasonNode(t *testing.T, code reason.Code, failedStarts int) *reasonNode {
	t.Helper()
	dir := t.TempDir()
	n := &reasonNode{root: filepath.Join(dir, "root"), address: filepath.Join(dir, "s.sock"), api: kubeapitest.Start(t)}
	n.api.Put("namespaces/tenant/events", `{}`)
	n.pods("")
	n.config = writeConfig(t, n.root, n.address)
	policy := ""
	if slices.Contains(signatureReasons, code) {
		n.ca = trusttest.NewCA(t, "authority", trusttest.NewServer(t))
		n.notation = trusttest.NewDir(t, n.ca, trusttest.Statement{Name: "all"})
		policy = fmt.Sprintf("trust_default = 'signed'\nnotation_dir = '%s'\n", n.notation)
	}
	if code == reason.Tampered {
		policy = "trust_default = 'proven'\n"
	}
	addConfig(t, n.config, fmt.Sprintf("stream = ['127.0.0.1:*/team/*']\nresolve_timeout = '2s'\nevents_kubeconfig = %q\nnode_name = 'node-1'\n", n.api.Kubeconfig)+policy+"[[trust]]\nrepositories = ['127.0.0.1:*/team/off/*']\npolicy = 'off'")
	t.Cleanup(func() { unix.Unmount(filepath.Join(n.root, "devices"), unix.MNT_DETACH) })
	if failedStarts > 0 {
		if err := os.Mkdir(n.root, 0o700); err != nil {
			t.Fatal(err)
		}
		for range failedStarts {
			if _, err := readStarts(n.root).begin(); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.daemon = serving(t, n.config, n.address)
	return n
}

// pods has the node be that of one pod, which waits for an image.
func (n *reasonNode) pods(image string) {
	n.api.Put(podsOfNode, fmt.Sprintf(`{"items": [{"metadata": {"namespace": "tenant", "name": "p", "uid": "u"}, "spec": {"containers": [{"name": "c", "image": %q}]}}]}`, image))
}

// event wants the event of a pod that waits for an image to say the reason why that is not streamed.
func (n *reasonNode) event(t *testing.T, code reason.Code, image string) {
	t.Helper()
	for {
		for _, b := range n.api.Await(t) {
			var got struct {
				Reason, Message string
				InvolvedObject  struct{ UID string }
			}
			if err := json.Unmarshal(b, &got); err != nil {
				t.Fatal(err)
			}
			if code == reason.Tampered && got.Reason == "Quarantined" {
				continue // of the artifact
			}
			if got.Reason != "NotStreaming" || got.InvolvedObject.UID != "u" || !strings.HasPrefix(got.Message, fmt.Sprintf("%s: image %q", code, image)) || !strings.HasSuffix(got.Message, code.Remedy()) {
				t.Errorf("the event says %+v", got)
			}
			return
		}
	}
}

// pull begins to pull an image, as containerd does, and wants it to be a normal pull.
func (n *reasonNode) pull(t *testing.T, labels map[string]string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := connect(t, n.address).Prepare(ctx, fmt.Sprint("extract ", labels), "", snapshots.WithLabels(labels)); err != nil {
		t.Errorf("not a normal pull: %v", err)
	}
}

// why is the reason that the status has for the last pull.
func (n *reasonNode) why(t *testing.T) reason.Code {
	t.Helper()
	s := askStatus(t, n.config, func(s status) bool { return len(s.NotStreamed) > 0 })
	last := s.NotStreamed[len(s.NotStreamed)-1]
	if last.Error == "" || last.At == "" || s.Normal[last.Reason] == 0 || s.Streamed != 0 {
		t.Errorf("%+v of %+v", last, s.pullCounts)
	}
	_, text := get(t, "unix", adminSocket(n.root), "/metrics")
	for _, code := range reason.All() {
		want := 0.0
		if code == last.Reason {
			want = 1
		}
		if got := parseMetrics(t, text)[metricPrefix+`pulls_normal_total{reason="`+string(code)+`"}`]; got != want {
			t.Errorf("the metrics have %v pulls with %s, want %v", got, code, want)
		}
	}
	if text := statusText(t, n.config); !strings.Contains(text, string(last.Reason)) || !strings.Contains(text, last.Image) {
		t.Errorf("no %s in\n%s", last.Reason, text)
	}
	return last.Reason
}

// check wants `check` to name the reason why the image of labels is not streamed.
func (n *reasonNode) check(t *testing.T, code reason.Code, labels map[string]string) {
	t.Helper()
	args := []string{"check", "-o", "json", "--config", n.config, "--containerd", n.root + "/none"}
	if code == reason.NoLabels { // there is no image to ask for: it is containerd's configuration that is to be mended
		args = append(args, "--containerd-config", n.notAnnotated(t))
	} else {
		repo, _, _, err := registryclient.ParseReference(labels[snapshotters.TargetRefLabel])
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, string(repo)+"@"+labels[snapshotters.TargetManifestDigestLabel])
	}
	p := start(t, args...)
	var r checkReport
	if err := json.NewDecoder(p.stdout).Decode(&r); err != nil {
		p.wait()
		t.Fatalf("%v\n%s", err, &p.stderr)
	}
	p.wait()
	if got := p.ProcessState.ExitCode(); got != int(checkFound) {
		t.Errorf("exit status %d, want %d", got, checkFound)
	}
	if code == reason.NoLabels {
		if !slices.ContainsFunc(r.Traps, func(t traps.Trap) bool {
			return t.Code == traps.NoAnnotations && strings.Contains(t.Text, string(code))
		}) {
			t.Errorf("check says %+v", r.Traps)
		}
		p.wantNothingLeft()
		return
	}
	got := r.Image.Reason
	switch code {
	case reason.SafeMode: // the daemon's, and not the image's
		if slices.ContainsFunc(r.Traps, func(t traps.Trap) bool { return t.Code == safeMode }) && got == "" {
			got = code
		}
	case reason.NodeFailure: // of the daemon's files: those of check are well
		if r.Image.LastPull != nil && got == "" {
			got = r.Image.LastPull.Reason
		}
	}
	if got != code || code != reason.SafeMode && code != reason.NodeFailure && (r.Image.Error == "" || r.Image.Remedy == "") {
		t.Errorf("check says %+v, traps %+v", r.Image, r.Traps)
	}
	if want := code != reason.Unreachable && code != reason.Timeout && code != reason.Damaged; len(r.Image.Hosts) != 1 || (r.Image.Hosts[0].Error == "") != want {
		t.Errorf("hosts: %+v", r.Image.Hosts)
	}
	p.wantNothingLeft()
}

// notAnnotated writes a configuration of a containerd that pulls with n and does not say which image.
func (n *reasonNode) notAnnotated(t *testing.T) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "containerd.toml")
	text := fmt.Sprintf(`version = 3
[proxy_plugins.streaming]
  type = "snapshot"
  address = %q
  exports = {root = %q}
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "streaming"
  use_local_image_pull = true
  disable_snapshot_annotations = true
`, n.address, n.root)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// image pushes an image as ref, with an artifact or without, and returns the labels of its first layer.
func image(t *testing.T, ref string, converted bool) map[string]string {
	t.Helper()
	manifest, diffIDs := push(t, ref)
	if converted {
		convert(t, ref)
	}
	return labelsOf(ref, manifest, diffIDs[0])
}

func labelsOf(ref, manifest, diffID string) map[string]string {
	return map[string]string{snapshots.LabelSnapshotRef: diffID, snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: manifest}
}

// brokenLink pushes an image with a hard link to nothing, and its artifact, as ref.
func brokenLink(t *testing.T, ref string) map[string]string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "link", Linkname: "nothing", Typeflag: tar.TypeLink}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	var img v1.Image
	if err == nil {
		img, err = mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH})
	}
	if err == nil {
		img, err = mutate.AppendLayers(img, l)
	}
	var r name.Reference
	if err == nil {
		r, err = name.ParseReference(ref)
	}
	if err == nil {
		err = remote.Write(r, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	convert(t, ref)
	dgst, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	diffID, err := l.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	return labelsOf(ref, dgst.String(), diffID.String())
}

// newerArtifact pushes an image as ref whose artifact is of a version to come.
func newerArtifact(t *testing.T, reg *registrytest.Registry, ref string) map[string]string {
	t.Helper()
	labels := image(t, ref, true)
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	desc, b, err := client.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	artifacts, err := client.Referrers(t.Context(), repo, desc.Digest, artifact.ArtifactType)
	if err != nil || len(artifacts) != 1 {
		t.Fatalf("got artifacts %v, %v", artifacts, err)
	}
	raw, err := client.Manifest(t.Context(), repo, artifacts[0].Digest, artifact.MaxManifestSize)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	m.Annotations[artifact.AnnotationVersion] = "v99"
	if raw, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	// In a repository that does not have the good one.
	other := string(repo) + "-newer"
	path := strings.TrimPrefix(other, reg.Host()+"/")
	reg.PutManifest(path, "v1", desc.MediaType, b)
	reg.PutManifest(path, "", ocispec.MediaTypeImageManifest, raw)
	reg.PutBlob(path, configOf(t, client, repo, b))
	labels[snapshotters.TargetRefLabel] = other + ":v1"
	return labels
}

func configOf(t *testing.T, client *registryclient.Client, repo registryclient.Repository, manifest []byte) []byte {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatal(err)
	}
	b, err := client.Blob(t.Context(), repo, m.Config.Digest, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// signed pushes an image with an artifact and a signature of that as team/app.
func signed(t *testing.T, reg *registrytest.Registry, sign func(trust.Target) trust.Envelope) map[string]string {
	t.Helper()
	labels := image(t, reg.Host()+"/team/app:v1", true)
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	repo := registryclient.Repository(reg.Host() + "/team/app")
	list, err := client.Referrers(t.Context(), repo, digest.Digest(labels[snapshotters.TargetManifestDigestLabel]), artifact.ArtifactType)
	if err != nil || len(list) != 1 {
		t.Fatalf("artifacts: %v, %v", list, err)
	}
	e := sign(trust.Target{Repository: string(repo), Digest: list[0].Digest, MediaType: list[0].MediaType, Size: list[0].Size})
	_, raw, err := trust.Manifest(list[0], e, nil)
	if err != nil {
		t.Fatal(err)
	}
	reg.PutBlob("team/app", e.Bytes)
	reg.PutBlob("team/app", ocispec.DescriptorEmptyJSON.Data)
	reg.PutManifest("team/app", "", ocispec.MediaTypeImageManifest, raw)
	return labels
}

// tampered pushes an image whose artifact has another tar in the place of its layer, and says that it is the layer's.
func tampered(t *testing.T, reg *registrytest.Registry, ref string) map[string]string {
	t.Helper()
	labels := image(t, ref, false)
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	desc, raw, err := client.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	var of ocispec.Manifest
	var config struct {
		ocispec.Platform
		RootFS ocispec.RootFS `json:"rootfs"`
	}
	if err := errors.Join(json.Unmarshal(raw, &of), json.Unmarshal(configOf(t, client, repo, raw), &config)); err != nil {
		t.Fatal(err)
	}
	m := artifact.Manifest{Subject: ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, Config: of.Config, Platform: config.Platform}
	path := strings.TrimPrefix(string(repo), reg.Host()+"/")
	for i, l := range of.Layers {
		var tarred, blob bytes.Buffer
		w := tar.NewWriter(&tarred)
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: "evil", Mode: 0o4755, Typeflag: tar.TypeReg}), w.Close()); err != nil {
			t.Fatal(err)
		}
		e, err := artifact.EncodeLayer(t.Context(), &blob, &tarred, artifact.EncodeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		b := blob.Bytes()
		diffID, err := hex.DecodeString(config.RootFS.DiffIDs[i].Encoded())
		if err != nil {
			t.Fatal(err)
		}
		copy(b[e.IndexOffset+40:], diffID) // docs/format.md
		e.Source, e.Digest, e.IndexDigest = l.Digest, digest.FromBytes(b), digest.FromBytes(b[e.IndexOffset:])
		m.Layers = append(m.Layers, e.Layer)
		reg.PutBlob(path, b)
	}
	if raw, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	reg.PutManifest(path, "", ocispec.MediaTypeImageManifest, raw)
	return labels
}

// reasonCases provoke each reason at a node and a registry, and return the labels of the image to pull.
func reasonCases() map[reason.Code]func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string {
	fault := func(match func(*http.Request) bool, f registrytest.Fault) func(*testing.T, *reasonNode, *registrytest.Registry) map[string]string {
		return func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			labels := image(t, reg.Host()+"/team/app:v1", true)
			t.Cleanup(reg.Inject(match, -1, f))
			return labels
		}
	}
	sign := func(by func(t *testing.T, n *reasonNode, target trust.Target) trust.Envelope) func(*testing.T, *reasonNode, *registrytest.Registry) map[string]string {
		return func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string {
			return signed(t, reg, func(target trust.Target) trust.Envelope { return by(t, n, target) })
		}
	}
	return map[reason.Code]func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string{
		reason.Tampered: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return tampered(t, reg, reg.Host()+"/team/app:v1")
		},
		reason.SignatureMissing: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return image(t, reg.Host()+"/team/app:v1", true)
		},
		reason.SignatureInvalid: sign(func(t *testing.T, n *reasonNode, target trust.Target) trust.Envelope {
			target.Size++
			return n.ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target, "jws")
		}),
		reason.SignatureUntrusted: sign(func(t *testing.T, _ *reasonNode, target trust.Target) trust.Envelope {
			return trusttest.NewCA(t, "evil", nil).Issue(t, "build", trusttest.Leaf{}).Sign(t, target, "jws")
		}),
		reason.SignatureExpired: sign(func(t *testing.T, n *reasonNode, target trust.Target) trust.Envelope {
			return n.ca.Issue(t, "build", trusttest.Leaf{}).SignOver(t, target)
		}),
		reason.SignatureRevoked: sign(func(t *testing.T, n *reasonNode, target trust.Target) trust.Envelope {
			id := n.ca.Issue(t, "build", trusttest.Leaf{})
			n.ca.Server.Revoke(id)
			return id.Sign(t, target, "jws")
		}),
		reason.SignatureUnchecked: sign(func(t *testing.T, n *reasonNode, target trust.Target) trust.Envelope {
			trusttest.WritePolicy(t, n.notation, trusttest.Statement{Name: "others", Scopes: []string{"registry.example.com/others"}})
			return n.ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target, "jws")
		}),
		reason.NoLabels: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			labels := image(t, reg.Host()+"/team/app:v1", true)
			return map[string]string{snapshots.LabelSnapshotRef: labels[snapshots.LabelSnapshotRef]}
		},
		reason.NotListed: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return image(t, reg.Host()+"/others/app:v1", true)
		},
		reason.PolicyOff: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return image(t, reg.Host()+"/team/off/app:v1", true)
		},
		reason.Paused: func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string {
			command(t, "pause", "--config", n.config)
			return image(t, reg.Host()+"/team/app:v1", true)
		},
		reason.SafeMode: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return image(t, reg.Host()+"/team/app:v1", true)
		},
		reason.NoArtifact: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return image(t, reg.Host()+"/team/app:v1", false)
		},
		reason.Auth: fault(registrytest.Referrers, registrytest.Status(http.StatusForbidden)),
		reason.Unreachable: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			labels := image(t, reg.Host()+"/team/app:v1", true)
			reg.Close()
			return labels
		},
		reason.Timeout: fault(registrytest.Any, registrytest.Stall(-1)),
		reason.Stopping: func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string {
			labels := image(t, reg.Host()+"/team/app:v1", true)
			stop := sync.OnceFunc(func() { n.daemon.Process.Signal(unix.SIGTERM) }) // a second one would kill
			t.Cleanup(reg.Inject(registrytest.Any, -1, func(r *registrytest.Registry, next http.Handler) http.Handler {
				stop() // it searches
				return registrytest.Stall(-1)(r, next)
			}))
			return labels
		},
		reason.BadAnswer:  fault(registrytest.Referrers, registrytest.Answer(ocispec.MediaTypeImageIndex, `[1, 2`)),
		reason.Incomplete: fault(registrytest.Blobs, registrytest.Status(http.StatusNotFound)),
		reason.Damaged:    fault(registrytest.Manifests, registrytest.Flip(300)),
		reason.Unsupported: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return newerArtifact(t, reg, reg.Host()+"/team/app:v1")
		},
		reason.Content: func(t *testing.T, _ *reasonNode, reg *registrytest.Registry) map[string]string {
			return brokenLink(t, reg.Host()+"/team/app:v1")
		},
		reason.NodeFailure: func(t *testing.T, n *reasonNode, reg *registrytest.Registry) map[string]string {
			indexes := filepath.Join(n.root, "indexes")
			if err := os.Remove(indexes); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(indexes, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return image(t, reg.Host()+"/team/app:v1", true)
		},
	}
}

// Where everything but the indexes may be read, the pull asks for these again as long as it may last, and says both then.
func TestIndexesRefused(t *testing.T) {
	t.Parallel()
	reg := registrytest.Start(t, registrytest.Options{})
	n := newReasonNode(t, "", 0)
	labels := image(t, reg.Host()+"/team/app:v1", true)
	t.Cleanup(reg.Inject(func(r *http.Request) bool { return r.Header.Get("Range") != "" }, -1, registrytest.Status(http.StatusUnauthorized, "WWW-Authenticate", `Basic realm="r"`)))
	n.pull(t, labels)
	if got := n.why(t); got != reason.Auth {
		t.Errorf("the status says %s", got)
	}
	s := askStatus(t, n.config, func(status) bool { return true })
	if text := s.NotStreamed[0].Error; !strings.Contains(text, "took longer than 2s") || !strings.Contains(text, "401") {
		t.Errorf("the error is %s", text)
	}
}

// TestQuarantine: what has lied is listed, also by a daemon that is started again, until it is cleared.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	reg := registrytest.Start(t, registrytest.Options{})
	n := newReasonNode(t, reason.Tampered, 0)
	list := func(args ...string) (q []ledger.Quarantine) {
		t.Helper()
		p := start(t, append([]string{"quarantine", "-o", "json", "--config", n.config}, args...)...)
		err := json.NewDecoder(p.stdout).Decode(&q)
		if waitErr := p.wait(); err != nil || waitErr != nil {
			t.Fatalf("%v, %v\n%s", err, waitErr, &p.stderr)
		}
		return q
	}
	if q := list(); len(q) != 0 {
		t.Errorf("at first: %+v", q)
	}
	n.pull(t, tampered(t, reg, reg.Host()+"/team/app:v1"))
	q := list()
	if len(q) == 0 || q[0].Repository != reg.Host()+"/team/app" || q[0].Why == "" {
		t.Fatalf("after a lie: %+v", q)
	}
	// Of its two layers both may be, or the first ends the proof of the other.
	if text := statusText(t, n.config); !strings.Contains(text, fmt.Sprintf("in quarantine: %d\n", len(q))) {
		t.Errorf("the status says\n%s", text)
	}
	n.daemon.signal(unix.SIGTERM)
	if err := n.daemon.wait(); err != nil {
		t.Fatal(err)
	}
	n.daemon = serving(t, n.config, n.address)
	if again := list(); len(again) != len(q) || again[0].Key != q[0].Key {
		t.Errorf("of a daemon that was started again: %+v", again)
	}
	if left := list("--clear", q[0].Index.String()); len(left) != len(q)-1 || slices.ContainsFunc(left, func(l ledger.Quarantine) bool { return l.Index == q[0].Index }) {
		t.Errorf("after it was cleared: %+v", left)
	}
}

// TestTrusted: an artifact that is signed by who is trusted is streamed, and check says by whom.
func TestTrusted(t *testing.T) {
	t.Parallel()
	reg := registrytest.Start(t, registrytest.Options{})
	n := newReasonNode(t, reason.SignatureMissing, 0)
	labels := signed(t, reg, func(target trust.Target) trust.Envelope {
		return n.ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target, "cose")
	})
	if _, err := connect(t, n.address).Prepare(t.Context(), "extract", "", snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("not streamed: %v\n%s", err, &n.daemon.stderr)
	}
	p := start(t, "check", "--config", n.config, "--containerd", n.root+"/none", labels[snapshotters.TargetRefLabel])
	out, err := io.ReadAll(p.stdout)
	p.wait() // with an error: there is no containerd
	if want := "signed by CN=build,"; err != nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), "policy: signed") {
		t.Errorf("no %q in\n%s (%v)", want, out, err)
	}
}

// Each reason of the list is one that a pull meets, and the log, the status, the metrics, `check` and the pod's event say it; but for what a daemon does that is being stopped, which only the log
// outlives, and of an image without a name no pod is known.
func TestReasons(t *testing.T) {
	cases := reasonCases()
	for _, code := range reason.All() {
		t.Run(string(code), func(t *testing.T) {
			if cases[code] == nil {
				t.Fatal("nothing provokes it")
			}
			t.Parallel()
			failed := 0
			if code == reason.SafeMode {
				failed = maxFailedStarts
			}
			reg := registrytest.Start(t, registrytest.Options{})
			n := newReasonNode(t, code, failed)
			labels := cases[code](t, n, reg)
			n.pods(labels[snapshotters.TargetRefLabel])
			n.pull(t, labels)
			if code != reason.Stopping {
				if code != reason.NoLabels {
					n.event(t, code, labels[snapshotters.TargetRefLabel])
				}
				if got := n.why(t); got != code {
					t.Errorf("the status says %s", got)
				}
				n.check(t, code, labels)
				n.daemon.signal(unix.SIGTERM)
			}
			if err := n.daemon.wait(); err != nil {
				t.Fatalf("%v\n%s", err, &n.daemon.stderr)
			}
			if !strings.Contains(n.daemon.stderr.String(), " reason="+string(code)+" error=") {
				t.Errorf("the log says\n%s", &n.daemon.stderr)
			}
			if list := n.api.Posted(); code == reason.NoLabels && len(list) > 0 {
				t.Errorf("there are events: %s", list)
			}
		})
	}
}
