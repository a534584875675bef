package service

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// Catalog lists the repositories of a registry. A nil one says that there is no list to be had.
type Catalog func(ctx context.Context) ([]string, error)

// operations is what auto needs of the queue.
type operations interface {
	Submit(ctx context.Context, r Request) (op Operation, existed bool, err error)
	Operations(ctx context.Context, f Filter) ([]Operation, error)
	Last(ctx context.Context, i Image) (Operation, error)
	Cancel(ctx context.Context, id, by string) (Operation, error)
	Watch(ctx context.Context, id string) (<-chan Operation, error)
}

// auto is the part of Service that knows which repositories are converted as they are pushed to, and what comes of them. Four buckets:
//
//	streaming-settings   REGISTRY             what SetSettings was told, all of a registry
//	streaming-seen       REPOSITORY           what is known of a repository that is or was active (base)
//	                     REPOSITORY.TAG       a tag of it: what it named when it was last looked at (seenTag)
//	                     reconcile-REGISTRY   who reconciles it (lease)
//	streaming-artifacts  REPOSITORY.DIGEST    an image with the artifacts that were attached for it (madeFor)
//	streaming-starts     REPOSITORY.DIGEST    what nodes report of starts (fleet)
//
// where REGISTRY, REPOSITORY and TAG are hashes of the names. An event becomes a tag that is due, durably, and any process may look at it,
// several even at once: what comes of it is one operation, and the tag changes by compare-and-set alone. So an event that comes while its tag is
// being looked at makes that look void, and it is looked at again.
type auto struct {
	ops        operations
	names      []string // of the registries, as configured
	registries map[string]Registry
	interval   time.Duration // of reconcile
	log        *slog.Logger
	audit      func(Deed)

	settings, seen, made jetstream.KeyValue

	*viewer
	fleet *fleet

	mu        sync.Mutex
	hints     map[repository]*hint // what to look at
	wake      chan struct{}        // capacity 1: hints has news
	noCatalog map[string]string    // by registry, why it cannot be listed
	tagCounts map[repository]int   // as last listed
	deeds     deeds
	scans     map[repository]*scan
	unread    map[repository]map[string]time.Time // tags that are listed, and since when the registry says of each that there is no such
	doubts    memo[string, time.Time]             // that were logged
}

// repository of a registry.
type repository struct{ registry, name string }

func (r repository) String() string { return r.registry + "/" + r.name }

func (r repository) key() string { return hashKey(r.String()) }

func (r repository) image(dgst digest.Digest) Image { return Image{r.registry, r.name, dgst} }

// hashKey makes any name a key: 128 bits of a hash suffice to tell names apart.
func hashKey(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:16])
}

// newAuto makes the buckets; bucket makes or opens one. c has its defaults.
func newAuto(ctx context.Context, c Config, ops operations, bucket func(ctx context.Context, name string, ttl time.Duration) (jetstream.KeyValue, error)) (*auto, error) {
	a := &auto{
		ops: ops, registries: map[string]Registry{}, interval: c.Reconcile, log: c.Log,
		viewer: newViewer(), fleet: newFleet(c.Registries), hints: map[repository]*hint{}, wake: make(chan struct{}, 1), noCatalog: map[string]string{}, tagCounts: map[repository]int{}, scans: map[repository]*scan{}, unread: map[repository]map[string]time.Time{},
		deeds: deeds{due: map[repository]int{}, passed: map[string]time.Time{}, failed: map[string]uint64{}}, audit: c.Audit,
	}
	for _, r := range c.Registries {
		a.names = append(a.names, r.Name)
		a.registries[r.Name] = r
		if r.Catalog == nil {
			a.noCatalog[r.Name] = converter.ErrNoCatalog.Error()
		}
	}
	for _, b := range []struct {
		name string
		ttl  time.Duration
		kv   *jetstream.KeyValue
	}{{"streaming-settings", 0, &a.settings}, {"streaming-seen", 0, &a.seen}, {"streaming-artifacts", 0, &a.made}, {"streaming-starts", startsTTL, &a.fleet.summaries}} {
		kv, err := bucket(ctx, b.name, b.ttl)
		if err != nil {
			return nil, err
		}
		*b.kv = kv
	}
	return a, nil
}

// run looks at what events tell, and reconciles, until ctx ends.
func (a *auto) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { a.follow(ctx); return nil })
	g.Go(func() error {
		a.resume(ctx)
		for _, registry := range a.names {
			g.Go(func() error { a.reconcile(ctx, registry); return nil })
		}
		return nil
	})
	return g.Wait()
}

