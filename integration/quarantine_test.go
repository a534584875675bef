package integration_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// attachLie attaches an artifact to img, of the repository repo, that lies of its second layer: its index has other modes for data/small and data/small/100 than the tar has. Its digest is lower than below, if that is not "".
func attachLie(t *testing.T, registry *registrytest.Registry, repo string, img v1.Image, below string) (dgst digest.Digest) {
	t.Helper()
	raw, err := img.RawManifest()
	var im ocispec.Manifest
	if err == nil {
		err = json.Unmarshal(raw, &im)
	}
	layers, layersErr := img.Layers()
	if err != nil || layersErr != nil {
		t.Fatal(err, layersErr)
	}
	m := &artifact.Manifest{
		Subject: ocispec.Descriptor{MediaType: im.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))},
		Config:  im.Config, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
	}
	for i, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		tar, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		layer, blob := encode(t, tar)
		if i == 1 {
			layer, blob = lie(t, tar)
		}
		layer.Source = im.Layers[i].Digest
		m.Layers = append(m.Layers, layer)
		registry.PutBlob(repo, blob)
	}
	for i := 0; dgst == "" || below != "" && dgst.Encoded() >= below; i++ {
		m.Converter = strings.Repeat("x", i)
		if raw, err = m.Encode(); err != nil {
			t.Fatal(err)
		}
		dgst = digest.FromBytes(raw)
	}
	return registry.PutManifest(repo, "", ocispec.MediaTypeImageManifest, raw)
}

func encode(t *testing.T, tar []byte) (artifact.Layer, []byte) {
	t.Helper()
	var blob bytes.Buffer
	l, err := artifact.EncodeLayer(t.Context(), &blob, bytes.NewReader(tar), artifact.EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l.Layer, blob.Bytes()
}

// lie encodes tar, with the headers of another one in its index, in which everybody may write to data/small, and data/small/100 is setuid: a chunk has that with the bodies of others.
func lie(t *testing.T, tar []byte) (artifact.Layer, []byte) {
	t.Helper()
	const offSize, offChunks, offTable, tableEntry = 4, 20, 72, 48 // docs/format.md
	changed := bytes.Clone(tar)
	for name, mode := range map[string]string{"data/small/": "0000777\x00", "data/small/100": "0004755\x00"} {
		at := bytes.Index(changed, []byte(name+"\x00"))
		if at < 0 || at%512 != 0 {
			t.Fatal("no " + name)
		}
		h := changed[at : at+512]
		copy(h[100:], mode)
		copy(h[148:], "        ")
		sum := 0
		for _, b := range h {
			sum += int(b)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00", sum))
	}
	headers := func(index []byte) []byte {
		return index[offTable+tableEntry*binary.LittleEndian.Uint32(index[offChunks:]):]
	}
	l, blob := encode(t, tar)
	other, otherBlob := encode(t, changed)
	index := blob[l.IndexOffset:]
	index = slices.Concat(index[:len(index)-len(headers(index))], headers(otherBlob[other.IndexOffset:]))
	binary.LittleEndian.PutUint32(index[offSize:], uint32(len(index)-8))
	blob = slices.Concat(blob[:l.IndexOffset], index)
	l.IndexSize, l.IndexDigest, l.Size, l.Digest = int64(len(index)), digest.FromBytes(index), int64(len(blob)), digest.FromBytes(blob)
	return l, blob
}

// inQuarantine has a container of ref read the lie, and waits until the node knows.
func inQuarantine(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	c, err := n.RunPod(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Output(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lie is in quarantine", func() bool {
		var list []any
		out := run(t, "streaming-snapshotter", "quarantine", "-o", "json", "--config", n.ConfigFile())
		return json.Unmarshal([]byte(out), &list) == nil && len(list) > 0
	})
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestQuarantinedBase: when the artifact of an image lies, in a repository whose owner then takes it away, another image that stands on it is pulled in the normal way, and the same image of another repository
// starts, with the image's own layers. After a restart these are there.
func TestQuarantinedBase(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause, mallory, above, same := registry.Host()+"/pause:1", registry.Host()+"/mallory/app:v1", registry.Host()+"/victim/above:v1", registry.Host()+"/victim/app:v1"
	pushPause(t, pause)
	img := pushSmall(t, mallory, 51)
	attachLie(t, registry, "mallory/app", img, "")
	pushAbove(t, mallory, above)
	pushSmall(t, same, 51)
	for pull, refs := range map[node.Pull][]string{node.Transfer: {above, same}, node.Local: {same, above}} {
		t.Run(string(pull), func(t *testing.T) {
			n := startNode(t, node.Options{Pull: pull, Pause: pause, Stream: []string{registry.Host() + "/*"}})
			inQuarantine(t, n, mallory)
			back := registry.Inject(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/mallory/") }, -1, registrytest.Status(http.StatusNotFound))
			defer back()
			for _, ref := range refs {
				checkSums(t, runPod(t, n, ref), 51)
			}
			if err := n.StopSnapshotter(); err != nil {
				t.Fatal(err)
			}
			if err := n.StartSnapshotter(t.Context()); err != nil {
				t.Fatal(err)
			}
			registry.Reset()
			for _, ref := range refs {
				checkSums(t, runPod(t, n, ref), 51)
			}
			if got := wholeLayers(t, registry, img); got > 0 {
				t.Errorf("%d layers were fetched again", got)
			}
		})
	}
}

// TestQuarantineInAnotherNamespace: an image that one namespace of containerd has from an artifact that lies, and keeps, is streamed for another one from a good artifact.
func TestQuarantineInAnotherNamespace(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause, mallory, good := registry.Host()+"/pause:1", registry.Host()+"/mallory/app:v1", registry.Host()+"/good/app:v1"
	pushPause(t, pause)
	img := pushSmall(t, mallory, 52)
	pushSmall(t, good, 52)
	run(t, "streamctl", "create", "--record", "", good)
	_, honest, _ := artifactOf(t, registry, "good/app")
	attachLie(t, registry, "mallory/app", img, strings.TrimPrefix(honest, "sha256:")) // containerd takes the first by name
	n := startNode(t, node.Options{Pause: pause, Stream: []string{registry.Host() + "/*"}})
	inQuarantine(t, n, mallory)
	registry.Reset()
	other := func(args ...string) string {
		t.Helper()
		out, err := n.Ctr(t.Context(), append([]string{"--namespace", "other"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	other("images", "pull", "--snapshotter", n.Snapshotter(), "--plain-http", good)
	log := path.Join(tempDir(t), "out")
	other("run", "--rm", node.NoShares, "--snapshotter", n.Snapshotter(), "--log-uri", "file://"+log, good, n.ID("other"))
	out, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	checkSums(t, string(out), 52)
	if got := wholeLayers(t, registry, img, "good/app"); got > 0 { // the proof of mallory's may still read mallory's
		t.Errorf("%d layers were downloaded: the good artifact was not taken", got)
	}
	other("images", "rm", "--sync", good)
}
