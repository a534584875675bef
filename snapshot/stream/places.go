package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// containerd shares snapshots by chain ID, so an image's bytes may be those of an image of another repository that was pulled before: of somebody else, who may delete it, or let its registry drip. So an image keeps
// every repository that it answered a pull of, and what one does not give is read from the next. Whoever gives them, bytes are checked against the one index.

const (
	// maxPlaces is how many repositories of an image are kept. Others come in the place of those that do not give what is asked for: somebody may have pulled it from any number of theirs.
	maxPlaces = 16
	// placeLasts is how long a repository that did not give a blob is asked after the others.
	placeLasts = 10 * time.Minute
	// A repository of another registry is asked when one has not answered for Options.StartQuiet / patienceShare, about 10 s, or gives less than slowRate, bytes per second.
	patienceShare = 3
	slowRate      = 64 << 10
	// elsewhereRest is the pause between two questions where else an image is.
	elsewhereRest = time.Minute
)

var errSlowPlace = errors.New("it is so slow that another repository is asked")

// places are the repositories where an image's blobs may be read.
type places struct {
	mu   sync.Mutex
	list []registryclient.Repository // in the order of their pulls
	bad  map[string]time.Time        // until then asked after the others: a registry, a repository, or a blob of one
	gave registryclient.Repository   // the last that gave anything

	asking sync.Mutex                  // guards what follows
	asked  time.Time                   // when Options.Elsewhere was
	more   []registryclient.Repository // of its answer, that have not had their turn
}

func newPlaces(rec *record) *places {
	return &places{list: append([]registryclient.Repository{rec.Repository}, rec.Others...), bad: map[string]time.Time{}}
}

func badBlob(repo registryclient.Repository, dgst digest.Digest) string {
	return string(repo) + "@" + dgst.String()
}

// ordered lists the repositories in the order in which they are asked for a blob: those that did not give it lately last, the longest ago first. good are how many are not of these.
func (p *places) ordered(dgst digest.Digest) (list []registryclient.Repository, good int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	until := map[registryclient.Repository]time.Time{}
	for _, repo := range p.list {
		for _, key := range []string{registryOf(repo), string(repo), badBlob(repo, dgst)} {
			if t := p.bad[key]; t.After(now) && t.After(until[repo]) {
				until[repo] = t
			}
		}
		if until[repo].IsZero() {
			good++
		}
	}
	list = slices.Clone(p.list)
	slices.SortStableFunc(list, func(a, b registryclient.Repository) int { return until[a].Compare(until[b]) })
	return list, good
}

// failed notes that repo did not give a blob, and returns what is so asked after the others.
func (p *places) failed(repo registryclient.Repository, dgst digest.Digest, err error) (key string) {
	key = badBlob(repo, dgst)
	switch {
	case errors.Is(err, registryclient.ErrNotFound), errors.Is(err, registryclient.ErrNoRanges):
	case errors.Is(err, registryclient.ErrDenied):
		key = string(repo)
	default:
		key = registryOf(repo)
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, t := range p.bad {
		if !t.After(now) {
			delete(p.bad, k)
		}
	}
	p.bad[key] = now.Add(placeLasts)
	return key
}

// add adds a repository. If all places are taken it gets that of one that is asked after the others; if none is, and it was pulled from, the oldest's. The first is the record's and stays, and so
// does who gives: pulls of others must not take it away. add reports whether repo is new.
func (p *places) add(repo registryclient.Repository, pulled bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.list, repo) {
		return false
	}
	if len(p.list) >= maxPlaces {
		i := p.replaced(p.isBad)
		if i == 0 && pulled {
			i = p.replaced(func(registryclient.Repository) bool { return true })
		}
		if i == 0 {
			return false
		}
		p.list = slices.Delete(p.list, i, i+1)
	}
	p.list = append(p.list, repo)
	return true
}

// replaced finds the oldest repository that may be replaced, and is so; 0 is none. The caller holds mu.
func (p *places) replaced(so func(registryclient.Repository) bool) int {
	return 1 + slices.IndexFunc(p.list[1:], func(repo registryclient.Repository) bool { return repo != p.gave && so(repo) })
}

