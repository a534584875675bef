package service

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
)

// Bounds on reports of starts.
const (
	startsTTL      = 90 * 24 * time.Hour // after the last report of an image
	reportsWaiting = 256                 // of a registry in a process, for its answer and their turn
	nodeStarts     = 2 * starts.MaxStarts
	nodeInterval   = 10 * time.Second // in which a node may report one start more, once it has reported nodeStarts
	maxNodes       = 1 << 14          // whose limits a process remembers
	referrersAge   = time.Minute      // for which what refers to an image is remembered, if what is looked for is not among it
)

// fleet is what auto knows of starts on nodes: the bucket streaming-starts, with a starts.Summary of each platform's manifest at REPOSITORY.DIGEST. All
// processes add to it by compare-and-set.
type fleet struct {
	summaries jetstream.KeyValue
	turns     map[string]chan struct{} // by registry, one for each report that is looked at or waits: one that does not answer is in no other's way
	adding    chan struct{}            // held by the one that is added, so that reports of one process do not contest each other
	referrers memo[string, referrersAt]

	mu    sync.Mutex
	nodes map[string]*rate.Limiter
}

// referrersAt are the artifacts and profiles of an image, with their kinds, when the registry was last asked.
type referrersAt struct {
	at    time.Time
	kinds map[digest.Digest]string // "" of an artifact
}

func newFleet(registries []Registry) *fleet {
	f := &fleet{turns: map[string]chan struct{}{}, adding: make(chan struct{}, 1), nodes: map[string]*rate.Limiter{}}
	for _, r := range registries {
		f.turns[r.Name] = make(chan struct{}, reportsWaiting)
	}
	return f
}

// Reported says what became of a report: its first Taken starts need not be sent again, and Counted of them were added.
type Reported struct {
	Taken   int `json:"taken"`
	Counted int `json:"counted"`
}

