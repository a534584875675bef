package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// An image that is here is held against the policy of today whenever a container is made of it: the policy may be stricter than that of its pull, and whoever was trusted then may not be
// any more. What is asked is only whether trust was withdrawn, by the files of today and by nobody else: a signature that has run out meanwhile, a server that is away or a file with a
// mistake in it leaves what is here as it was. Or a node would not come up after it, with what it ran before.
//
// Revocation is asked about in the background, when the last answer has run out.

const (
	// vetEvery is how long after a verdict has run out it is asked for again at the latest, and how long after a time when that came to nothing.
	vetEvery = time.Hour
	// doubtFor is how long what cannot be checked by unchanged files is left as it is without trying again.
	doubtFor = 10 * time.Minute
)

// doubt is that the signatures of an image cannot be checked by the files of an epoch.
type doubt struct {
	epoch string
	until time.Time
}

// Vet says why no new container of image id may be made by the policy of today, or nil. It asks nobody, but where the image lacks what the policy wants: then the image is proven now, which takes as
// long as fetching it. What is proven when ctx ends is remembered.
func (s *Store) Vet(ctx context.Context, id string) error {
	img, err := s.load(id)
	if err != nil {
		if policy, _ := s.policyOf(""); policy != trust.Signed && policy != trust.Proven {
			return nil // what is mounted needs no record
		}
		return err
	}
	if err := img.refused(); err != nil {
		return err
	}
	policy, _ := s.policyOf(img.rec.Repository)
	lacks := s.lacks(ctx, img)
	switch {
	case lacks == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case s.o.Trust.Ledger == nil && policy == trust.Proven:
		return fmt.Errorf("streamed image %s: the policy of %s is proven, and nothing proves images here but the daemon", img.id, img.rec.Repository)
	case s.o.Trust.Ledger == nil:
		return fmt.Errorf("streamed image %s of %s is not trusted (any more): %w", img.id, img.rec.Repository, lacks)
	}
	if err := s.Prove(ctx, img.id, func(int64) {}); err != nil {
		return fmt.Errorf("streamed image %s of %s is not trusted (any more) by the policy of today, %s: %w. It cannot be proven either: %w. Delete its pods, remove it from the node (crictl rmi) and pull it again, or trust its signer again",
			img.id, img.rec.Repository, policy, lacks, err)
	}
	return nil
}

// lacks says what img lacks for the policy of today, or nil. It asks nobody.
func (s *Store) lacks(ctx context.Context, img *image) error {
	policy, v := s.policyOf(img.rec.Repository)
	switch {
	case policy != trust.Signed && policy != trust.Proven, s.o.Trust.Ledger != nil && s.proven(img.rec):
		return nil
	case v != nil:
		return s.stillSigned(ctx, img, v)
	}
	return untrusted(policy)
}

// stillSigned says why none of the signatures that img was let in for counts any more.
func (s *Store) stillSigned(ctx context.Context, img *image, v trust.Verifier) error {
	epoch := v.Epoch()
	list := s.vettedOf(img)
	if slices.ContainsFunc(list, func(g *vetted) bool { return (g.Epoch == epoch || g.Trusted == epoch) && g.Revoked == "" }) {
		return nil
	}
	if d := img.doubt.Load(); d != nil && d.epoch == epoch && time.Now().Before(d.until) {
		return nil
	}
	var withdrawn, unknown error
	for _, g := range list {
		if g.Revoked != "" {
			withdrawn = fmt.Errorf("%w: %s", trust.ErrRevoked, g.Revoked)
			continue
		}
		target, envelope := g.of(img.rec.Artifact)
		switch is := v.Trusts(ctx, target, envelope); {
		case is == nil:
			again := *g
			again.Trusted = epoch
			switch err := s.vouch(img, g, &again); {
			case errors.Is(err, errNewer):
				return s.stillSigned(ctx, img, v)
			case err != nil:
				s.log.Warn("a verdict by changed files of the trust policy is not written down: it is asked for again", "image", img.name(), "error", err)
			}
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(is, trust.ErrUnchecked):
			unknown = is
		default:
			withdrawn = is
		}
	}
	switch {
	case withdrawn != nil:
		return withdrawn // that a statement for another repository says nothing is no word for it
	case unknown == nil:
		return trust.ErrMissing
	}
	img.doubt.Store(&doubt{epoch, time.Now().Add(doubtFor)})
	s.log.Warn("whether the signature of an image is trusted still cannot be checked: its containers start as before", "image", img.name(), "error", unknown)
	return nil
}

// trusted says why img serves no further pull without a search: it was let in by another policy than that of today. It asks nobody.
func (s *Store) trusted(img *image) error {
	policy, v := s.policyOf(img.rec.Repository)
	switch {
	case policy != trust.Signed && policy != trust.Proven, s.o.Trust.Ledger != nil && s.proven(img.rec):
		return nil
	case v != nil:
		epoch := v.Epoch()
		if slices.ContainsFunc(s.vettedOf(img), func(g *vetted) bool { return g.Epoch == epoch && g.Revoked == "" }) {
			return nil
		}
	}
	return untrusted(policy)
}

var errUnproven = errors.New("not all of it is proven")

// untrusted is what an image lacks for a policy, if it was let in by another.
func untrusted(policy trust.Policy) error {
	if policy == trust.Proven {
		return errUnproven
	}
	return trust.ErrMissing
}

