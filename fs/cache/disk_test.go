package cache

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// unsynced is a disk that syncs nothing, for the time it takes.
type unsynced struct{ osDisk }

type unsyncedFile struct{ file }

func (d unsynced) open(path string) (file, error) {
	f, err := d.osDisk.open(path)
	return unsyncedFile{f}, err
}

func (unsyncedFile) datasync() error { return nil }

// faultyDisk fails operation number at, counted from 0, and all after it if forever.
type faultyDisk struct {
	disk
	err     error
	at      int64
	forever bool
	kill    bool // the process dies instead, by SIGKILL
	ops     atomic.Int64
}

// fault is called before each operation; part does what of one is done when it fails.
func (d *faultyDisk) fault(part func()) error {
	if n := d.ops.Add(1) - 1; n != d.at && (!d.forever || n < d.at) {
		return nil
	}
	if part != nil {
		part()
	}
	if d.kill {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return d.err
}

func (d *faultyDisk) open(path string) (file, error) {
	if err := d.fault(nil); err != nil {
		return nil, err
	}
	f, err := d.disk.open(path)
	return &faultyFile{f, d}, err
}

func (d *faultyDisk) rename(from, to string) error {
	if err := d.fault(nil); err != nil {
		return err
	}
	return d.disk.rename(from, to)
}

func (d *faultyDisk) remove(path string) error {
	if err := d.fault(nil); err != nil {
		return err
	}
	return d.disk.remove(path)
}

type faultyFile struct {
	file
	disk *faultyDisk
}

func (f *faultyFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.disk.fault(nil); err != nil {
		return 0, err
	}
	return f.file.ReadAt(p, off)
}

func (f *faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.disk.fault(func() { f.file.WriteAt(p[:len(p)/2], off) }); err != nil {
		return len(p) / 2, err
	}
	return f.file.WriteAt(p, off)
}

func (f *faultyFile) size() (int64, error) {
	if err := f.disk.fault(nil); err != nil {
		return 0, err
	}
	return f.file.size()
}

func (f *faultyFile) truncate(size int64) error {
	if err := f.disk.fault(nil); err != nil {
		return err
	}
	return f.file.truncate(size)
}

func (f *faultyFile) datasync() error {
	if err := f.disk.fault(nil); err != nil {
		return err
	}
	return f.file.datasync()
}

func (f *faultyFile) punch(off, n int64) error {
	if err := f.disk.fault(func() { f.file.punch(off, n/2) }); err != nil {
		return err
	}
	return f.file.punch(off, n)
}

// Every operation on the disk fails in turn, once or from there on. Reads never notice; what is left on disk is true.
func TestFailingDiskCostsOnlyTheCaching(t *testing.T) {
	ly := newLayer(t, 4<<10, 40_000, 100, 9000)
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
		for _, forever := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/forever=%v", errno, forever), func(t *testing.T) {
				for at := int64(0); ; at++ {
					dir := t.TempDir()
					d := &faultyDisk{disk: unsynced{}, err: errno, at: at, forever: forever}
					c, err := open(dir, Options{}, d)
					must(t, err)
					scenario(t, c, ly)
					failed := d.ops.Load() > at
					if failed != (c.Err() != nil) || failed && !errors.Is(c.Err(), errno) {
						t.Errorf("operation %d: Err is %v", at, c.Err())
					}
					if failed != (c.Stats().DiskErrors > 0) {
						t.Errorf("operation %d: %d disk errors counted", at, c.Stats().DiskErrors)
					}
					checkMap(t, c.layerDir(ly.dgst), ly)
					must(t, c.Close())
					c = openCache(t, dir)
					readAll(t, openLayer(t, c, ly, ly.serve()), ly, 6000)
					must(t, c.Close())
					if !failed {
						if at < 10 {
							t.Fatalf("the scenario has only %d operations", at)
						}
						break
					}
				}
			})
		}
	}
}

// scenario opens a layer twice, reads all of it both times, and flushes in between. Closing may fail with the disk.
func scenario(t *testing.T, c *Cache, ly *layer) {
	t.Helper()
	for range 2 {
		l := openLayer(t, c, ly, ly.serve())
		readAll(t, l, ly, 10_000)
		poll(t, "end of the fills", l.store.idle)
		c.flush()
		readAll(t, l, ly, 10_000)
		poll(t, "end of the fills", l.store.idle)
		if err := l.Close(); err != nil && c.Err() == nil {
			t.Errorf("Close: %v, and Err is nil", err)
		}
	}
}

