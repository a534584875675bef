package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// attachTars attaches an artifact of img whose layers have tars, and whose indexes change may forge: it is given each index, and gives what is put in its place.
func (n *testNode) attachTars(img testImage, tars [][]byte, change func(layer int, frame []byte, diffID digest.Digest) []byte) digest.Digest {
	n.t.Helper()
	repo := img.ref[strings.IndexByte(img.ref, '/')+1:]
	resp, err := http.Get(n.reg.URL() + "/v2/" + repo + "/manifests/" + img.manifest.String())
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	var im ocispec.Manifest
	if err == nil {
		err = json.Unmarshal(raw, &im)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	m := &artifact.Manifest{
		Subject: ocispec.Descriptor{MediaType: resp.Header.Get("Content-Type"), Digest: img.manifest, Size: int64(len(raw))},
		Config:  im.Config, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Converter: "somebody's",
	}
	for i, tar := range tars {
		var blob bytes.Buffer
		l, err := artifact.EncodeLayer(n.t.Context(), &blob, bytes.NewReader(tar), artifact.EncodeOptions{ChunkSize: 4 << 10})
		if err != nil {
			n.t.Fatal(err)
		}
		frames, index := blob.Bytes()[:l.IndexOffset], bytes.Clone(blob.Bytes()[l.IndexOffset:])
		index = change(i, index, l.DiffID)
		b := slices.Concat(frames, index)
		l.Layer.Digest, l.Layer.Size, l.Layer.IndexSize, l.Layer.IndexDigest = digest.FromBytes(b), int64(len(b)), int64(len(index)), digest.FromBytes(index)
		l.Layer.Source = im.Layers[i].Digest
		m.Layers = append(m.Layers, l.Layer)
		n.reg.PutBlob(repo, b)
	}
	encoded, err := m.Encode()
	if err != nil {
		n.t.Fatal(err)
	}
	return n.reg.PutManifest(repo, "", ocispec.MediaTypeImageManifest, encoded)
}

// claim writes into an index that its tar is that of a diffID.
func claim(index []byte, diffID digest.Digest) []byte {
	const offDiffID = 40
	b := []byte{}
	for i := 0; i < len(diffID.Encoded()); i += 2 {
		b = append(b, hexByte(diffID.Encoded()[i:]))
	}
	copy(index[offDiffID:], b)
	return index
}

// withHeaders makes of an index one that has the headers of another tar with the same chunks' sizes, and the digests of its own.
func withHeaders(t *testing.T, tar []byte) func(_ int, index []byte, diffID digest.Digest) []byte {
	t.Helper()
	var frame bytes.Buffer
	l, err := artifact.EncodeLayer(t.Context(), &frame, bytes.NewReader(tar), artifact.EncodeOptions{ChunkSize: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	return func(_ int, index []byte, diffID digest.Digest) []byte {
		forged := bytes.Clone(frame.Bytes()[l.IndexOffset:])
		const tableStart, entry = 72, 48
		copy(forged[tableStart:tableStart+l.Chunks*entry], index[tableStart:])
		return claim(forged, diffID)
	}
}

func hexByte(s string) byte {
	return byte(strings.IndexByte(hex, s[0])<<4 | strings.IndexByte(hex, s[1]))
}

const hex = "0123456789abcdef"

// big is a file that does not fit into one chunk.
func big(word string) string { return strings.Repeat(word+" ", 100_000/len(word)) }

// pushForged pushes an image of two layers, and more, with an artifact whose second layer is another of the same shape; its index says that it is the image's.
func (n *testNode) pushForged(name string, more ...[]byte) (img testImage, base string) {
	tars := append(honestLayers(n.t), more...)
	img = n.push(name, tars...)
	evil := slices.Clone(tars)
	evil[1] = tarOf(n.t, file{"program", big("evil")}, file{"other", big("same")})
	n.attachTars(img, evil, func(i int, index []byte, _ digest.Digest) []byte { return claim(index, digest.FromBytes(tars[i])) })
	return img, big("base")
}

// honestLayers are those of the image of pushForged.
func honestLayers(t testing.TB) [][]byte {
	return [][]byte{tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}, file{"other", big("same")})}
}

// next waits for the next of what n's images tell of proofs that is of a kind.
func (n *testNode) next(kind stream.ProofKind) stream.Proof {
	n.t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case p := <-n.proofs:
			if p.Kind == kind {
				return p
			}
			if p.Kind == stream.Quarantined {
				n.t.Fatalf("in quarantine: %+v", p.Evidence)
			}
		case <-timeout:
			n.t.Fatalf("nothing is %s; log:\n%s", kind, n.log.b.String())
		}
	}
}