// isBad reports whether repo did not give some blob lately. The caller holds mu.
func (p *places) isBad(repo registryclient.Repository) bool {
	now := time.Now()
	for key, until := range p.bad {
		if until.After(now) && (key == registryOf(repo) || key == string(repo) || strings.HasPrefix(key, badBlob(repo, ""))) {
			return true
		}
	}
	return false
}

// beyond reports whether there are others than those of list.
func (p *places) beyond(list []registryclient.Repository) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.list, func(repo registryclient.Repository) bool { return !slices.Contains(list, repo) })
}

// gives notes that repo has given something.
func (p *places) gives(repo registryclient.Repository) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gave = repo
}

// others are those but the first.
func (p *places) others() []registryclient.Repository {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.list[1:])
}

// Pulled notes that image id answers a pull of ref, be it the pull of another image with the same chain of layers: it is read there, too.
func (s *Store) Pulled(id, ref string) error {
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		return err
	}
	img, err := s.load(id)
	if err != nil {
		return err
	}
	_, err = s.readIn(img, repo, true)
	return err
}

// readIn notes that img is read in repo, too, if that is one that may be streamed from, be it that img answers a pull of it, or that Options.Elsewhere says so. It reports whether that is
// news.
func (s *Store) readIn(img *image, repo registryclient.Repository, pulled bool) (news bool, err error) {
	if s.o.Allow != nil && s.o.Allow(repo) != nil || !img.places.add(repo, pulled) {
		return false, nil
	}
	s.log.Info("an image is read in another repository, too, that it was pulled from", "image", img.name(), "repository", repo)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[img.id] != img {
		return true, nil
	}
	rec := *img.rec
	rec.Others = img.places.others()
	return true, rec.save(s.imageDir(img.id))
}

// askElsewhere notes where else img is, and reports whether that is anywhere but in list.
func (s *Store) askElsewhere(ctx context.Context, img *image, list []registryclient.Repository) bool {
	if s.o.Elsewhere == nil {
		return false
	}
	p := img.places
	p.asking.Lock()
	defer p.asking.Unlock()
	if p.beyond(list) {
		return true // another read has asked meanwhile
	}
	var err error
	if len(p.more) == 0 && time.Since(p.asked) >= elsewhereRest {
		p.asked = time.Now()
		p.more, err = s.o.Elsewhere(ctx, img.rec.ChainIDs)
	}
	for n := 0; len(p.more) > 0 && n < maxPlaces-1; p.more = p.more[1:] { // not all at once: they would be in each other's place
		news, saveErr := s.readIn(img, p.more[0], false)
		if err = errors.Join(err, saveErr); news {
			n++
		}
	}
	if err != nil {
		s.log.Warn("where else an image was pulled from", "image", img.name(), "error", err)
	}
	return p.beyond(list)
}

// placedBody is a range of a blob, out of as many repositories as it takes.
type placedBody struct {
	blob  blob
	ctx   context.Context // of the read: io.Reader has no place for it
	dgst  digest.Digest
	off   int64
	left  int64
	try   int
	tried map[registryclient.Repository]bool
	down  map[string]bool // registries whose hosts gave nothing: to ask them for another repository would take as long
	errs  []error

	repo   registryclient.Repository // of body
	from   int64                     // where body begins
	body   io.ReadCloser
	ends   context.Context         // of body
	cancel context.CancelCauseFunc // of ends
	hurry  bool                    // there is another registry to ask
	waited time.Duration           // for body
}