// checkMap compares each chunk that the map in dir claims, if it is one, with the tar.
func checkMap(t *testing.T, dir string, ly *layer) (claimed int) {
	t.Helper()
	m, err := os.ReadFile(filepath.Join(dir, "map"))
	if errors.Is(err, os.ErrNotExist) || len(m) == 0 {
		return 0
	}
	must(t, err)
	present, err := decodeMap(encodeMapHeader(ly.index, identity(ly.index)), ly.index.NumChunks(), m)
	if err != nil {
		return 0
	}
	data, err := os.ReadFile(filepath.Join(dir, "data"))
	if errors.Is(err, os.ErrNotExist) {
		data, err = os.ReadFile(filepath.Join(dir, "whole"))
	}
	must(t, err)
	for i := range ly.index.NumChunks() {
		if !present.has(i) {
			continue
		}
		claimed++
		c := ly.index.Chunk(i)
		if !slices.Equal(data[c.TarOffset:][:c.TarSize], ly.tar[c.TarOffset:][:c.TarSize]) {
			t.Errorf("the map claims chunk %d, whose bytes are wrong", i)
		}
	}
	return claimed
}

// A disk that is full costs no fetch per read of the same place, and is tried again with the next flush.
func TestFullDisk(t *testing.T) {
	ly := newLayer(t, 64<<10, 4<<20)
	d := &faultyDisk{disk: osDisk{}, err: syscall.ENOSPC, at: 1 << 40}
	c, err := open(t.TempDir(), Options{}, d)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	read := func(i int) (requests int64) {
		before := b.requests.Load()
		readRange(t, l, ly, make([]byte, 10), ly.index.Chunk(i).TarOffset)
		poll(t, "end of the fill", l.store.idle)
		return b.requests.Load() - before
	}
	d.at = d.ops.Load() // the write of the first chunk
	for i := 0; i < 60; i += 3 {
		if n := read(i); n != 1 {
			t.Errorf("chunk %d: %d requests, want 1", i, n)
		}
		if n := read(i); n != 0 {
			t.Errorf("chunk %d again: %d requests, want 0", i, n)
		}
	}
	if n := read(0); n != 1 {
		t.Errorf("a chunk read long ago: %d requests, want 1: memory is bounded", n)
	}
	if n, err := c.Usage(ly.dgst); err != nil || n > 64<<10 {
		t.Errorf("%d bytes (%v) on a disk that is full", n, err)
	}
	c.flush()
	read(1)
	if !l.store.verified.has(1) {
		t.Error("nothing is cached after the disk has room again")
	}
}

// On a disk that is read-only what is cached is read, and once it is not any more, the rest is cached again. The going and the coming are told once each.
func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	must(t, unix.Mount("cache", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	ly := newLayer(t, 4<<10, 100_000)
	c, err := Open(dir, Options{NoReadAhead: true})
	must(t, err)
	l := openLayer(t, c, ly, ly.serve())
	readRange(t, l, ly, make([]byte, 50_000), 0)
	must(t, c.Close())
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))

	var told []string
	c, err = Open(dir, Options{NoReadAhead: true, OnDisk: func(failing bool, err error) {
		told = append(told, fmt.Sprint(failing, errors.Is(err, unix.EROFS)))
	}})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	b := ly.serve()
	l = openLayer(t, c, ly, b)
	readRange(t, l, ly, make([]byte, 50_000), 0)
	if n := b.requests.Load(); n != 0 {
		t.Errorf("%d requests for what is cached", n)
	}
	for off := int64(60_000); off < 100_000; off += 10_000 {
		readRange(t, l, ly, make([]byte, 10), off)
		poll(t, "end of the fill", l.store.idle)
		c.flush()
	}
	if s := c.Status(); !s.NotCaching || !errors.Is(s.Err, unix.EROFS) {
		t.Errorf("status %+v of a read-only disk", s)
	}
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT, ""))
	c.flush()
	readRange(t, l, ly, make([]byte, len(ly.tar)), 0)
	poll(t, "end of the fills", l.store.idle)
	c.flush()
	if s := c.Status(); s.NotCaching || !l.store.verified.hasAll(0, l.store.n) {
		t.Errorf("status %+v of a disk that is writable again", s)
	}
	if want := []string{"true true", "false true"}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

// volatileDisk remembers what was written since the last sync, to tell what a power loss may leave.
type volatileDisk struct {
	disk
	meanwhile func() // called before each datasync returns, if not nil
	written   func() // called before each write returns, if not nil

	mu    sync.Mutex
	lose  bool // the next datasync fails, and what it should have saved is gone
	files map[string]*volatileFile
}

type volatileFile struct {
	file
	disk *volatileDisk
	undo []undo // since the last datasync; guarded by disk.mu
}

type undo struct {
	off int64
	old []byte
}

func (d *volatileDisk) open(path string) (file, error) {
	f, err := d.disk.open(path)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files[path] = &volatileFile{file: f, disk: d}
	return d.files[path], nil
}

func (d *volatileDisk) remove(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.files, path)
	return d.disk.remove(path)
}

