package snapshot

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// noise is n bytes of text that do not compress to nothing.
func noise(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = "0123456789abcdef"[rnd.IntN(16)]
	}
	return string(b)
}

// pushHot pushes and converts an image of two layers with files of several chunks. Their names end in the layer's number.
func pushHot(n *testNode) (testImage, map[string]string) { return pushHotTo(n, "app") }

func pushHotTo(n *testNode, repo string) (testImage, map[string]string) {
	n.t.Helper()
	files := map[string]string{"hot0": noise(1, 700_000), "cold0": noise(2, 700_000), "hot1": noise(3, 500_000), "cold1": noise(4, 300_000)}
	img := n.push(repo,
		tarOf(n.t, file{"hot0", files["hot0"]}, file{"cold0", files["cold0"]}),
		tarOf(n.t, file{"cold1", files["cold1"]}, file{"hot1", files["hot1"]}))
	n.convert(img)
	return img, files
}

// index fetches the index of the image's layer i.
func (n *testNode) index(m *artifact.Manifest, i int) *artifact.Index {
	n.t.Helper()
	x, err := m.Layers[i].Index(n.rawIndex(m, i))
	if err != nil {
		n.t.Fatal(err)
	}
	return x
}

func (n *testNode) rawIndex(m *artifact.Manifest, i int) []byte {
	n.t.Helper()
	return n.blob(m, i)[m.Layers[i].IndexOffset:]
}

// blob fetches the blob of the image's layer i.
func (n *testNode) blob(m *artifact.Manifest, i int) []byte {
	n.t.Helper()
	l := m.Layers[i]
	resp, err := http.Get(n.reg.URL() + "/v2/app/blobs/" + l.Digest.String())
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	blob := make([]byte, 0, l.Size)
	for len(blob) < cap(blob) {
		k, err := resp.Body.Read(blob[len(blob):cap(blob)])
		if blob = blob[:len(blob)+k]; err != nil && len(blob) < cap(blob) {
			n.t.Fatal(err)
		}
	}
	return blob
}

// hotProfile lists the chunks of the hot files, the second layer's first. The kernel reads whole blocks; their padding is in their last chunks.
func (n *testNode) hotProfile(img testImage) *artifact.Profile {
	n.t.Helper()
	m := n.artifactOf(img)
	p := &artifact.Profile{Layers: []digest.Digest{m.Layers[0].IndexDigest, m.Layers[1].IndexDigest}}
	x0, x1 := n.index(m, 0), n.index(m, 1)
	for i := x1.Find(301_056); i <= x1.Find(801_055); i++ {
		p.Chunks = append(p.Chunks, artifact.HotChunk{Layer: 1, Chunk: i})
	}
	for i := x0.Find(512); i <= x0.Find(700_927); i++ {
		p.Chunks = append(p.Chunks, artifact.HotChunk{Layer: 0, Chunk: i})
	}
	return p
}

// attachProfile makes the hot blob of p and attaches both.
func (n *testNode) attachProfile(img testImage, p *artifact.Profile, source string, created time.Time) converter.Profile {
	n.t.Helper()
	place, ref, err := converter.Open(img.ref, converter.OpenOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	got, warnings, err := converter.AttachProfile(context.Background(), place, ref, p, source, created, converter.Options{})
	if err != nil || len(warnings) > 0 {
		n.t.Fatalf("attach: %v, %v", warnings, err)
	}
	return got
}

// blobRequests counts GETs of a blob that it was sent bytes for.
func (n *testNode) blobRequests(dgst digest.Digest) (requests int, bytes int64) {
	return n.reg.Count(func(q registrytest.Request) bool {
		return q.Method == http.MethodGet && strings.HasSuffix(q.Path, dgst.String())
	})
}

func (n *testNode) poll(what string, cond func() bool) {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(end) {
			n.t.Fatalf("no %s in 20 s: %+v", what, n.chunks.Stats())
		}
		time.Sleep(time.Millisecond) // leaves the processor to what we wait for
	}
}

// wantMounted mounts the image's chain and compares files.
func (n *testNode) wantMounted(id string, files map[string]string) {
	n.t.Helper()
	target := n.t.TempDir()
	if err := n.images.Mount(testContext(), id, 2, target); err != nil {
		n.t.Fatal(err)
	}
	defer n.unmount(target)
	wantFiles(n.t, target, files)
}

// unmount unmounts a chain. A mount namespace that somebody else has made meanwhile may keep it in use: that is not ours to wait for.
func (n *testNode) unmount(target string) {
	n.t.Helper()
	if err := n.images.Unmount(target); err != nil && !errors.Is(err, unix.EBUSY) {
		n.t.Error(err)
	}
}

