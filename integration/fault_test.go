package integration_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/crane"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// TestFallback: whatever is missing or wrong on the way to an artifact, the pull is a normal one and the container sees the image.
func TestFallback(t *testing.T) {
	dir := tempDir(t)
	registry := startRegistry(t, registrytest.Options{Dir: dir})
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/team/*"}, Config: `resolve_timeout = "3s"`})
	host := registry.Host()
	inject := func(match func(*http.Request) bool, f registrytest.Fault) func(*testing.T, string) {
		return func(t *testing.T, repo string) {
			run(t, "streamctl", "create", "--record", "", host+"/"+repo+":v1")
			t.Cleanup(registry.Inject(func(r *http.Request) bool { return snapshotters(r) && match(r) }, -1, f))
		}
	}
	// Of the indexes that are asked for at once, one may not have had its turn at the host when the time was over: nothing failed for it.
	const cutShort reason.Code = "REGISTRY_UNREACHABLE or TIMEOUT"
	for i, c := range []struct {
		name  string
		repo  string
		want  reason.Code
		spoil func(t *testing.T, repo string)
	}{
		{"no artifact", "team/app", reason.NoArtifact, func(*testing.T, string) {}},
		{"not listed", "others/app", reason.NotListed, func(t *testing.T, repo string) { run(t, "streamctl", "create", "--record", "", host+"/"+repo+":v1") }},
		{"referrers fail", "team/app", reason.Unreachable, inject(registrytest.Referrers, registrytest.Status(http.StatusInternalServerError))},
		{"referrers forbidden", "team/app", reason.Auth, inject(registrytest.Referrers, registrytest.Status(http.StatusForbidden))},
		{"referrers are no index", "team/app", reason.BadAnswer, inject(registrytest.Referrers, registrytest.Answer(ocispec.MediaTypeImageIndex, `[1, 2`))},
		{"registry does not answer", "team/app", reason.Timeout, inject(registrytest.Any, registrytest.Stall(-1))},
		{"manifests gone", "team/app", reason.Incomplete, inject(registrytest.Manifests, registrytest.Status(http.StatusNotFound))},
		{"manifests changed", "team/app", reason.Damaged, inject(registrytest.Manifests, registrytest.Flip(300))},
		{"indexes gone", "team/app", reason.Incomplete, inject(ranged, registrytest.Status(http.StatusNotFound))},
		{"indexes cut short", "team/app", cutShort, inject(ranged, registrytest.Truncate(100))},
		{"indexes changed", "team/app", reason.Damaged, inject(ranged, registrytest.Flip(50))},
		{"artifact of a newer version", "team/app", reason.Unsupported, func(t *testing.T, repo string) {
			replaceArtifact(t, registry, repo, func(m *ocispec.Manifest) { m.Annotations[artifact.AnnotationVersion] = "v99" })
		}},
		{"artifact with a layer too few", "team/app", reason.Damaged, func(t *testing.T, repo string) {
			replaceArtifact(t, registry, repo, func(m *ocispec.Manifest) { m.Layers = m.Layers[:2] })
		}},
		{"artifact with layers exchanged", "team/app", reason.Damaged, func(t *testing.T, repo string) {
			replaceArtifact(t, registry, repo, func(m *ocispec.Manifest) { m.Layers[1], m.Layers[2] = m.Layers[2], m.Layers[1] })
		}},
		{"artifact that lies about a layer's source", "team/app", reason.Damaged, func(t *testing.T, repo string) {
			replaceArtifact(t, registry, repo, func(m *ocispec.Manifest) {
				source := m.Layers[2].Annotations[artifact.AnnotationSourceDigest]
				m.Layers[2] = m.Layers[1]
				m.Layers[2].Annotations = map[string]string{}
				for k, v := range m.Layers[1].Annotations {
					m.Layers[2].Annotations[k] = v
				}
				m.Layers[2].Annotations[artifact.AnnotationSourceDigest] = source
			})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := uint64(200 + i)
			repo := fmt.Sprintf("%s%d", c.repo, i)
			ref := host + "/" + repo + ":v1"
			img := pushSmall(t, ref, seed)
			c.spoil(t, repo)
			registry.Reset()
			if err := n.Pull(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			got := lastNormalPull(t, n, ref)
			if c.want == cutShort && (got == reason.Unreachable || got == reason.Timeout) {
				c.want = got
			}
			if got != c.want {
				t.Errorf("the status says %s, want %s", got, c.want)
			}
			// The first layer is the same for all, and on the node after the first pull.
			if got := len(layerDownloads(t, registry, ref)); got < 2 {
				t.Errorf("%d requests for layers: that was not a normal pull", got)
			}
			out, err := n.Run(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed)
			checkIdentity(t, n, ref, digestOf(t, img), img)
		})
	}
}

// lastNormalPull asks the node's daemon why the last pull of ref was not streamed.
func lastNormalPull(t *testing.T, n *node.Node, ref string) reason.Code {
	t.Helper()
	s, err := statusOf(t, n)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range slices.Backward(s.NotStreamed) {
		if p.Image == ref {
			return p.Reason
		}
	}
	return ""
}

// TestRefused: what containerd refuses to unpack is not streamed either, and the pull fails with containerd's own words.
func TestRefused(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}})
	ref := registry.Host() + "/app:v1"
	push(t, ref, func(dir string, guest []byte) (v1.Image, error) {
		return ociimage.OldGNUSparse(t.Context(), dir, guest)
	})
	out, err := tryRun(t, "streamctl", "create", "--record", "", ref)
	t.Logf("streamctl create: %s, %v", out, err) // it may refuse, too
	err = n.Pull(t.Context(), ref)
	if want := "unhandled tar header type 83"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("the pull ended with %v, want %q", err, want)
	}
}

// ranged matches ranged reads.
func ranged(r *http.Request) bool { return r.Header.Get("Range") != "" }

// replaceArtifact converts the image and then replaces the artifact's manifest by one that change has changed.
func replaceArtifact(t *testing.T, registry *registrytest.Registry, repo string, change func(*ocispec.Manifest)) {
	t.Helper()
	run(t, "streamctl", "create", "--record", "", registry.Host()+"/"+repo+":v1")
	_, dgst, raw := artifactOf(t, registry, repo)
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(b, raw) {
		t.Fatal("nothing was changed")
	}
	registry.PutManifest(repo, "", ocispec.MediaTypeImageManifest, b)
	if err := crane.Delete(registry.Host()+"/"+repo+"@"+dgst, crane.Insecure); err != nil {
		t.Fatal(err)
	}
}

// TestVerification changes a byte of some chunks of a layer in the registry, and one of the image's own layer, in front of them. A container that reads everything sees the right bytes
// of a file or an I/O error, never others, in each way to mount; and all of it is right once one of the two is.
func TestVerification(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			seed := uint64(300 + i)
			dir := tempDir(t)
			registry := startRegistry(t, registrytest.Options{Dir: dir})
			n := startNode(t, node.Options{Mode: mode, Stream: []string{registry.Host() + "/*"}, Config: `registry_wait = "500ms"`})
			ref := registry.Host() + "/app:v1"
			pushSmall(t, ref, seed)
			run(t, "streamctl", "create", "--record", "", ref)
			m, _, _ := artifactOf(t, registry, "app")
			layer := m.Layers[1]
			blob, source := filepath.Join(dir, "sha256", layer.Digest.Encoded()), filepath.Join(dir, "sha256", layer.Source.Encoded())
			repairBlob := rewrite(t, blob, func(b []byte) []byte { return spoil(t, b, layer) })
			repairSource := rewrite(t, source, func(b []byte) []byte { b[len(b)/32] ^= 1; return b }) // in chunk 1

			pullStreamed(t, registry, n, ref)
			out, err := n.Run(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := ociimage.SmallSums(seed)
			right, refused := 0, 0
			for _, l := range strings.Split(strings.TrimSuffix(strings.TrimSpace(out), "\ndone"), "\n") {
				switch sum, path, _ := strings.Cut(l, " "); sum {
				case want[path]:
					right++
				case "errno=5":
					refused++
				default:
					t.Errorf("%s reads as %q, want %s or EIO", path, sum, want[path])
				}
			}
			if right+refused != len(want) || refused == 0 || right == 0 {
				t.Errorf("%d files right and %d refused of %d; want some of both", right, refused, len(want))
			}

			if i == 0 {
				repairBlob()
			} else {
				repairSource()
			}
			if out, err = n.Run(t.Context(), ref, nil); err != nil {
				t.Fatal(err)
			}
			checkSums(t, out, seed)
		})
	}
}

// rewrite changes the content of a file. back makes it what it was.
func rewrite(t *testing.T, path string, change func([]byte) []byte) (back func()) {
	t.Helper()
	good, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(bytes.Clone(good)), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(path, good, 0o644); err != nil {
			t.Error(err)
		}
	}
}

// spoil returns a copy of the layer's blob with one bit inverted in each second of the first chunks, which are a large file: each read that fails takes its time.
func spoil(t *testing.T, blob []byte, layer artifact.Layer) []byte {
	t.Helper()
	x, err := artifact.DecodeIndex(blob[layer.IndexOffset:])
	if err != nil {
		t.Fatal(err)
	}
	spoilt := bytes.Clone(blob)
	source := rand.New(rand.NewPCG(1, 2))
	for _, i := range []int{1, 3, 5, 7} {
		c := x.Chunk(i)
		spoilt[c.BlobOffset+source.Int64N(c.BlobSize)] ^= 1 << source.IntN(8)
	}
	return spoilt
}
