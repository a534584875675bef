package cache

import (
	"context"
	"errors"
	"os"
	"testing"
)

func TestComplete(t *testing.T) {
	c := exactCache(t)
	ly := newLayer(t, 16<<10, 3<<20, 100)
	b := ly.serve()
	l := openLayer(t, c, ly, b)
	readRange(t, l, ly, make([]byte, 40<<10), 1<<20)
	readRange(t, l, ly, make([]byte, 10), 0)
	poll(t, "end of the fills", l.store.idle)
	b.bytes.Store(0)
	b.requests.Store(0)
	here := l.Present()
	must(t, l.Complete(t.Context(), b))
	if got := l.Present(); got != ly.index.TarSize || here == 0 {
		t.Errorf("%d bytes are here, want %d", got, ly.index.TarSize)
	}
	if n := b.requests.Load(); n != 1 {
		t.Errorf("%d requests, want 1: what was here is a small part", n)
	}
	b.down.Store(true)
	readAll(t, l, ly, 100_000)
	must(t, l.Complete(t.Context(), b)) // asks for nothing
}

func TestCompleteEnds(t *testing.T) {
	ly := newLayer(t, 16<<10, 3<<20)
	for name, c := range map[string]struct {
		limit int64
		down  bool
		end   func(l *Layer, cancel func())
		want  error
	}{
		"cancelled": {end: func(_ *Layer, cancel func()) { cancel() }, want: context.Canceled},
		"closed":    {end: func(l *Layer, _ func()) { l.Close() }, want: os.ErrClosed},
		"away":      {down: true, want: errNoHost},
		"full":      {limit: 2 << 20, want: ErrFull},
	} {
		t.Run(name, func(t *testing.T) {
			cache, err := Open(t.TempDir(), Options{NoReadAhead: true, Limit: c.limit})
			must(t, err)
			t.Cleanup(func() { must(t, cache.Close()) })
			b := ly.serve()
			b.down.Store(c.down)
			l := openLayer(t, cache, ly, b)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.end != nil {
				c.end(l, cancel)
			}
			if err := l.Complete(ctx, b); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if s := cache.Stats(); s.Evicted > 0 || s.Hot > 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}
