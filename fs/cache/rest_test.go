package cache

import (
	"os"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// A cache that nobody reads saves what there is to save, forgets what only fetches need, says so once, and does nothing more, with its layers open. A read ends that.
func TestRest(t *testing.T) {
	ly, same := newLayer(t, 64<<10, 1<<20), newLayer(t, 64<<10, 1<<20)
	synctest.Test(t, func(t *testing.T) { // with a clock of its own
		rests := 0
		c, err := Open(t.TempDir(), Options{OnRest: func() { rests++ }})
		must(t, err)
		l := openLayer(t, c, ly, ly.serve())
		openLayer(t, c, same, same.serve())
		for want := 1; want <= 2; want++ {
			readAll(t, l, ly, 100_000)
			needed, others := layoutOf(t, l.store.index), layoutOf(t, same.index)
			used := now()
			let(flushAfter + (restAfter+1)*time.Second)
			if b, err := os.ReadFile(c.usesPath(ly.dgst)); err != nil || len(b) != 4*l.store.n || l.store.usesSaved != used {
				t.Errorf("uses of %d are on disk, want %d; %d bytes, %v", l.store.usesSaved, used, len(b), err)
			}
			if n := checkMap(t, c.layerDir(ly.dgst), ly); n != l.store.n {
				t.Errorf("the map has %d chunks, want %d", n, l.store.n)
			}
			runtime.GC()
			if needed.Value() != nil || others.Value() != nil || rests != want {
				t.Errorf("a minute after a read, what fetches need is there: %t, another opener's: %t; %d rests, want %d", needed.Value() != nil, others.Value() != nil, rests, want)
			}
			c.stats.suspended.Store(true) // a flush ends that
			let(24 * time.Hour)
			if !c.stats.suspended.Swap(false) || rests != want {
				t.Errorf("the cache does something at rest; %d rests, want %d", rests, want)
			}
		}
		must(t, c.Close())
	})
}

// A disk that refuses is tried again, also if nobody reads.
func TestRefusingDiskIsTriedAgain(t *testing.T) {
	ly := newLayer(t, 64<<10, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		d := &faultyDisk{disk: osDisk{}, err: syscall.EROFS, forever: true}
		c, err := open(t.TempDir(), Options{}, d)
		must(t, err)
		l := openLayer(t, c, ly, ly.serve())
		readAll(t, l, ly, 100_000)
		let(24 * time.Hour)
		d.ops.Store(-1 << 40)
		let(2 * flushAfter)
		if l.store.data == nil || checkMap(t, c.layerDir(ly.dgst), ly) == 0 || c.Status().NotCaching {
			t.Errorf("nothing is cached after the disk is well again: %+v", c.Status())
		}
		must(t, c.Close())
	})
}

func layoutOf(t *testing.T, x *artifact.Index) weak.Pointer[artifact.Layout] {
	t.Helper()
	layout, err := x.Layout()
	must(t, err)
	return weak.Make(layout)
}

// let lets time pass.
func let(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