// What names may be, as the OCI distribution specification has them. Patterns have stars, too.
var (
	repositoryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	patternName    = regexp.MustCompile(`^[a-z0-9._/*-]+$`)
	tagName        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

const maxName = 255 // bytes of a repository's name

// CheckPattern says what is against a pattern of repositories' names: ErrInvalid, unless it has a star, and else what names have.
func CheckPattern(pattern string) error {
	if len(pattern) > maxName || !isPattern(pattern) || !patternName.MatchString(pattern) {
		return fmt.Errorf("%w: %q is not a pattern of repositories' names", ErrInvalid, pattern)
	}
	return nil
}

// IsTag says whether a name is one that a tag may have.
func IsTag(name string) bool { return tagName.MatchString(name) }

// CheckRepository says what is against a repository's name: ErrInvalid, unless it is one as the distribution specification has them.
func CheckRepository(name string) error {
	if len(name) > maxName || !repositoryName.MatchString(name) {
		return fmt.Errorf("%w: repository %q is not a repository's name", ErrInvalid, name)
	}
	return nil
}

// reach opens a repository; errors are ErrNotFound and ErrInvalid.
func (a *auto) reach(registry, name string) (repository, converter.Place, error) {
	r := repository{registry, name}
	reg, ok := a.registries[registry]
	if !ok {
		return r, nil, fmt.Errorf("%w: registry %q is not one of this service's: %s", ErrNotFound, registry, strings.Join(a.names, ", "))
	}
	if err := CheckRepository(name); err != nil {
		return r, nil, err
	}
	p, err := reg.Open(name)
	if err != nil {
		return r, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return r, p, nil
}

// placeError makes what a place says one of this package's errors, as far as there is one for it.
func placeError(err error) error {
	switch {
	case err == nil, errors.Is(err, ErrNotFound), errors.Is(err, ErrUnavailable), errors.Is(err, ErrInvalid):
		return err
	case errors.Is(err, converter.ErrNotFound):
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case unreachable(err):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// unreachable says that a registry, or the way to it, is the reason: it refused to answer, or did not.
func unreachable(err error) bool {
	var status *transport.Error
	var network net.Error
	return errors.As(err, &status) || errors.As(err, &network) || errors.Is(err, context.Canceled)
}

// Handle notes what a registry tells. It asks no registry: what was noted is looked at in the background, and after a restart, too. Errors are
// ErrNotFound (no such registry), ErrInvalid and ErrUnavailable; after the last the event is to be sent again.
func (a *auto) Handle(ctx context.Context, e Event) error {
	if dgst := digest.Digest(e.Tag); dgst.Validate() == nil {
		e.Tag, e.Digest = "", cmp.Or(e.Digest, dgst) // some name what was pushed without a tag so
	}
	r := repository{e.Registry, e.Repository}
	if _, _, err := a.reach(e.Registry, e.Repository); err != nil {
		return err
	}
	if e.Tag != "" && !tagName.MatchString(e.Tag) {
		return fmt.Errorf("%w: tag %q", ErrInvalid, e.Tag)
	}
	if e.Digest != "" && e.Digest.Validate() != nil {
		return fmt.Errorf("%w: digest %q", ErrInvalid, e.Digest)
	}
	if converter.IsReferrersTag(e.Tag) {
		return nil // what we attach where there is no referrers API is told so, too
	}
	if e.Kind == Deleted {
		return a.handleDeleted(ctx, r, e)
	}
	list, _, err := a.readSettings(ctx, e.Registry)
	if err != nil {
		return err
	}
	if s := countingFor(list, r); !s.Active {
		return nil
	}
	if _, err := a.ensureBase(ctx, r, list); err != nil {
		return err
	}
	if e.Tag == "" {
		// A platform of an index, an artifact, or a tag that the source does not tell: new tags are looked for, which is one request.
		a.hint(r, hint{events: 1, list: true, after: time.Now().Add(listWait)})
		return nil
	}
	t, err := a.getTag(ctx, r, e.Tag)
	if err != nil {
		return err
	}
	if t.State == stateDone && t.Digest == e.Digest && e.Digest != "" {
		return nil // told before
	}
	if t.rev == 0 && !a.hasRoom(r) {
		a.hint(r, hint{events: 1, list: true})
		return nil
	}
	t.Anew = t.Anew || t.State == stateBefore // pushed again, it counts as new
	t.due(time.Now().UTC())
	t.Source, t.By = e.Source, e.By
	// Whatever another process writes now: that the tag is due must not be lost.
	if err := a.putTag(ctx, r, t); err != nil {
		return err
	}
	news := hint{events: 1}
	if t.rev == 0 {
		news.noted = 1
	}
	a.hint(r, news)
	return nil
}

// hasRoom says whether a tag that is not known may be noted: those that are told of and are not there are forgotten after a while only.
func (a *auto) hasRoom(r repository) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.hints[r]
	return h == nil || h.noted < maxNoted
}

// hint says what of a repository is to be looked at: tags that are due in any case.
type hint struct {
	events  uint64          // 1 if it is one
	noted   int             // tags that were not known before
	list    bool            // the tags are listed, too, and new ones are due
	gone    []digest.Digest // images that may have been deleted
	after   time.Time       // not before
	tries   int             // that did not do it
	running bool
	again   bool // there was news while it was running
}

// Waits before a repository is looked at again when its registry, or its tag, was not there.
const (
	firstWait = time.Second
	lastWait  = time.Minute
	listWait  = 2 * time.Second // for the rest of a push of many manifests
	looks     = 8               // repositories of a registry looked at at once
	maxLooks  = 10              // in vain, then it is left to reconcile
	maxNoted  = visitLooks      // tags that are not known, and images that may be gone, between two looks: reconcile finds the rest
)

func (a *auto) hint(r repository, news hint) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.deeds.events += news.events
	h := a.hints[r]
	if h == nil {
		h = &hint{after: news.after}
		a.hints[r] = h
	}
	if news.after.IsZero() {
		h.after, h.tries = time.Time{}, 0
	}
	h.list = h.list || news.list
	h.noted += news.noted
	h.addGone(news.gone)
	h.again = h.running
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// addGone adds images, each once; what there are too many of is for reconcile.
func (h *hint) addGone(list []digest.Digest) {
	for _, d := range list {
		if len(h.gone) < maxNoted && !slices.Contains(h.gone, d) {
			h.gone = append(h.gone, d)
		}
	}
}

// follow looks at what there are hints of, until ctx ends.
func (a *auto) follow(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		r, h, ok := a.nextHint(ctx)
		if !ok {
			return
		}
		wg.Go(func() {
			again := a.lookAt(ctx, r, h)
			a.hintDone(r, h, again)
		})
	}
}

// nextHint waits for a hint whose time has come, and takes it. It is false when ctx has ended.
func (a *auto) nextHint(ctx context.Context) (repository, hint, bool) {
	for {
		now := time.Now()
		wait := time.Hour
		a.mu.Lock()
		running := map[string]int{} // by registry: one that does not answer is in no other's way
		for r, h := range a.hints {
			if h.running {
				running[r.registry]++
			}
		}
		for r, h := range a.hints {
			if h.running || running[r.registry] >= looks {
				continue
			}
			if d := h.after.Sub(now); d > 0 {
				wait = min(wait, d)
				continue
			}
			taken := *h
			h.running, h.again, h.list, h.gone, h.noted = true, false, false, nil, 0
			a.mu.Unlock()
			return r, taken, true
		}
		a.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return repository{}, hint{}, false
		case <-a.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// hintDone ends the look at a hint that nextHint gave. With again something of it is left to look at, later.
func (a *auto) hintDone(r repository, taken hint, again bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.hints[r]
	h.running = false
	switch {
	case again && (h.again || taken.tries < maxLooks):
		h.list = h.list || taken.list
		h.addGone(taken.gone)
		if !h.again {
			h.tries = taken.tries + 1
			h.after = time.Now().Add(min(firstWait<<min(h.tries-1, 10), lastWait))
		}
	case !h.again:
		delete(a.hints, r)
	}
	h.again = false
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// lookAt looks at what of a repository is due. It says whether something is left.
func (a *auto) lookAt(ctx context.Context, r repository, h hint) (again bool) {
	stopped := ctx.Done()
	ctx, cancel := context.WithTimeout(ctx, visitTime)
	defer cancel()
	warn := func(what string, err error) {
		select {
		case <-stopped:
			return
		default:
		}
		if err != nil {
			a.log.Warn(what, "repository", r.String(), "error", err)
		}
	}
	v, err := a.visit(ctx, r)
	if err != nil {
		warn("look at a repository", err)
		return true
	}
	for _, dgst := range h.gone {
		err := v.cascade(ctx, dgst)
		warn("look for a deleted image", err)
		again = again || err != nil
	}
	if !v.settings.Active {
		v.countDue()
		return again
	}
	var listed []string
	if h.list {
		if listed, err = v.list(ctx); err != nil {
			warn("look for new tags", err)
			return true
		}
	}
	left, err := v.due(ctx, listed)
	v.countDue()
	warn("look at what was pushed", err)
	return again || left || err != nil
}
