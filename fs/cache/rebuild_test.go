package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

var errGone = errors.New("gone")

// goneBlob is a blob that was deleted. tars holds the tar that each try gets.
type goneBlob struct {
	Blob // if not nil, it was not deleted
	tars [][]byte
	gate chan struct{} // if not nil, the tar's second half waits for its closing

	requests, opened, open atomic.Int64
}

func (b *goneBlob) ReadRange(ctx context.Context, off, n int64, try int) (io.ReadCloser, error) {
	b.requests.Add(1)
	if b.Blob != nil {
		return b.Blob.ReadRange(ctx, off, n, try)
	}
	return nil, errGone
}

func (b *goneBlob) Gone(err error) bool { return errors.Is(err, errGone) }

func (b *goneBlob) Tar(ctx context.Context, try int) (io.ReadCloser, error) {
	b.opened.Add(1)
	if try >= len(b.tars) {
		return nil, errNoHost
	}
	b.open.Add(1)
	tar := b.tars[try]
	return &gatedBody{ctx: ctx, r: io.MultiReader(bytes.NewReader(tar[:len(tar)/2]), &gate{ctx, b.gate}, bytes.NewReader(tar[len(tar)/2:])), b: b}, nil
}

type gate struct {
	ctx context.Context
	c   chan struct{}
}

func (g *gate) Read([]byte) (int, error) {
	if g.c == nil {
		return 0, io.EOF
	}
	select {
	case <-g.c:
		return 0, io.EOF
	case <-g.ctx.Done():
		return 0, g.ctx.Err()
	}
}

type gatedBody struct {
	ctx context.Context
	r   io.Reader
	b   *goneBlob
}

func (b *gatedBody) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	return b.r.Read(p)
}

func (b *gatedBody) Close() error { b.b.open.Add(-1); return nil }

func readRebuilt(t *testing.T, l *Layer, ly *layer, off, n int64) {
	t.Helper()
	p := make([]byte, n)
	if _, err := l.ReadAt(t.Context(), p, off); err != nil && err != io.EOF {
		t.Errorf("%d bytes at %d: %v", n, off, err)
	} else if !bytes.Equal(p, ly.tar[off:off+n]) {
		t.Errorf("%d bytes at %d: wrong bytes", n, off)
	}
}

// Once the blob is gone, the tar is read once for everybody, and all of it is kept.
func TestRebuild(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000, 50_000)
	b := &goneBlob{tars: [][]byte{ly.tar}, gate: make(chan struct{})}
	c := openCache(t, t.TempDir())
	l, err := c.Layer(ly.dgst, ly.index, b)
	must(t, err)
	size := int64(len(ly.tar))

	// A reader that is killed comes back, and others do not mind.
	ctx, kill := context.WithCancel(t.Context())
	killed := make(chan error)
	go func() {
		_, err := l.ReadAt(ctx, make([]byte, 10), size-100)
		killed <- err
	}()
	var readers sync.WaitGroup
	for i := range int64(8) {
		readers.Go(func() { readRebuilt(t, l, ly, size-(i+1)*5000, 5000) })
	}
	readRebuilt(t, l, ly, 0, 10_000) // before the gate
	kill()
	if err := <-killed; !errors.Is(err, context.Canceled) {
		t.Errorf("killed: %v", err)
	}
	close(b.gate)
	readers.Wait()
	requests := b.requests.Load()
	readRebuilt(t, l, ly, 0, size)
	readRebuilt(t, l, ly, size/3, size/3)
	if got := b.opened.Load(); got != 1 {
		t.Errorf("the tar was opened %d times", got)
	}
	if got := b.requests.Load(); got != requests {
		t.Errorf("%d requests after everything was there", got-requests)
	}
	must(t, l.Close())
	if n := b.open.Load(); n != 0 {
		t.Errorf("%d tars left open", n)
	}
}