// container mounts what a container of the snapshot top has, by key.
func (n *testNode) container(key, top string) (root string) {
	n.t.Helper()
	mounts, err := n.sn.Prepare(testContext(), key, top)
	if err != nil {
		n.t.Fatal(err)
	}
	root = n.t.TempDir()
	for _, m := range mounts {
		if err := m.Mount(root); err != nil {
			n.t.Fatal(err)
		}
	}
	n.t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	return root
}

func provingNode(t *testing.T, mode fs.Mode) *testNode {
	n := newTestNodeMode(t, mode)
	n.deadline, n.quiet, n.background = time.Hour, 100*time.Millisecond, 1<<30
	n.restart()
	return n
}

func inAllModes(t *testing.T, f func(t *testing.T, n *testNode)) {
	for _, mode := range []fs.Mode{fs.ModeFile, fs.ModeLoop, fs.ModeTree} {
		t.Run(string(mode), func(t *testing.T) { f(t, provingNode(t, mode)) })
	}
}

// TestProof: what is mounted is proven, whatever was read of it and whatever may stay, once for all lives of the daemon; what is only pulled is not.
func TestProof(t *testing.T) {
	for name, limit := range map[string]int64{"unlimited": 0, "hardly any cache": 100 << 10} {
		t.Run(name, func(t *testing.T) {
			n := provingNode(t, fs.ModeFile)
			n.limit = limit
			n.restart()
			lower, upper := tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}, file{"other", big("same")})
			img := n.push("app", lower, upper)
			n.convert(img)
			top := n.prepareAll(img, 0, "")
			if s := n.images.Proofs(); s.Waiting != 0 {
				t.Errorf("before a mount: %+v", s)
			}
			root := n.container("container", top)
			wantFiles(t, root, map[string]string{"program": big("good")})
			bytes := int64(0)
			for range 2 {
				p := n.next(stream.Proven)
				bytes += p.Bytes
				if !n.ledger.Proven(p.Key) || p.Config == "" {
					t.Errorf("told of %+v", p)
				}
			}
			if want := int64(len(lower) + len(upper)); bytes != want {
				t.Errorf("%d bytes are proven, want %d", bytes, want)
			}
			wantFiles(t, root, map[string]string{"program": big("good"), "base": big("base"), "other": big("same")})
			n.restart()
			n.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
			n.container("next", top)
			if s := n.images.Proofs(); s.Waiting != 0 || s.Proven != 2 || s.Quarantined != 0 {
				t.Errorf("after a restart: %+v", s)
			}
			if list, err := n.images.Status(); err != nil || len(list) != 1 || list[0].Proven != 2 || list[0].ProofDue != nil {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}

// TestQuarantine: a layer that is not the image's is found. What runs on it gets errors, cached or not, nothing starts on it any more, and the image is pulled in the normal way; after a restart, too.
func TestQuarantine(t *testing.T) {
	inAllModes(t, func(t *testing.T, n *testNode) {
		img, base := n.pushForged("app")
		top := n.prepareAll(img, 0, "")
		root := n.container("container", top)
		wantFiles(t, root, map[string]string{"program": big("evil"), "base": base}) // open: found afterwards
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		p := n.next(stream.Quarantined)
		if e := p.Evidence; e.Converter != "somebody's" || e.Repository != n.reg.Host()+"/app" || e.Manifest != img.manifest || e.Artifact.Encoded() != id || p.Layer != 1 {
			t.Errorf("told of %+v, %+v", p, e)
		}
		wantRefused := func() {
			t.Helper()
			if _, err := n.sn.Prepare(testContext(), "next", top); !errors.Is(err, stream.ErrQuarantined) || !strings.Contains(err.Error(), "Delete its pods") {
				t.Errorf("a container starts: %v", err)
			}
			if err := n.images.Usable(id); !errors.Is(err, stream.ErrQuarantined) {
				t.Errorf("usable: %v", err)
			}
			if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); !errors.Is(err, stream.ErrQuarantined) {
				t.Errorf("found again: %v", err)
			}
			if _, err := n.sn.Prepare(testContext(), "extract", "", img.labels(0)); err != nil {
				t.Errorf("no normal pull: %v", err)
			}
			if err := n.sn.Remove(testContext(), "extract"); err != nil {
				t.Error(err)
			}
			dev, err := n.images.Device(testContext(), id)
			if err != nil {
				t.Fatal(err)
			}
			if m, err := dev.ReadAt(testContext(), make([]byte, 512), 0); m != 0 || !errors.Is(err, stream.ErrQuarantined) {
				t.Errorf("%d bytes are read by a mount of a former life, %v", m, err)
			}
			dev.(io.Closer).Close()
		}
		for _, name := range []string{"program", "base", "other"} {
			if b, err := os.ReadFile(filepath.Join(root, name)); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: %d bytes, %v", name, len(b), err)
			}
		}
		wantRefused()
		if got := n.mounts.Targets(id); len(got) > 0 {
			t.Errorf("mounted at %q", got)
		}
		n.restart()
		wantRefused()

		// The quarantine is of the index, not of an image: another one that names it has none either.
		if err := n.images.ClearQuarantine(p.Key.Index); err != nil {
			t.Fatal(err)
		}
		if _, err := n.sn.Prepare(testContext(), "cleared", top); err != nil {
			t.Errorf("after clearing: %v", err)
		}
		n.next(stream.Quarantined) // it lies as it did
	})
}