// readRange reads a range of a blob of the image where it is to be had.
func (b blob) readRange(ctx context.Context, dgst digest.Digest, off, n int64, try int) (io.ReadCloser, error) {
	if b.image == nil { // it is being looked for
		return b.store.o.Registry.ReadRange(ctx, b.rec.Repository, dgst, off, n, try)
	}
	r := &placedBody{blob: b, ctx: ctx, dgst: dgst, off: off, left: n, try: try, tried: map[registryclient.Repository]bool{}, down: map[string]bool{}}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

// open asks one repository after the other for what is left, each once, and when none has it for others.
func (r *placedBody) open() error {
	p := r.blob.image.places
	for {
		list, good := p.ordered(r.dgst)
		i := slices.IndexFunc(list, func(repo registryclient.Repository) bool { return !r.tried[repo] && !r.down[registryOf(repo)] })
		if i < 0 {
			if r.blob.store.askElsewhere(r.ctx, r.blob.image, list) {
				continue
			}
			return errors.Join(r.errs...)
		}
		repo := list[i]
		r.hurry = i < good && slices.ContainsFunc(list[:good], func(o registryclient.Repository) bool { return !r.tried[o] && registryOf(o) != registryOf(repo) })
		err := r.ask(repo)
		if err == nil {
			p.gives(repo)
			return nil
		}
		if err = r.failed(repo, err); r.ctx.Err() != nil || !errors.Is(err, registryclient.ErrHosts) && !errors.Is(err, errSlowPlace) {
			return err
		}
	}
}

// failed notes that repo did not give what is left. It returns why none did until now.
func (r *placedBody) failed(repo registryclient.Repository, err error) error {
	r.errs = append(r.errs, err)
	if r.ctx.Err() == nil {
		key := r.blob.image.places.failed(repo, r.dgst, err)
		r.down[registryOf(repo)] = key == registryOf(repo) && !errors.Is(err, errSlowPlace)
	}
	r.tried[repo] = !errors.Is(err, errSlowPlace) // it is asked again, without haste, if it is the only one
	return errors.Join(r.errs...)
}

// ask asks a repository for what is left.
func (r *placedBody) ask(repo registryclient.Repository) error {
	ctx, cancel := context.WithCancelCause(r.ctx)
	r.waited, r.from = 0, r.off
	stop := r.watch(cancel)
	body, err := r.blob.store.o.Registry.ReadRange(ctx, repo, r.dgst, r.off, r.left, r.try)
	stop()
	if err != nil {
		err = slow(ctx, repo, err)
		cancel(nil)
		return err
	}
	r.repo, r.body, r.ends, r.cancel = repo, body, ctx, cancel
	return nil
}

// slow is err, or that repo was too slow, if that is why ctx has ended.
func slow(ctx context.Context, repo registryclient.Repository, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, errSlowPlace) {
		return fmt.Errorf("%s: %w", repo, cause)
	}
	return err
}

// watch has a wait for the repository end if that is slow and there is another one. stop ends it.
func (r *placedBody) watch(cancel context.CancelCauseFunc) (stop func()) {
	if !r.hurry {
		return func() {}
	}
	may := r.blob.store.o.StartQuiet/patienceShare + time.Duration(float64(r.off-r.from)/slowRate*float64(time.Second)) - r.waited
	began := time.Now()
	late := time.AfterFunc(may, func() { cancel(errSlowPlace) })
	return func() {
		late.Stop()
		r.waited += time.Since(began)
	}
}

func (r *placedBody) Read(p []byte) (int, error) {
	for {
		stop := r.watch(r.cancel)
		n, err := r.body.Read(p)
		stop()
		r.off, r.left = r.off+int64(n), r.left-int64(n)
		if err == nil || r.left == 0 || r.ctx.Err() != nil {
			return n, err
		}
		if n > 0 {
			return n, nil // it says so again
		}
		err = r.failed(r.repo, slow(r.ends, r.repo, err))
		r.Close()
		if r.open() != nil {
			return 0, err
		}
	}
}

// Wrong passes on what fs/cache.Blob's readers are told. Another repository is asked for the bytes then, if there is one.
func (r *placedBody) Wrong(off, n int64) {
	if off >= r.from {
		tellWrong(r.body, off, n)
		r.blob.image.places.failed(r.repo, r.dgst, registryclient.ErrNotFound)
	}
}

// Close ends the request.
func (r *placedBody) Close() error {
	defer r.cancel(nil)
	return r.body.Close()
}