// vetAgain asks again for verdicts that have run out, until ctx ends.
func (s *Store) vetAgain(ctx context.Context) {
	tried := map[string]time.Time{} // in vain, by image
	for {
		next := time.Now().Add(vetEvery)
		for _, img := range s.onDisk() {
			_, v := s.policyOf(img.rec.Repository)
			if v == nil {
				continue
			}
			for _, g := range s.vettedOf(img) {
				key := img.id + " " + string(g.Repository)
				due := g.Verdict.Until
				if at := tried[key].Add(vetEvery); at.After(due) {
					due = at
				}
				if time.Now().Before(due) {
					if due.Before(next) {
						next = due
					}
					continue
				}
				err := s.verifyAgain(ctx, img, g, v)
				if err == nil || ctx.Err() != nil {
					continue
				}
				if tried[key].IsZero() {
					s.log.Warn("the verdict on the signature of an image has run out and cannot be had again: the image is used as before", "image", img.name(), "repository", g.Repository, "error", err)
				}
				tried[key] = time.Now()
			}
		}
		for key, at := range tried {
			if time.Since(at) > 2*vetEvery {
				delete(tried, key) // forgotten, or it came to something
			}
		}
		select {
		case <-time.After(max(time.Until(next), time.Second)):
		case <-ctx.Done():
			return
		}
	}
}

// verifyAgain asks for a verdict that has run out. That its certificate is revoked is a verdict, too.
func (s *Store) verifyAgain(ctx context.Context, img *image, g *vetted, v trust.Verifier) error {
	again := *g
	again.Epoch, again.Revoked = v.Epoch(), ""
	target, envelope := g.of(img.rec.Artifact)
	verdict, err := v.Verify(ctx, target, envelope)
	switch {
	case err == nil:
		again.Verdict = verdict
	case errors.Is(err, trust.ErrRevoked):
		again.Revoked = err.Error()
		again.Verdict.Until = time.Now().Add(vetEvery)
		s.log.Error("the signature of an image is revoked: no container is made of it any more before all of it is proven", "image", img.name(), "repository", g.Repository, "signer", g.Verdict.Identity, "error", err)
	default:
		return err
	}
	return s.vouch(img, nil, &again)
}

// standing reports whether what a search of repo found before needs no other one: the verdict on it may have run out, be withdrawn, or be by other files.
func (s *Store) standing(repo registryclient.Repository, img *image) bool {
	_, v := s.policyOf(repo)
	return v == nil || slices.ContainsFunc(s.vettedOf(img), func(g *vetted) bool { return g.Repository == repo && g.stands(v) })
}

// vettedOf returns the verdicts on img's artifact. They are not to be changed.
func (s *Store) vettedOf(img *image) []*vetted {
	if list := img.vetted.Load(); list != nil {
		return *list
	}
	list := loadVetted(s.imageDir(img.id))
	img.vetted.CompareAndSwap(nil, &list) // what vouch has put there meanwhile is newer
	return *img.vetted.Load()
}

// loadVetted reads the file of an image's verdicts. One that is damaged has none.
func loadVetted(dir string) []*vetted {
	list := []*vetted{}
	b, err := os.ReadFile(filepath.Join(dir, vettedName))
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil || slices.Contains(list, nil) {
		return []*vetted{}
	}
	return list
}

// errNewer says that a verdict is not recorded, because what it was made of is not what counts any more.
var errNewer = errors.New("there is a newer verdict")

// vouch records a verdict on img's artifact, in the place of that of the same repository, and makes it durable. If it is one that was made of another, of, and is as good as that, it is errNewer if somebody has replaced
// of meanwhile.
func (s *Store) vouch(img *image, of, got *vetted) error {
	s.vouching.Lock()
	defer s.vouching.Unlock()
	old := s.vettedOf(img)
	switch {
	case slices.Contains(old, got):
		return nil
	case of != nil && !slices.Contains(old, of):
		return errNewer
	}
	list := slices.DeleteFunc(slices.Clone(old), func(g *vetted) bool { return g.Repository == got.Repository })
	list = append(list, got)
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if s.forgotten(img) {
		return fmt.Errorf("streamed image %s was removed", img.id)
	}
	if err := ledger.WriteFile(s.imageDir(img.id), vettedName, b); err != nil {
		return err
	}
	img.vetted.Store(&list)
	return nil
}

// Signature is what is known of who has signed an image's artifact.
type Signature struct {
	Signer   string    // the subject of who has signed its artifact; "" if nobody has whom the node knows
	Issuer   string    // of the signer's certificate
	Until    time.Time // when that is asked for again at a pull
	Warnings []string  // what failed and is only logged, by the trust policy
}

// Signature returns what is known of that of image id, as one of repo: the zero value where the policy asks for none.
func (s *Store) Signature(id string, repo registryclient.Repository) Signature {
	img, err := s.load(id)
	if err != nil {
		return Signature{}
	}
	for _, g := range s.vettedOf(img) {
		if v := g.Verdict; g.Repository == repo {
			if g.Revoked != "" {
				return Signature{v.Identity, v.Issuer, v.Until, append(slices.Clip(v.Warnings), g.Revoked)}
			}
			return Signature{v.Identity, v.Issuer, v.Until, v.Warnings}
		}
	}
	return Signature{}
}
