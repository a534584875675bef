package converter

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Progress is told what happens. It is called from several goroutines at once, often (for every buffer read), and holds
// up the work while it runs: it should note and return. A nil Progress is silent.
type Progress func(Event)

func (p Progress) report(e Event) {
	if p != nil {
		p(e)
	}
}

// EventKind says what happened.
type EventKind int

const (
	LayerStarted     EventKind = iota // Total is known; also when a layer is tried again after its source failed
	LayerRead                         // Read bytes of Total so far
	LayerPushing                      // converted or fetched whole: on its way to the place
	LayerDone                         // OutSize is known
	LayerReused                       // converted before, or there already: nothing to do
	ArtifactAttached                  // Digest is the artifact's manifest
	ManifestCopied                    // Digest is the manifest's
	ImageResolved                     // before anything else of Create: Total is that of the layers of all platforms
	ArtifactFound                     // a platform has the artifact Digest already; Total is that of the layers, none of which is told of
)

// Event is something that happened to a layer or an artifact.
type Event struct {
	Kind     EventKind
	Platform string        // "linux/amd64", or "" where there is none
	Layer    int           // which one, from 0
	Layers   int           // of how many
	Digest   digest.Digest // of the layer read, or of the manifest
	Read     int64         // bytes
	Total    int64         // bytes
	OutSize  int64         // bytes of the artifact's layer
	Elapsed  time.Duration // since the start of the layer or artifact
}
