package service

import (
	"sync"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// tracker makes a Progress of what a conversion tells.
type tracker struct {
	mu       sync.Mutex
	total    int64             // bytes of all platforms
	done     int64             // of layers that are done
	most     int64             // that were done: a layer that is read again does not turn it back
	active   []converter.Event // the last of each layer being converted, in the order of their start
	platform string
	layers   int
}

// report is a converter.Progress.
func (t *tracker) report(e converter.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Platform != "" {
		t.platform, t.layers = e.Platform, e.Layers
	}
	i := t.find(e)
	switch e.Kind {
	case converter.ImageResolved:
		t.total = e.Total
	case converter.LayerStarted, converter.LayerRead, converter.LayerPushing:
		if i < 0 {
			t.active = append(t.active, e)
		} else {
			t.active[i] = e
		}
	case converter.LayerDone, converter.LayerReused, converter.ArtifactFound:
		t.done += e.Total
		if i >= 0 {
			t.active = append(t.active[:i], t.active[i+1:]...)
		}
	}
}

func (t *tracker) find(e converter.Event) int {
	for i, a := range t.active {
		if a.Layer == e.Layer && a.Platform == e.Platform && a.Digest == e.Digest {
			return i
		}
	}
	return -1
}

// progress returns how far it is now. 100 percent are not its to say.
func (t *tracker) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	bytes := t.done
	for _, a := range t.active {
		bytes += a.Read
	}
	t.most = max(t.most, bytes)
	p := Progress{Bytes: t.most, Total: t.total, Platform: t.platform, Layers: t.layers, Updated: now()}
	if t.total > 0 {
		p.Percent = int(min(99, 100*t.most/t.total))
	}
	if len(t.active) > 0 {
		a := t.active[0]
		p.Platform, p.Layer, p.Layers, p.Digest = a.Platform, a.Layer+1, a.Layers, a.Digest
	}
	return p
}