// A pull brings the hot blob, in one request and without one more round trip; what it has is never asked for again.
func TestHotBlob(t *testing.T) {
	n := newTestNode(t)
	img, files := pushHot(n)
	p := n.hotProfile(img)
	hot := n.attachProfile(img, p, artifact.ProfileRecorded, time.Unix(1e9, 0))
	n.reg.Reset()
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	n.poll("hot chunks", func() bool { return n.chunks.Stats().Hot == int64(len(p.Chunks)) })
	if requests, bytes := n.blobRequests(hot.Hot); requests != 1 || bytes != hot.Size {
		t.Errorf("the hot blob was asked for %d times, %d bytes; want once, %d", requests, bytes, hot.Size)
	}
	// Manifest and referrers, the artifact's manifest, the config and the hot blob, which has the indexes.
	if requests, _ := n.reg.Count(); requests != 5 {
		t.Errorf("%d requests, want 5", requests)
	}
	before, _ := n.reg.Count()
	n.wantMounted(id, map[string]string{"hot0": files["hot0"], "hot1": files["hot1"]})
	if after, _ := n.reg.Count(); after != before {
		t.Errorf("reading what the profile lists took %d requests", after-before)
	}
	if misses := n.chunks.Stats().Misses; misses != 0 {
		t.Errorf("%d misses", misses)
	}
	n.wantMounted(id, files)

	// After a restart it is found again, and nothing of the hot blob is missing.
	n.prepareAll(img, 0, "")
	n.restart()
	n.reg.Reset()
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err != nil {
		t.Fatal(err)
	}
	n.wantMounted(id, files)
	if s := n.chunks.Stats(); s.Hot != 0 || s.Requests != 0 {
		t.Errorf("after a restart: %+v, want no request", s)
	}
}

// Recorded before learned before static, newest first; what cannot be used gives way to the next.
func TestBestProfile(t *testing.T) {
	n := newTestNode(t)
	img, files := pushHot(n)
	all := n.hotProfile(img)
	part := func(k int) *artifact.Profile { return &artifact.Profile{Layers: all.Layers, Chunks: all.Chunks[:k]} }
	n.attachProfile(img, part(1), artifact.ProfileStatic, time.Unix(3e9, 0))
	learned := n.attachProfile(img, part(2), artifact.ProfileLearned, time.Unix(2e9, 0))
	recorded := n.attachProfile(img, part(3), artifact.ProfileRecorded, time.Unix(1e9, 0))
	find := func() {
		t.Helper()
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		n.wantMounted(id, map[string]string{"cold1": files["cold1"]})
	}
	find()
	n.poll("the recorded one's chunks", func() bool { return n.chunks.Stats().Hot == 3 })
	if requests, _ := n.blobRequests(learned.Hot); requests != 0 {
		t.Error("the learned one was asked for, too")
	}

	n.stop()
	for _, d := range []string{"cache", "images", "indexes"} {
		if err := os.RemoveAll(filepath.Join(n.root, d)); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, recorded.Hot.String()) }, -1, registrytest.Status(http.StatusNotFound))
	find()
	n.poll("the learned one's chunks", func() bool { return n.chunks.Stats().Hot == 2 })
}

// Profiles that are not what they say cost nothing but themselves.
func TestHostileProfiles(t *testing.T) {
	for name, attach := range map[string]func(n *testNode, img testImage, p *artifact.Profile){
		"of another image": func(n *testNode, img testImage, p *artifact.Profile) {
			other := n.push("app:other", tarOf(n.t, file{"evil", noise(9, 300_000)}))
			n.convert(other)
			m := n.artifactOf(other)
			n.attachHot(img, &artifact.Profile{Layers: []digest.Digest{m.Layers[0].IndexDigest}, Chunks: []artifact.HotChunk{{}}}, nil)
		},
		"chunks that there are not": func(n *testNode, img testImage, p *artifact.Profile) {
			p.Chunks[2].Chunk = 1 << 20
			n.attachHot(img, p, make([]byte, 1000))
		},
		"no frames": func(n *testNode, img testImage, p *artifact.Profile) { n.attachHot(img, p, nil) },
		"wrong frames": func(n *testNode, img testImage, p *artifact.Profile) {
			n.attachHot(img, p, make([]byte, n.framesOf(img, p)))
		},
		"wrong index": func(n *testNode, img testImage, p *artifact.Profile) {
			n.attachHotIndexes(img, &artifact.HotHead{Profile: *p, Indexes: []int64{100, 0}}, make([]byte, 100), make([]byte, n.framesOf(img, p)))
		},
		"a byte behind an index": func(n *testNode, img testImage, p *artifact.Profile) {
			m := n.artifactOf(img)
			raw := append(n.rawIndex(m, 0), 0)
			var frames []byte
			for _, c := range p.Chunks {
				at := n.index(m, c.Layer).Chunk(c.Chunk)
				frames = append(frames, n.blob(m, c.Layer)[at.BlobOffset:][:at.BlobSize]...)
			}
			n.attachHotIndexes(img, &artifact.HotHead{Profile: *p, Indexes: []int64{int64(len(raw)), 0}}, raw, frames)
		},
		"less than its indexes": func(n *testNode, img testImage, p *artifact.Profile) {
			n.attachHotIndexes(img, &artifact.HotHead{Profile: *p, Indexes: []int64{0, 1000}}, nil, nil)
		},
		"indexes without end": func(n *testNode, img testImage, p *artifact.Profile) { // for longer than a search may last
			h := &artifact.HotHead{}
			for i := range 60 {
				h.Layers = append(h.Layers, digest.FromString(strconv.Itoa(i)))
				h.Indexes = append(h.Indexes, artifact.MaxHotIndex)
			}
			n.slow(n.attachHotIndexes(img, h, make([]byte, 60*artifact.MaxHotIndex), nil), 3<<20)
		},
		"long heads": func(n *testNode, img testImage, p *artifact.Profile) { // likewise, all of them
			for i := range 4 {
				h := &artifact.HotHead{Profile: artifact.Profile{Layers: p.Layers}, Indexes: make([]int64, len(p.Layers))}
				for k := range artifact.MaxHotChunks {
					h.Chunks = append(h.Chunks, artifact.HotChunk{Layer: k % 2, Chunk: i + k/2})
				}
				raw, err := h.Encode()
				if err != nil {
					n.t.Fatal(err)
				}
				copy(raw[len(raw)-8:], raw[len(raw)-24:]) // a chunk twice
				n.slow(n.attachHotBlob(img, raw), 1<<20)
			}
		},
		"another header": func(n *testNode, img testImage, p *artifact.Profile) { n.attachHotBlob(img, []byte(noise(8, 1000))) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			img, files := pushHot(n)
			attach(n, img, n.hotProfile(img))
			id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
			if err != nil {
				t.Fatal(err)
			}
			n.wantMounted(id, files)
			if s := n.chunks.Stats(); s.Hot != 0 {
				t.Errorf("%d chunks were taken from it", s.Hot)
			}
		})
	}
}