// Report adds what a node tells of starts of a repository's images. Not counted, and no error, are starts of images without the artifact that is told, and what a
// node tells beyond its limit. Errors are ErrNotFound (no such registry), ErrInvalid, and ErrUnavailable: then nothing was taken.
func (a *auto) Report(ctx context.Context, registry, repositoryName string, rep starts.Report) (done Reported, err error) {
	r, p, err := a.reach(registry, repositoryName)
	if err != nil {
		return done, err
	}
	if err := rep.Check(); err != nil {
		return done, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	select {
	case a.fleet.turns[registry] <- struct{}{}:
		defer func() { <-a.fleet.turns[registry] }()
	default:
		return done, fmt.Errorf("%w: %d reports of %s wait already", ErrUnavailable, reportsWaiting, registry)
	}
	for list := rep.Starts; len(list) > 0; {
		n := 1
		for n < len(list) && list[n].Manifest == list[0].Manifest {
			n++
		}
		counted, err := a.addStarts(ctx, r, p, rep.Node, list[:n])
		if err != nil {
			if done.Taken > 0 {
				a.log.Warn("a part of a report of starts is left to be sent again", "repository", r.String(), "error", err)
				return done, nil
			}
			return done, err
		}
		done.Taken, done.Counted, list = done.Taken+n, done.Counted+counted, list[n:]
	}
	return done, nil
}

// addStarts adds starts of one platform's image.
func (a *auto) addStarts(ctx context.Context, r repository, p converter.Place, node string, list []starts.Start) (counted int, err error) {
	var known []starts.Start
	for _, st := range list {
		kinds, err := a.fleet.kindsOf(ctx, p, st.Manifest, st.Artifact)
		if err != nil {
			return 0, placeError(err)
		}
		if kind, ok := kinds[st.Artifact]; !ok || kind != "" || !a.fleet.allows(node) {
			continue
		}
		// The registry's word counts: what the profile is called, and that there is one of that digest.
		if kind := kinds[st.Fetched]; kind != "" {
			st.Profile = kind
		} else {
			st.Fetched = ""
		}
		known = append(known, st)
	}
	if len(known) == 0 {
		return 0, nil
	}
	select {
	case a.fleet.adding <- struct{}{}:
		defer func() { <-a.fleet.adding }()
	case <-ctx.Done():
		return 0, unavailable("wait for other reports", ctx.Err())
	}
	for range contested {
		var sum starts.Summary
		rev, err := getJSON(ctx, a.fleet.summaries, startsKey(r, list[0].Manifest), &sum)
		if err != nil {
			return 0, err
		}
		for _, st := range known {
			sum.Add(node, st, now())
		}
		_, err = setJSON(ctx, a.fleet.summaries, startsKey(r, list[0].Manifest), sum, rev)
		if !errors.Is(err, errContested) {
			return len(known), err
		}
		sleep(ctx, time.Duration(rand.Int64N(int64(50*time.Millisecond))))
	}
	return 0, fmt.Errorf("%w: %w", ErrUnavailable, errContested)
}

func startsKey(r repository, manifest digest.Digest) string { return madeKey(r.image(manifest)) }

// allows says whether a node may report one start more. Nobody who invents nodes is stopped by it, but one that is broken.
func (f *fleet) allows(node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.nodes[node]
	if l == nil {
		if len(f.nodes) >= maxNodes {
			clear(f.nodes)
		}
		l = rate.NewLimiter(rate.Every(nodeInterval), nodeStarts)
		f.nodes[node] = l
	}
	return l.Allow()
}

// kindsOf returns what refers to an image: of profiles their kind. The registry is asked again if want is not among what it said a while ago.
func (f *fleet) kindsOf(ctx context.Context, p converter.Place, manifest, want digest.Digest) (map[digest.Digest]string, error) {
	key := p.String() + "@" + manifest.String()
	known, _ := f.referrers.get(key)
	if _, ok := known.kinds[want]; ok && time.Since(known.at) < 10*referrersAge || time.Since(known.at) < referrersAge {
		return known.kinds, nil
	}
	list, err := p.Referrers(ctx, manifest)
	if err != nil && !errors.Is(err, converter.ErrNotFound) {
		return nil, err
	}
	known = referrersAt{time.Now(), map[digest.Digest]string{}}
	for _, d := range list {
		switch {
		case isStreaming(d):
			known.kinds[d.Digest] = ""
		case isProfile(d):
			known.kinds[d.Digest] = profileKind(d)
		}
	}
	f.referrers.put(key, known)
	return known.kinds, nil
}

// profileKind is what a profile is called; of one that this release does not know it is "static", the least that a profile can be.
func profileKind(d ocispec.Descriptor) string {
	kind := d.Annotations[artifact.AnnotationProfileSource]
	if !slices.Contains([]string{artifact.ProfileRecorded, artifact.ProfileLearned}, kind) {
		kind = artifact.ProfileStatic
	}
	return kind
}

// forgetStarts forgets what was reported of a platform's image.
func (a *auto) forgetStarts(ctx context.Context, r repository, manifest digest.Digest) error {
	err := a.fleet.summaries.Purge(ctx, startsKey(r, manifest), jetstream.PurgeTTL(markerTTL))
	return unavailable("forget what was reported of an image", err)
}

// StartsInfo says what nodes have reported of the starts of a platform's image.
type StartsInfo struct {
	Nodes    int           `json:"nodes"`    // about how many
	Variants []StartsOfOne `json:"variants"` // the current one first, then the one that was last reported
}

// StartsOfOne are the starts that had the artifact and the profile in common.
type StartsOfOne struct {
	Artifact digest.Digest `json:"artifact"`
	Profile  string        `json:"profile"`                 // recorded, learned, static or none: what the nodes fetched ahead
	Fetched  digest.Digest `json:"profileDigest,omitempty"` // "" where it is not known
	Current  bool          `json:"current"`                 // a node that pulls now has the same
	Starts   int64         `json:"starts"`
	First    time.Time     `json:"first"` // report
	Last     time.Time     `json:"last"`

	Pull  StartTimes `json:"pull"`  // the snapshotter's part of a pull
	Reads StartTimes `json:"reads"` // pull, and from the mount until nothing more was read: see starts.Start
	Ready StartTimes `json:"ready"` // pull, and from the mount until the pod was ready by a probe, where that is known

	Bytes  int64 `json:"bytes"`       // that a start reads of the layers' tars, on average
	Missed int64 `json:"missedBytes"` // and that its container has to wait for
	Misses int64 `json:"misses"`      // in how many pieces
}

// StartTimes are the times of starts, in seconds.
type StartTimes struct {
	Count   int64           `json:"count"` // of how many it is known
	Median  float64         `json:"median"`
	P90     float64         `json:"p90"`
	Buckets []starts.Bucket `json:"buckets"` // those that are not empty
}

// startsOf returns what was reported of a platform's image, nil if nothing was.
func (a *auto) startsOf(ctx context.Context, r repository, p PlatformInfo) (*StartsInfo, error) {
	var sum starts.Summary
	if _, err := getJSON(ctx, a.fleet.summaries, startsKey(r, p.Digest), &sum); err != nil || len(sum.Variants) == 0 {
		return nil, err
	}
	info := &StartsInfo{Nodes: sum.NodeCount()}
	for _, v := range sum.Variants {
		n := max(v.Weight, 1)
		one := StartsOfOne{
			Artifact: v.Artifact, Profile: v.Profile, Fetched: v.Fetched, Starts: v.Starts, First: v.First, Last: v.Last,
			Pull: startTimes(v.Pull), Reads: startTimes(v.Reads), Ready: startTimes(v.Ready), Bytes: v.Bytes / n, Missed: v.Missed / n, Misses: v.Misses / n,
		}
		if s := p.Streaming; s != nil && s.Artifact == v.Artifact {
			none := s.Profile == "" && v.Profile == starts.None
			one.Current = none || s.Profile == v.Profile && (s.ProfileDigest == v.Fetched || v.Fetched == "")
		}
		info.Variants = append(info.Variants, one)
	}
	slices.SortStableFunc(info.Variants, func(x, y StartsOfOne) int {
		switch {
		case x.Current == y.Current:
			return 0
		case x.Current:
			return -1
		}
		return 1
	})
	return info, nil
}

func startTimes(h starts.Histogram) StartTimes {
	return StartTimes{h.Count(), h.Quantile(0.5), h.Quantile(0.9), h.Buckets()}
}
