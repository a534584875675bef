package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// progress shows how far the layers are: bars at the foot of a terminal, under one line for each layer that is done;
// only those lines elsewhere.
type progress struct {
	w    io.Writer
	tty  *os.File // nil if w is not a terminal
	verb string   // what happens to layers: "converted"

	mu     sync.Mutex
	active []converter.Event // in the order of their start
	drawn  int               // lines of bars on the screen

	done    chan struct{}
	stopped sync.WaitGroup
}

// redraw is how often bars move: often enough to be alive, seldom enough to cost nothing.
const redraw = 100 * time.Millisecond

// newProgress returns a progress that is shown until stop.
func newProgress(w io.Writer, verb string) *progress {
	p := &progress{w: w, verb: verb, done: make(chan struct{})}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.tty = f
		p.stopped.Go(p.run)
	}
	return p
}

func (p *progress) run() {
	t := time.NewTicker(redraw)
	defer t.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-t.C:
			p.mu.Lock()
			p.clear()
			p.draw()
			p.mu.Unlock()
		}
	}
}

func (p *progress) stop() {
	close(p.done)
	p.stopped.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

func (p *progress) report(e converter.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.find(e)
	switch e.Kind {
	case converter.LayerStarted, converter.LayerRead, converter.LayerPushing:
		if i < 0 {
			p.active = append(p.active, e)
		} else {
			p.active[i] = e
		}
		return
	case converter.LayerDone:
		if e.OutSize != 0 && e.OutSize != e.Total {
			p.line(e, fmt.Sprintf("%s, %s -> %s in %s", p.verb, size(e.Total), size(e.OutSize), seconds(e.Elapsed)))
		} else {
			p.line(e, fmt.Sprintf("%s, %s", p.verb, size(e.Total)))
		}
	case converter.LayerReused:
		p.line(e, "is there already")
	default:
		return
	}
	if i >= 0 {
		p.active = append(p.active[:i], p.active[i+1:]...)
	}
}

// only shows e alone, or nothing if it is not going on.
func (p *progress) only(e converter.Event, active bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active = p.active[:0]
	if active {
		p.active = append(p.active, e)
	}
}

// say prints a line above the bars.
func (p *progress) say(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintln(p.w, line)
}

func (p *progress) find(e converter.Event) int {
	for i, a := range p.active {
		if a.Digest == e.Digest && a.Layer == e.Layer && a.Platform == e.Platform {
			return i
		}
	}
	return -1
}

func name(e converter.Event) string {
	s := fmt.Sprintf("%d/%d %s", e.Layer+1, e.Layers, short(e.Digest))
	if e.Platform != "" {
		s = e.Platform + " " + s
	}
	return s
}

func (p *progress) line(e converter.Event, what string) {
	p.clear()
	fmt.Fprintf(p.w, "%s %s\n", name(e), what)
}

// clear takes the bars from the screen.
func (p *progress) clear() {
	if p.drawn > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[J", p.drawn)
		p.drawn = 0
	}
}

func (p *progress) draw() {
	width, _, err := term.GetSize(int(p.tty.Fd()))
	if err != nil || width < 20 {
		width = 80
	}
	var b strings.Builder
	for _, e := range p.active {
		b.WriteString(bar(e, width-1))
		b.WriteByte('\n')
		p.drawn++
	}
	io.WriteString(p.w, b.String())
}

// bar is one line of at most width characters.
func bar(e converter.Event, width int) string {
	const cells = 20
	full := cells
	if e.Total > 0 {
		full = int(min(e.Read, e.Total) * cells / e.Total)
	}
	what := size(e.Read) + " of " + size(e.Total)
	if e.Kind == converter.LayerPushing {
		what = "pushing " + size(e.OutSize)
	}
	s := fmt.Sprintf("%s [%s%s] %s", name(e), strings.Repeat("=", full), strings.Repeat(" ", cells-full), what)
	if len(s) > width {
		s = s[:width]
	}
	return s
}
