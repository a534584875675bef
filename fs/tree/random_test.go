package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// stackResult counts stacks, and what became of their layers.
type stackResult struct{ stacks, applied, refused, host int }

// checkStack generates layers and compares what becomes of them. A layer that containerd refuses must be refused; then
// its first half is tried.
func checkStack(t testing.TB, c chooser, result *stackResult) {
	t.Helper()
	result.stacks++
	g := &generator{chooser: c}
	o := newOracle(t)
	var stack chain
	var accepted string
	var last *erofs.Inode
	for range 1 + g.IntN(5) {
		for entries := g.layer(); ; entries = entries[:len(entries)/2] {
			b := tarOf(t, entries...)
			next := stack.with(t, b)
			tree, err := Merge(context.Background(), next.layers, 512)
			if errors.Is(err, errHost) {
				result.host++
				continue
			}
			refused := o.apply(t, b)
			if (refused != nil) != (err != nil) || err != nil && !errors.Is(err, ErrRefused) {
				t.Fatalf("containerd: %v\ntree: %v\n%s%s", refused, err, accepted, describe(entries))
			}
			if refused != nil {
				result.refused++
				continue
			}
			result.applied++
			stack = next
			accepted += describe(entries)
			last = tree
			if o.differ(t, o.walk(t), stack.list(t, tree)) {
				t.Fatal(accepted)
			}
			break
		}
	}
	// What the kernel makes of the metadata image must be the same again.
	if o.differ(t, o.walk(t), o.walkImage(t, stack, last)) {
		t.Fatal(accepted)
	}
}

func describe(entries []*tar.Header) string {
	var b strings.Builder
	b.WriteString("layer:\n")
	for _, h := range entries {
		fmt.Fprintf(&b, "  %c %q -> %q %o %d:%d %d:%d %v %d %q\n", h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.Devmajor, h.Devminor, h.ModTime.UnixNano(), h.Size, h.PAXRecords)
	}
	return b.String()
}

// TestRandomStacks compares generated stacks of layers with containerd and overlayfs; with FULL set, thousands.
func TestRandomStacks(t *testing.T) {
	stacks := 150
	if os.Getenv("FULL") != "" {
		stacks = 4000
	}
	var result stackResult
	for seed := range uint64(stacks) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			checkStack(t, rand.New(rand.NewPCG(seed, 0)), &result)
		})
	}
	t.Logf("%d layers compared, %d refused by both, %d left out", result.applied, result.refused, result.host)
	if !t.Failed() && (result.applied < result.stacks || result.host > result.applied/10) {
		t.Errorf("the generator refuses too much: %+v", result)
	}
}

// FuzzStack is TestRandomStacks with a fuzzer's choices.
func FuzzStack(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		checkStack(t, &bytesChooser{b}, &stackResult{})
	})
}

func addSeeds(f *testing.F) {
	f.Add([]byte{})
	r := rand.New(rand.NewPCG(1, 1))
	for range 16 {
		b := make([]byte, 300)
		for i := range b {
			b[i] = byte(r.IntN(256))
		}
		f.Add(b)
	}
}

// FuzzMerge merges what FuzzStack does, and entries that no tar has, without comparing: whatever the layers say, the tree
// must be one that can be written.
func FuzzMerge(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &bytesChooser{b}
		g := &generator{chooser: c}
		var layers []source
		for range 1 + g.IntN(5) {
			entries := entryList{}
			for _, h := range g.layer() {
				e := &artifact.Entry{Header: h, DataOffset: int64(g.IntN(4)) * 512, DataSize: h.Size}
				if h.Typeflag == tar.TypeReg && oneIn(g, 4) {
					at := int64(g.IntN(1024))
					e.Sparse = []artifact.SparseRun{{FileOffset: at, TarOffset: at, Size: max(0, h.Size-at)}}
				}
				entries = append(entries, e)
			}
			layer := source{tarSize: 8192, readAt: func(_ context.Context, p []byte, off int64) (int, error) { return len(p), nil }}
			layer.entries = func() entryReader { l := entries; return &l }
			layers = append(layers, layer)
		}
		root, err := merge(context.Background(), layers, 512)
		if err != nil {
			if !errors.Is(err, ErrRefused) && !errors.Is(err, artifact.ErrInvalid) {
				t.Errorf("got %v, want ErrRefused or ErrInvalid", err)
			}
			return
		}
		checkWritable(t, root, 8192)
	})
}

// entryList is an entryReader of entries that no index need have.
type entryList []*artifact.Entry

func (l *entryList) Next() (*artifact.Entry, error) {
	if len(*l) == 0 {
		return nil, io.EOF
	}
	e := (*l)[0]
	*l = (*l)[1:]
	return e, nil
}

func (l *entryList) Close() {}
