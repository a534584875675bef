package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRefusalNamesLayerAndEntry(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("a")...)).with(t, tarOf(t, parseEntries("d/ b=>d/a")...))
	_, err := Merge(context.Background(), c.layers, 512)
	want := `layer 1: entry "b": layer cannot be streamed: link target "d/a": no such file or directory`
	if !errors.Is(err, ErrRefused) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLimits(t *testing.T) {
	links := parseEntries("f" + strings.Repeat(" h=>f", 1))
	for i := range maxLinks {
		links = append(links, &tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint("links/", i), Linkname: "f"})
	}
	for name, entries := range map[string][]*tar.Header{
		"links": links,
		"path":  parseEntries(strings.Repeat("n/", maxPath/2) + "x"),
		"xattr": {{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{xattrRecord + "user.a": strings.Repeat("v", maxXattr+1)}}},
		"xattrs": {{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{
			xattrRecord + "user.a": strings.Repeat("v", maxXattr), xattrRecord + "user.b": strings.Repeat("v", maxXattr), xattrRecord + "user.c": strings.Repeat("v", maxXattr)}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := chain{}.with(t, tarOf(t, entries...))
			if _, err := Merge(context.Background(), c.layers, 512); !errors.Is(err, ErrRefused) {
				t.Errorf("got %v, want ErrRefused", err)
			}
		})
	}
}

func TestTooManySteps(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("t/d/d/d/f l->t k->l")...))
	s := source{entries: func() entryReader { return c.layers[0].Index.Entries() }, tarSize: c.layers[0].Index.TarSize}
	f := &files{blockSize: 512, scattered: map[*node]scattered{}}
	root, err := applyLayer(context.Background(), &s, nil, f)
	if err != nil {
		t.Fatal(err)
	}
	for f.steps = 0; ; {
		_, err := f.resolve(root, "k/d/d/d/f")
		if errors.Is(err, errTooManySteps) {
			break
		}
		if err != nil || f.steps == 0 || f.steps > maxSteps+100 {
			t.Fatalf("got %v after %d steps", err, f.steps)
		}
		f.steps += maxSteps / 8
	}
}

// A sparse map of a few bytes a run is held as 24: what maps hold counts, and so does what symlinks and names do.
func TestSparseMapsAreCounted(t *testing.T) {
	c := chain{}.with(t, sparseTar(3000, 0, 1, 1000, 1, 2000, 1))
	s := source{entries: func() entryReader { return c.layers[0].Index.Entries() }, tarSize: c.layers[0].Index.TarSize}
	for held, want := range map[int]bool{0: false, maxHeld - 2*runSize: true} {
		f := &files{blockSize: 512, scattered: map[*node]scattered{}, held: held}
		if _, err := applyLayer(context.Background(), &s, nil, f); errors.Is(err, ErrRefused) != want {
			t.Errorf("with %d bytes held before: got %v, want refused %v", held, err, want)
		}
	}
}

func TestCancelled(t *testing.T) {
	c := chain{}.with(t, tarOf(t, parseEntries("a")...))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Merge(ctx, c.layers, 512); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestNoLayers(t *testing.T) {
	root, err := Merge(context.Background(), nil, 512)
	if err != nil || root.Mode != unix.S_IFDIR|0o755 || len(root.Entries) != 0 {
		t.Errorf("got %+v, %v; want an empty directory", root, err)
	}
}
