package snapshot

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// filesIn lists all regular files below the node's images and indexes.
func (n *testNode) filesIn(dirs ...string) (found []string) {
	n.t.Helper()
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(n.root, dir), func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				found = append(found, path)
			}
			return err
		})
		if err != nil {
			n.t.Fatal(err)
		}
	}
	return found
}

// An artifact whose indexes would fill the disk is refused before any is fetched.
func TestIndexesBeyondTheLimit(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	bad := *n.artifactOf(img)
	n.deleteArtifact(img)
	for i := range bad.Layers {
		l := &bad.Layers[i]
		l.IndexSize = 200 << 20
		l.Size = l.IndexOffset + l.IndexSize
	}
	n.attach(bad)
	n.reg.Reset()
	_, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err == nil || !strings.Contains(err.Error(), "512 MiB") {
		t.Errorf("got %v, want the limit", err)
	}
	ranged := func(q registrytest.Request) bool { return q.Range != "" }
	if got, _ := n.reg.Count(ranged); got != 0 {
		t.Errorf("%d indexes were asked for", got)
	}
}

// What was fetched for an artifact that is then refused does not stay on disk.
func TestRefusedLeavesNothing(t *testing.T) {
	for name, tars := range map[string][][]byte{
		"by its tree": {tarOf(t, file{"a", "a"}), tarOf(t, file{"b", "b"}, file{".wh.b", ""})},
		"by an index": threeLayers(t),
	} {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			img := n.push("app", tars...)
			n.convert(img)
			if name == "by an index" {
				bad := *n.artifactOf(img)
				n.deleteArtifact(img)
				bad.Layers[2].IndexDigest = bad.Layers[1].IndexDigest
				n.attach(bad)
			}
			if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err == nil {
				t.Fatal("the artifact was taken")
			}
			if left := n.filesIn("images", "indexes"); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// A search that fails takes nothing from the snapshots that an earlier one has made.
func TestFailedSearchKeepsWhatIsUsed(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	n.restart()
	for _, f := range n.filesIn("images") {
		if strings.HasSuffix(f, ".erofs") { // it must be made again, and cannot
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(f, 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err == nil {
		t.Fatal("a metadata image was made where a directory is")
	}
	dirs, err := filepath.Glob(filepath.Join(n.root, "images", "*", "*.erofs"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("the image in use is gone: %v, %v", dirs, err)
	}
	if err := os.Remove(dirs[0]); err != nil {
		t.Fatal(err)
	}
	mounts, err := n.sn.Prepare(testContext(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
}

// However many artifacts there are that cannot be used, one line says so.
func TestManyRefusedArtifacts(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	bad := *n.artifactOf(img)
	n.deleteArtifact(img)
	for i := range 40 {
		bad.Layers[0].IndexDigest = digest.FromString(string(rune('a' + i)))
		n.attach(bad)
	}
	_, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err == nil || len(err.Error()) > 4000 || !strings.Contains(err.Error(), "and 36 artifacts more") {
		t.Errorf("got %v, want some reasons and the number of the others", err)
	}
}

// A registry that does not answer holds a normal pull up once, not at each of its layers.
func TestStallsOnce(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...)
	n.convert(img)
	n.reg.Inject(registrytest.Referrers, -1, registrytest.Stall(-1))
	n.reg.Reset()
	for i := range 3 {
		if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err == nil {
			t.Fatalf("search %d found what could not be read", i)
		}
	}
	searches, _ := n.reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/manifests/") })
	if searches != 1 {
		t.Errorf("%d searches, want 1", searches)
	}
}

// twoIndexes makes of the artifacts of two images with the same layer artifacts that name one blob, and two valid indexes in it.
func (n *testNode) twoIndexes(a, b *artifact.Manifest) {
	n.t.Helper()
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	l := a.Layers[0]
	blob, err := client.Blob(context.Background(), registryclient.Repository(n.reg.Host()+"/app"), l.Digest, l.Size)
	if err != nil {
		n.t.Fatal(err)
	}
	// The second ends the last chunk's frame behind the first, which is a skippable frame to zstd.
	const table, entry, frameEnd = 72, 48, 8
	second := append([]byte(nil), blob[l.IndexOffset:]...)
	last := table + (int(binary.LittleEndian.Uint32(second[20:]))-1)*entry
	binary.LittleEndian.PutUint64(second[last+frameEnd:], uint64(len(blob)))
	dgst := n.reg.PutBlob("app", append(blob, second...))
	a.Layers[0].Digest, b.Layers[0].Digest = dgst, dgst
	b.Layers[0].IndexOffset = l.Size
	b.Layers[0].Size = l.Size + l.IndexSize
	b.Layers[0].IndexDigest = digest.FromBytes(second)
}

// An artifact that names another's blob, with an index of its own, takes neither the index nor the chunks from it.
func TestBlobOfAnother(t *testing.T) {
	n := newTestNode(t)
	layer := tarOf(t, file{"etc/", ""}, file{"etc/base", "from the base"})
	victim := n.push("app", layer)
	other := n.push("app:other", layer, tarOf(t, file{"more", ""}))
	n.convert(victim)
	n.convert(other)
	a, b := *n.artifactOf(victim), *n.artifactOf(other)
	n.deleteArtifact(victim)
	n.deleteArtifact(other)
	n.twoIndexes(&a, &b)
	n.attach(a)
	n.attach(b)
	start := func(key, parent string) {
		t.Helper()
		mounts, err := n.sn.Prepare(testContext(), key, parent)
		if err != nil {
			t.Fatal(err)
		}
		inMounts(t, mounts, func(root string) { wantFiles(t, root, map[string]string{"etc/base": "from the base"}) })
	}
	top := n.prepareAll(victim, 0, "")
	start("first", top)
	n.restart()
	otherTop := n.prepareAll(other, 0, "")
	mounts, err := n.sn.Prepare(testContext(), "other", otherTop)
	if err != nil {
		t.Fatal(err)
	}
	inMounts(t, mounts, func(string) {
		n.reg.Close() // all that the victim needs is on this node
		start("second", top)
	})
}
