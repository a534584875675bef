package stream

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/span"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// searchKey is what is looked for: one repository may have an artifact of an image that another has without.
type searchKey struct {
	repo     registryclient.Repository
	manifest digest.Digest // of the platform manifest
}

// search is one look for an artifact, shared by all that want it at the same time. It goes on when they no longer do: they may ask again.
type search struct {
	cancel  context.CancelFunc
	done    chan struct{}
	image   *image // beside an error, one that was not proven
	err     error
	expires time.Time // of a failure
}

// join returns the search for key, and begins it if none stands: then it is the caller's, whose questions are answered by what is true now.
func (s *Store) join(ctx context.Context, key searchKey) (q *search, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, reason.New(reason.Stopping, errors.New("the daemon is stopping"))
	}
	maps.DeleteFunc(s.searches, func(_ searchKey, q *search) bool { return s.stale(q) })
	q = s.searches[key]
	if mine = q == nil; mine {
		q = &search{done: make(chan struct{})}
		ctx, q.cancel = context.WithCancel(context.WithoutCancel(ctx))
		s.searches[key] = q
		s.running.Go(func() { s.search(ctx, q, key) })
	}
	return q, mine, nil
}

// stale reports whether q has ended and its result stands no longer. The caller holds mu.
func (s *Store) stale(q *search) bool {
	select {
	case <-q.done:
	default:
		return false
	}
	if q.err != nil {
		return time.Now().After(q.expires)
	}
	return s.images[q.image.id] != q.image || q.image.refused() != nil
}

func (s *Store) search(ctx context.Context, q *search, key searchKey) {
	defer close(q.done)
	defer q.cancel()
	ctx, end := span.Start(ctx, "search")
	defer func() { end(q.err) }()
	span.Set(ctx, "image", string(key.repo)+"@"+key.manifest.String())
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, max(s.o.PullWait, s.o.Timeout))
	defer cancel()
	var err error
	q.image, err = s.look(ctx, key)
	for tries := 1; err == nil && s.mustBeProven(q.image, key.repo); tries++ {
		if err = s.proveFirst(ctx, q.image); !errors.Is(err, ErrQuarantined) || tries == maxProven {
			break
		}
		next, lookErr := s.look(ctx, key) // for another artifact
		if lookErr != nil {
			err = errors.Join(err, lookErr)
			break
		}
		q.image, err = next, nil
	}
	if err != nil {
		q.err = WithReason(err)
		span.Set(ctx, "reason", string(reason.Of(q.err)))
		q.expires = time.Now().Add(s.o.RetryAfter)
		if took := time.Since(start); took > time.Second {
			q.expires = q.expires.Add(4 * took) // or searches would take most of the time of a normal pull of many layers
		}
	}
}

// look looks for the image, and no longer than a search may last.
func (s *Store) look(ctx context.Context, key searchKey) (*image, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	img, err := s.lookup(ctx, key.repo, key.manifest)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && err != nil {
		err = fmt.Errorf("the search took longer than %v: %w", s.o.Timeout, err)
	}
	return img, err
}

// maxProven is how many artifacts of an image are fetched whole by one search, because those before have lied.
const maxProven = 4

// mustBeProven reports whether the policy of repo wants img to be proven before it is used. Where nothing is proven at all, nobody uses it: that is `check`.
func (s *Store) mustBeProven(img *image, repo registryclient.Repository) bool {
	policy, _ := s.policyOf(repo)
	return policy == trust.Proven && s.proves() && !s.proven(img.rec)
}

// proveFirst fetches all of img and proves it, as long as the search may last: whoever pulls waits for it, and others for them.
func (s *Store) proveFirst(ctx context.Context, img *image) (err error) {
	ctx, end := span.Start(ctx, "proof")
	defer func() { end(err) }()
	err = s.Prove(ctx, img.id, func(int64) {})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && !errors.Is(err, ErrQuarantined) {
		err = fmt.Errorf("it is not proven within %v (`pull_wait`): %w", s.o.PullWait, context.DeadlineExceeded) // whatever host was being waited for
	}
	if err != nil {
		return fmt.Errorf("artifact sha256:%s: %w", img.id, err)
	}
	return nil
}
