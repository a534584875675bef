package snapshot

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The usage of all snapshots is what the disk has of the images, each byte once, before and after they are read.
func TestUsage(t *testing.T) {
	n := newTestNode(t)
	layers := threeLayers(t)
	img := n.push("app", layers...)
	other := n.push("other", layers[0], layers[1], tarOf(t, file{"another", "another top"}))
	n.convert(img)
	n.convert(other)
	tops := []string{n.prepareAll(img, 0, "")}
	tops = append(tops, n.prepareAll(other, 0, ""))
	last := int64(0)
	for round, read := range []map[string]string{nil, {"etc/base": "from the base"}, {"another": "another top"}} {
		if round > 0 {
			mounts, err := n.sn.Prepare(testContext(), fmt.Sprint("container", round), tops[round-1])
			if err != nil {
				t.Fatal(err)
			}
			inMounts(t, mounts, func(root string) { wantFiles(t, root, read) })
		}
		var got int64
		n.poll("usage that is what the disk has", func() bool { // which a file system that allocates late changes at any moment
			got = 0
			for _, name := range n.names() {
				u, err := n.sn.Usage(testContext(), name)
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasPrefix(name, "container") {
					got += u.Size
				}
			}
			return got == n.blocks("cache")+n.blocks("indexes")+n.blocks("images")
		})
		if got <= last {
			t.Errorf("round %d: usage is %d, the round before had %d", round, got, last)
		}
		last = got
	}
}

// blocks returns the bytes that regular files below dir have on disk, without records.
func (n *testNode) blocks(dir string) (total int64) {
	err := filepath.WalkDir(filepath.Join(n.root, dir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && filepath.Ext(d.Name()) != ".json" && filepath.Ext(d.Name()) != ".part" {
			var fi fs.FileInfo
			if fi, err = d.Info(); err == nil {
				total += fi.Sys().(*syscall.Stat_t).Blocks * 512
			}
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return total
}