func (f *volatileFile) WriteAt(p []byte, off int64) (int, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	old := make([]byte, len(p))
	if _, err := f.file.ReadAt(old, off); err != nil && err != io.EOF {
		return 0, err
	}
	f.undo = append(f.undo, undo{off, old})
	n, err := f.file.WriteAt(p, off)
	if written := f.disk.written; written != nil {
		f.disk.mu.Unlock()
		written()
		f.disk.mu.Lock()
	}
	return n, err
}

func (f *volatileFile) punch(off, n int64) error {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	old := make([]byte, n)
	m, err := f.file.ReadAt(old, off)
	if err != nil && err != io.EOF {
		return err
	}
	f.undo = append(f.undo, undo{off, old[:m]})
	return f.file.punch(off, n)
}

func (f *volatileFile) datasync() error {
	f.disk.mu.Lock()
	lost, undo := f.disk.lose, f.undo
	f.disk.lose, f.undo = false, nil
	f.disk.mu.Unlock()
	if lost {
		for _, u := range slices.Backward(undo) {
			if _, err := f.file.WriteAt(u.old, u.off); err != nil {
				return err
			}
		}
		return syscall.EIO
	}
	if f.disk.meanwhile != nil {
		f.disk.meanwhile()
	}
	return nil
}

// crash writes to dir what a power loss now might leave: of each sector written since the last sync, either the old or the new.
func (d *volatileDisk) crash(t *testing.T, dir string, rnd *rand.Rand) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o700))
	d.mu.Lock()
	defer d.mu.Unlock()
	for path, f := range d.files {
		b, err := os.ReadFile(path)
		must(t, err)
		for _, u := range slices.Backward(f.undo) {
			for s := 0; s < len(u.old); s += 512 {
				if rnd.IntN(2) == 0 {
					copy(b[u.off+int64(s):], u.old[s:min(s+512, len(u.old))])
				}
			}
		}
		must(t, os.WriteFile(filepath.Join(dir, filepath.Base(path)), b, 0o600))
	}
}

func TestPowerLossLeavesNoFalseClaim(t *testing.T) {
	ly := newLayer(t, 4<<10, 300_000)
	claimed := 0
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		root := t.TempDir()
		d := &volatileDisk{disk: unsynced{}, files: make(map[string]*volatileFile)}
		c, err := open(filepath.Join(root, "cache"), Options{}, d)
		must(t, err)
		l := openLayer(t, c, ly, ly.serve())
		read := func() {
			readRange(t, l, ly, make([]byte, 10_000), rnd.Int64N(int64(len(ly.tar))-10_000))
			poll(t, "end of the fills", l.store.idle)
		}
		d.meanwhile = read // what comes in during a sync is not covered by it
		for i := range 40 {
			read()
			if rnd.IntN(4) == 0 {
				c.flush()
			}
			if i%8 == 7 {
				lost := filepath.Join(root, fmt.Sprint(i), filepath.Base(c.layerDir(ly.dgst)))
				d.crash(t, lost, rnd)
				claimed += checkMap(t, lost, ly)
				after := openCache(t, filepath.Dir(lost))
				readAll(t, openLayer(t, after, ly, ly.serve()), ly, 20_000)
				must(t, after.Close())
			}
		}
		d.meanwhile = nil
		must(t, c.Close())
	}
	if claimed == 0 {
		t.Error("no map claimed anything: the test has tested nothing")
	}
}

// After a failed fdatasync Linux drops what it could not write and forgets that it failed: nothing written before may be
// believed, not even a write that is still going on.
func TestFailedSyncLosesWrites(t *testing.T) {
	ly := newLayer(t, 4<<10, 300_000)
	for _, during := range []string{"after the write", "during the write"} {
		t.Run(during, func(t *testing.T) {
			d := &volatileDisk{disk: unsynced{}, files: make(map[string]*volatileFile)}
			c, err := open(t.TempDir(), Options{}, d)
			must(t, err)
			t.Cleanup(func() { must(t, c.Close()) })
			l := openLayer(t, c, ly, ly.serve())
			fail := func() {
				d.written = nil
				d.mu.Lock()
				d.lose = true
				d.mu.Unlock()
				c.flush()
			}
			readRange(t, l, ly, make([]byte, 50_000), 0)
			poll(t, "end of the fills", l.store.idle)
			if during == "during the write" {
				d.written = fail
			}
			readRange(t, l, ly, make([]byte, 10), 100_000)
			poll(t, "end of the fills", l.store.idle)
			if during == "after the write" {
				fail()
			}
			if !errors.Is(c.Err(), syscall.EIO) {
				t.Fatalf("Err is %v, want EIO", c.Err())
			}
			readRange(t, l, ly, make([]byte, 50_000), 0)
			readRange(t, l, ly, make([]byte, 10), 100_000)
			poll(t, "end of the fills", l.store.idle)
			c.flush()
			if checkMap(t, c.layerDir(ly.dgst), ly) == 0 {
				t.Error("nothing is cached after the disk works again")
			}
			readAll(t, l, ly, 20_000)
		})
	}
}
