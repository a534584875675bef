package snapshot

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// A host that begins to ignore ranges under a container is read once as a whole: the image's own layer is.
func TestRangesIgnored(t *testing.T) {
	n := newTestNode(t)
	source := rand.NewChaCha8([32]byte{1})
	want := map[string]string{}
	var files []file
	for _, name := range []string{"a", "b", "c", "d"} {
		b := make([]byte, 1<<20)
		source.Read(b)
		want[name] = string(b)
		files = append(files, file{name, want[name]})
	}
	img := n.push("app", tarOf(t, files...))
	n.convert(img)
	top := n.prepareAll(img, 0, "")
	mounts, err := n.sn.Prepare(testContext(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	n.reg.Reset()
	n.reg.Inject(registrytest.Blobs, -1, registrytest.IgnoreRange())
	inMounts(t, mounts, func(root string) { wantFiles(t, root, want) })
	layer := n.artifactOf(img).Layers[0].Source.String()
	if got, _ := n.reg.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, layer) }); got != 1 {
		t.Errorf("the image's layer was asked for %d times, want once", got)
	}
}