// slow makes the registry give a blob at so many bytes a second.
func (n *testNode) slow(dgst digest.Digest, rate int) {
	n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, dgst.String()) }, -1, registrytest.Throttle(rate/50, 20*time.Millisecond))
}

func (n *testNode) framesOf(img testImage, p *artifact.Profile) (size int64) {
	m := n.artifactOf(img)
	for _, c := range p.Chunks {
		size += n.index(m, c.Layer).Chunk(c.Chunk).BlobSize
	}
	return size
}

// attachHot attaches a hot blob with these frames, whatever they are.
func (n *testNode) attachHot(img testImage, p *artifact.Profile, frames []byte) {
	n.t.Helper()
	n.attachHotIndexes(img, &artifact.HotHead{Profile: *p, Indexes: make([]int64, len(p.Layers))}, nil, frames)
}

// attachHotIndexes attaches a hot blob with these indexes and frames, whatever they are.
func (n *testNode) attachHotIndexes(img testImage, h *artifact.HotHead, indexes, frames []byte) digest.Digest {
	n.t.Helper()
	raw, err := h.Encode()
	if err != nil {
		n.t.Fatal(err)
	}
	return n.attachHotBlob(img, slices.Concat(raw, indexes, frames))
}

// attachHotBlob attaches a profile with this hot blob.
func (n *testNode) attachHotBlob(img testImage, hot []byte) digest.Digest {
	n.t.Helper()
	m := artifact.ProfileManifest{
		Subject: n.artifactOf(img).Subject,
		Hot:     ocispec.Descriptor{Digest: n.reg.PutBlob("app", hot), Size: int64(len(hot))}, Source: artifact.ProfileRecorded,
	}
	n.reg.PutBlob("app", ocispec.DescriptorEmptyJSON.Data)
	raw, err := m.Encode()
	if err != nil {
		n.t.Fatal(err)
	}
	n.reg.PutManifest("app", "", ocispec.MediaTypeImageManifest, raw)
	return m.Hot.Digest
}

// A hot blob that stalls holds up neither the pull nor the container, nor the end of the daemon.
func TestHotBlobStalls(t *testing.T) {
	for _, after := range []int64{-1, 10, 400_000} {
		n := newTestNode(t)
		img, files := pushHot(n)
		hot := n.attachProfile(img, n.hotProfile(img), artifact.ProfileRecorded, time.Unix(1e9, 0))
		n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, hot.Hot.String()) }, -1, registrytest.Stall(after))
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		n.wantMounted(id, files)
		n.restart()
	}
}

// An image that is forgotten while its hot blob comes, from two repositories, leaves nothing.
func TestForgetEndsHotBlob(t *testing.T) {
	n := newTestNode(t)
	img, _ := pushHot(n)
	other, _ := pushHotTo(n, "other")
	hot := n.attachProfile(img, n.hotProfile(img), artifact.ProfileRecorded, time.Unix(1e9, 0))
	n.attachProfile(other, n.hotProfile(img), artifact.ProfileRecorded, time.Unix(1e9, 0))
	n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, hot.Hot.String()) }, -1, registrytest.Stall(400_000))
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	n.poll("some hot chunks", func() bool { return n.chunks.Stats().Hot > 0 })
	if again, _, err := n.images.Find(testContext(), other.ref, other.manifest); err != nil || again != id {
		t.Fatalf("found %s, %v, want %s", again, err, id)
	}
	if err := n.images.Forget(id); err != nil {
		t.Fatal(err)
	}
	n.poll("empty cache", func() bool {
		left, err := filepath.Glob(filepath.Join(n.root, "cache", "sha256-*"))
		return err == nil && len(left) == 0
	})
}
