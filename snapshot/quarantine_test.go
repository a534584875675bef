package snapshot

import (
	"errors"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// TestQuarantineEndsReads: a read that waits for a registry gets its error when the artifact turns out to lie, also of another image that has the lying layer, however long the registry takes.
func TestQuarantineEndsReads(t *testing.T) {
	inAllModes(t, func(t *testing.T, n *testNode) {
		n.background, n.budget = 0, time.Hour // no proof is due
		n.restart()
		img, _ := n.pushForged("app")
		other, _ := n.pushForged("other", tarOf(t, file{"more", "more"}))
		roots := []string{n.container("container", n.prepareAll(img, 0, "")), n.container("other", n.prepareAll(other, 0, ""))}
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		lowest := n.layersOf(img)[0].Digest.String()
		data := func(r *http.Request) bool { return registrytest.Blobs(r) && path.Base(r.URL.Path) == lowest }
		n.reg.Inject(data, -1, registrytest.Stall(-1))
		reads := make(chan error, len(roots))
		for _, root := range roots {
			go func() {
				_, err := os.ReadFile(filepath.Join(root, "base"))
				reads <- err
			}()
		}
		n.until("reads wait", func() bool { return n.chunks.Stats().Waiting >= int64(len(roots)) })
		if err := n.images.Prove(testContext(), id, func(int64) {}); !errors.Is(err, stream.ErrQuarantined) {
			t.Errorf("%v", err)
		}
		for range roots {
			select {
			case err := <-reads:
				if !errors.Is(err, unix.EIO) {
					t.Errorf("a read ends with %v", err)
				}
			case <-time.After(time.Minute):
				t.Fatal("a read waits on")
			}
		}
	})
}

// TestPanicInProof: a mistake of ours in what reads artifacts ends no daemon.
func TestPanicInProof(t *testing.T) {
	n := provingNode(t, fs.ModeFile)
	img := n.push("app", honestLayers(t)...)
	n.convert(img)
	id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.images.Prove(testContext(), id, func(int64) { panic("a mistake") }); err == nil || !strings.Contains(err.Error(), "a mistake") {
		t.Errorf("%v", err)
	}
	if err := n.images.Prove(testContext(), id, func(int64) {}); err != nil {
		t.Error(err)
	}
}
