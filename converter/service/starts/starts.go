// Package starts is what nodes tell the conversion service of the starts of streamed images, and how that adds up: the form of a report with its bounds, and
// the summary of an image's starts, which stays small whatever is reported.
//
// The principle: a report is somebody's word. Check bounds each value, Add bounds the sum, and nothing in either names a machine: a node is a random number.
//
// What it does not do: it sends nothing (the node's daemon does), it stores nothing, and it knows no registry (package service does).
package starts

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Bounds of a report.
const (
	MaxStarts = 64        // of a report
	MaxBody   = 48 << 10  // bytes of one in JSON
	MaxTime   = time.Hour // of each time
	maxBytes  = 1 << 40   // of a start
	maxMisses = 1 << 24
)

// None is the profile of an image that had none when it was pulled. The other kinds are those of profiles.
const None = "none"

// kinds of profiles, by what they are called in annotations.
var kinds = []string{"recorded", "learned", "static", None}

// Report is what a node tells of images of one repository.
type Report struct {
	Node   string  `json:"node"` // 32 hexadecimal digits, random, which the node has kept since it was installed: to count nodes by
	Starts []Start `json:"starts"`
}

// Start is the first start of an image's container on a node since the image was pulled there. Times are seconds.
type Start struct {
	Manifest digest.Digest `json:"manifest"`               // of the image's platform
	Artifact digest.Digest `json:"artifact"`               // that it was read through
	Profile  string        `json:"profile"`                // recorded, learned, static or none: what the node fetched ahead
	Fetched  digest.Digest `json:"profileDigest,omitzero"` // the manifest of that profile
	Pull     float64       `json:"pull"`                   // from the pull's first call of the snapshotter until its layers were there
	Wait     float64       `json:"wait"`                   // from that until the image was mounted for the container
	Reads    float64       `json:"reads,omitempty"`        // from then until something of the image was last read that was not read before; 0 if that went on for minutes
	Ready    float64       `json:"ready,omitempty"`        // from then until Kubernetes had the container's pod ready by a probe; 0 if that is not known
	Bytes    int64         `json:"bytes"`                  // of the layers' tars that were read until then
	Missed   int64         `json:"missedBytes"`            // of them, those that the container had to wait for
	Misses   int64         `json:"misses"`                 // in how many pieces
}

// ErrReport is a report that nobody can mean.
var ErrReport = errors.New("report of starts")

var nodePattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[0-9a-f]{32}$`) })

// Check holds a report against the bounds. The error is ErrReport, and names the field.
func (r *Report) Check() error {
	if !nodePattern().MatchString(r.Node) {
		return fmt.Errorf("%w: node %.64q: want 32 hexadecimal digits", ErrReport, r.Node)
	}
	if len(r.Starts) == 0 || len(r.Starts) > MaxStarts {
		return fmt.Errorf("%w: has %d starts: want 1 to %d", ErrReport, len(r.Starts), MaxStarts)
	}
	for i := range r.Starts {
		if err := r.Starts[i].check(); err != nil {
			return fmt.Errorf("%w: starts[%d]: %w", ErrReport, i, err)
		}
	}
	return nil
}

func (s *Start) check() error {
	for name, d := range map[string]digest.Digest{"manifest": s.Manifest, "artifact": s.Artifact, "profileDigest": s.Fetched} {
		if d.Validate() != nil && (d != "" || name != "profileDigest") {
			return fmt.Errorf("%s %.80q: want a digest", name, d)
		}
	}
	if !slices.Contains(kinds, s.Profile) {
		return fmt.Errorf("profile %.32q: want one of %q", s.Profile, kinds)
	}
	for name, t := range map[string]float64{"pull": s.Pull, "wait": s.Wait, "reads": s.Reads, "ready": s.Ready} {
		if math.IsNaN(t) || t < 0 || t > MaxTime.Seconds() && name != "wait" {
			return fmt.Errorf("%s is %v seconds: want 0 to %v", name, t, MaxTime.Seconds())
		}
	}
	if s.Reads == 0 && s.Ready == 0 {
		return errors.New("neither reads nor ready is known")
	}
	if s.Bytes < 0 || s.Bytes > maxBytes || s.Missed < 0 || s.Missed > maxBytes || s.Misses < 0 || s.Misses > maxMisses {
		return fmt.Errorf("%d bytes, %d missedBytes, %d misses: want no more than %d and %d", s.Bytes, s.Missed, s.Misses, int64(maxBytes), maxMisses)
	}
	return nil
}