// TestProveAtOnce: a pull may wait until all is proven, or known to be a lie, before anything is mounted.
func TestProveAtOnce(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	lie, _ := n.pushForged("app")
	id, _, err := n.images.Find(testContext(), lie.ref, lie.manifest)
	if err != nil {
		t.Fatal(err)
	}
	bytes := atomic.Int64{}
	if err := n.images.Prove(testContext(), id, func(n int64) { bytes.Add(n) }); !errors.Is(err, stream.ErrQuarantined) || bytes.Load() == 0 {
		t.Errorf("after %d bytes: %v", bytes.Load(), err)
	}
	if err := n.images.Mount(testContext(), id, 2, t.TempDir()); !errors.Is(err, stream.ErrQuarantined) {
		t.Errorf("mounted: %v", err)
	}
	img := n.push("other", threeLayers(t)...)
	n.convert(img)
	if id, _, err = n.images.Find(testContext(), img.ref, img.manifest); err != nil {
		t.Fatal(err)
	}
	if err := n.images.Prove(testContext(), id, func(int64) {}); err != nil || n.images.Proofs().Proven < 3 {
		t.Errorf("%v, %+v", err, n.images.Proofs())
	}
	n.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
	if err := n.images.Prove(testContext(), id, func(int64) { t.Error("it is read again") }); err != nil {
		t.Error(err)
	}
}

// TestBetterArtifact: an image in quarantine is streamed by its next artifact.
func TestBetterArtifact(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	img, base := n.pushForged("app")
	wantFiles(t, n.container("container", n.prepareAll(img, 0, "")), map[string]string{"base": base})
	n.next(stream.Quarantined)
	n.attachTars(img, honestLayers(t), func(_ int, index []byte, _ digest.Digest) []byte { return index })
	n.prepareAll(img, 0, "")
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	wantFiles(t, n.mountAt(id), map[string]string{"program": big("good"), "base": base})
	n.next(stream.Proven)
}