// A tar that is not the layer's is as good as none, and the next one is asked for.
func TestRebuildWrongTar(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	flipped := bytes.Clone(ly.tar)
	flipped[60_000] ^= 1
	for name, tc := range map[string]struct {
		tars   [][]byte
		err    error // of a read of the end; nil is none
		opened int64
	}{
		"right the second time": {[][]byte{flipped, ly.tar}, nil, 2},
		"cut, then right":       {[][]byte{ly.tar[:50_000], ly.tar}, nil, 2},
		"always wrong":          {[][]byte{flipped, flipped}, artifact.ErrInvalid, 3},
		"gone, too":             {nil, errGone, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := &goneBlob{tars: tc.tars}
			c := openCache(t, t.TempDir())
			l, err := c.Layer(ly.dgst, ly.index, b)
			must(t, err)
			if tc.err == nil {
				readRebuilt(t, l, ly, 59_000, 30_000)
			} else if _, err := l.ReadAt(t.Context(), make([]byte, 30_000), 59_000); !errors.Is(err, tc.err) {
				t.Errorf("got %v, want %v", err, tc.err)
			}
			if got := b.opened.Load(); got != tc.opened {
				t.Errorf("the tar was opened %d times, want %d", got, tc.opened)
			}
		})
	}
}

// A blob whose bytes are wrong wherever it is asked for is as good as gone; when the source layer does not help, the blob is asked further.
func TestRebuildWrongBlob(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	wrong := slices.Repeat([][]byte{make([]byte, len(ly.blob))}, wrongTries+3)
	for name, tc := range map[string]struct {
		hosts        [][]byte
		tars         [][]byte
		err          error // nil is none
		tries, tarsN int64
	}{
		"right in time":        {append(wrong[:wrongTries-1:wrongTries-1], ly.blob), [][]byte{ly.tar}, nil, wrongTries, 0},
		"rebuilt":              {wrong, [][]byte{ly.tar}, nil, wrongTries, 1},
		"no source, right yet": {append(wrong[:wrongTries+1:wrongTries+1], ly.blob), nil, nil, wrongTries + 2, 1},
		"nothing is right":     {wrong, nil, artifact.ErrInvalid, wrongTries + 4, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := &goneBlob{Blob: &memBlob{hosts: tc.hosts}, tars: tc.tars}
			c := openCache(t, t.TempDir())
			l, err := c.Layer(ly.dgst, ly.index, b)
			must(t, err)
			if tc.err == nil {
				readRebuilt(t, l, ly, 50_000, 100)
			} else if _, err := l.ReadAt(t.Context(), make([]byte, 100), 50_000); !errors.Is(err, tc.err) {
				t.Errorf("got %v, want %v", err, tc.err)
			}
			if got := b.opened.Load(); got != tc.tarsN {
				t.Errorf("the tar was opened %d times, want %d", got, tc.tarsN)
			}
			if got := b.requests.Load(); got != tc.tries {
				t.Errorf("the blob was asked %d times, want %d", got, tc.tries)
			}
		})
	}
}

// Closing the handle that began a pass ends it; another's readers begin their own.
func TestRebuildHandleCloses(t *testing.T) {
	ly := newLayer(t, 4<<10, 100_000)
	b := &goneBlob{tars: [][]byte{ly.tar}, gate: make(chan struct{})}
	other := &goneBlob{tars: [][]byte{ly.tar}}
	c := openCache(t, t.TempDir())
	first, err := c.Layer(ly.dgst, ly.index, b)
	must(t, err)
	second, err := c.Layer(ly.dgst, ly.index, other)
	must(t, err)
	ended := make(chan error)
	go func() {
		_, err := first.ReadAt(context.Background(), make([]byte, 10), 90_000)
		ended <- err
	}()
	readRebuilt(t, first, ly, 0, 10)                                                        // the pass has begun
	poll(t, "the first handle's reader", func() bool { return first.store.waiting() == 1 }) // or it joins the second's
	done := make(chan struct{})
	go func() { defer close(done); readRebuilt(t, second, ly, 90_000, 5000) }()
	must(t, first.Close())
	if err := <-ended; err == nil {
		t.Error("the closed handle's reader got something")
	}
	<-done
}

// Without a disk each read may take another pass, but it gets its bytes.
func TestRebuildWithoutDisk(t *testing.T) {
	ly := newLayer(t, 4<<10, 40_000)
	b := &goneBlob{tars: [][]byte{ly.tar}}
	c := openCache(t, t.TempDir())
	c.stats.suspended.Store(true)
	l, err := c.Layer(ly.dgst, ly.index, b)
	must(t, err)
	var readers sync.WaitGroup
	for i := range int64(len(ly.tar)) / 8192 {
		readers.Go(func() { readRebuilt(t, l, ly, i*8192, 8192) })
	}
	readers.Wait()
	readRebuilt(t, l, ly, 0, 5000)
}