// TestADamagedDiskIsNoLie: bytes that the disk has changed are mended by the proof, and not taken for the artifact's.
func TestADamagedDiskIsNoLie(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.deadline, n.background = 0, 0
	n.restart()
	files := map[string]string{"program": big("good"), "base": big("base")}
	img := n.push("app", tarOf(t, file{"base", files["base"]}), tarOf(t, file{"program", files["program"]}))
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	wantFiles(t, n.container("container", top), files)
	n.stop()
	data, err := filepath.Glob(filepath.Join(n.root, "cache", "*", "data"))
	if err != nil || len(data) != 2 {
		t.Fatalf("%q, %v", data, err)
	}
	for _, path := range data {
		b, err := os.ReadFile(path)
		if err == nil {
			b[70_000] ^= 0x20
			err = os.WriteFile(path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	n.deadline, n.background = time.Hour, 1<<30
	n.start()
	root := n.container("next", top)
	n.next(stream.Proven)
	n.next(stream.Proven)
	if s := n.chunks.Stats(); s.DamagedChunks != 2 {
		t.Errorf("%d chunks were damaged, want 2", s.DamagedChunks)
	}
	wantFiles(t, root, files)
}

// TestProofWithoutTheBlob: an artifact that was deleted is judged by the image's own layers.
func TestProofWithoutTheBlob(t *testing.T) {
	gone := func(n *testNode, img testImage) {
		layers := map[string]bool{}
		for _, l := range n.layersOf(img) {
			layers[l.Digest.String()] = true
		}
		n.reg.Inject(func(r *http.Request) bool { return registrytest.Blobs(r) && layers[filepath.Base(r.URL.Path)] }, -1, registrytest.Status(http.StatusNotFound))
	}
	t.Run("honest", func(t *testing.T) {
		n := provingNode(t, fs.ModeFile)
		img := n.push("app", tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}))
		n.convert(img)
		top := n.prepareAll(img, 0, "")
		gone(n, img)
		wantFiles(t, n.container("container", top), map[string]string{"base": big("base")})
		n.next(stream.Proven)
		n.next(stream.Proven)
	})
	t.Run("forged", func(t *testing.T) {
		n := provingNode(t, fs.ModeFile)
		img, base := n.pushForged("app")
		top := n.prepareAll(img, 0, "")
		gone(n, img)
		wantFiles(t, n.container("container", top), map[string]string{"base": base})
		if p := n.next(stream.Quarantined); p.Layer != 1 {
			t.Errorf("told of %+v", p)
		}
	})
}

// TestALieIsProvenAtOnce: an index with other headers than its chunks is found by the first read of them, before any proof is due.
func TestALieIsProvenAtOnce(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.quiet = time.Hour // no first start is over
	n.restart()
	honest := tarOf(t, file{"dir/", ""}, file{"dir/program", "in one chunk with its header"})
	setuid := bytes.Clone(honest)
	copy(setuid[512+100:], "0004755\x00") // of dir/program
	fixChecksum(setuid[512:])
	img := n.push("app", honest)
	n.attachTars(img, [][]byte{honest}, withHeaders(t, setuid))
	root := n.container("container", n.prepareAll(img, 0, ""))
	if fi, err := os.Stat(filepath.Join(root, "dir/program")); err != nil || fi.Mode()&os.ModeSetuid == 0 {
		t.Fatalf("%v, %v: the forgery shows nothing", fi, err)
	}
	os.ReadFile(filepath.Join(root, "dir/program"))
	if p := n.next(stream.Quarantined); !strings.Contains(p.Evidence.Why, "header") {
		t.Errorf("why: %s", p.Evidence.Why)
	}
	if b, err := os.ReadFile(filepath.Join(root, "dir/program")); !errors.Is(err, unix.EIO) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// fixChecksum computes a tar header's checksum again.
func fixChecksum(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h[:512] {
		sum += int(b)
	}
	copy(h[148:156], []byte{'0' + byte(sum>>15&7), '0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7), '0' + byte(sum>>3&7), '0' + byte(sum&7), 0, ' '})
}

// TestOverdue: an image whose registry is away is told of when its time is over, is no less readable, and is proven when the registry is back.
func TestOverdue(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	n.deadline = 3 * time.Second
	n.budget = 100 * time.Millisecond
	n.restart()
	img := n.push("app", tarOf(t, file{"base", big("base")}), tarOf(t, file{"program", big("good")}))
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	back := n.reg.Inject(registrytest.Blobs, -1, registrytest.Status(http.StatusServiceUnavailable))
	n.container("container", top)
	if p := n.next(stream.Overdue); p.Err == nil {
		t.Errorf("told of %+v", p)
	}
	if s := n.images.Proofs(); s.Overdue != 2 {
		t.Errorf("%+v", s)
	}
	back()
	n.next(stream.Proven)
	n.next(stream.Proven)
}
