package criproxy

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// maxCredentials is how many credentials are kept of one image: pods may pull it with different secrets, and a secret that is renewed comes as another one.
const maxCredentials = 4

// Options of a Store.
type Options struct {
	// File is where credentials are kept over restarts of the daemon, encrypted with what is in Key, a file that must be on a tmpfs: it is gone after a reboot, and File worth nothing then. With
	// Key == "" they are kept in memory only, and File is removed.
	File, Key string
	// OnFile is told when credentials can no longer be kept over a restart, or not those of before, and with nil when they can again. It must not block or call the Store. Nil is nobody.
	OnFile func(err error)
}

// Store has the credentials of pulls: it is a credentials.Source. It is safe for concurrent use.
//
// One belongs to a repository while the pull lasts. When that has succeeded it belongs to the image, by the repository and the image's ID, as long as that is streamed from there; the
// last few of an image, the newest first, are kept, because some may have been withdrawn. One of a failed pull, or of an image that is not streamed (of which nothing is read any more), is forgotten.
//
// That an image is gone is what the images say, and not RemoveImage: containers may run on, and read, after it, and images are removed by others too.
type Store struct {
	o Options

	saving sync.Mutex // held while the file is written. LOCK ORDER: before mu
	failed bool       // the last time, and OnFile was told; guarded by saving

	mu      sync.Mutex
	last    int64 // order of the newest pull
	pulling []*entry
	kept    []*entry // the newest first
	images  func() ([]Image, error)
	dropped func(registryclient.Repository)
}

// Image is one that is streamed from a repository. An ID of "" stands for all of the repository.
type Image struct {
	Repository registryclient.Repository
	ID         string // digest of its config
}

// entry is a Credential and what it is for.
type entry struct {
	Repository registryclient.Repository `json:"repository"`
	ID         string                    `json:"id,omitempty"` // of the image; "" while it is pulled
	Order      int64                     `json:"order"`        // of pulls, the highest is the newest
	Credential
}

// Open returns the Store with what is in its file. Whatever is wrong with that is no error: OnFile is told, and it goes on without.
func Open(o Options) *Store {
	s := &Store{o: o}
	kept, err := s.load()
	if err != nil {
		s.tell(err)
	}
	for _, e := range kept {
		s.last = max(s.last, e.Order)
	}
	s.kept = kept
	return s
}

func (s *Store) tell(err error) {
	if s.o.OnFile != nil {
		s.o.OnFile(err)
	}
}

// Begin is Pulls's.
func (s *Store) Begin(r *runtime.PullImageRequest) (done func(id string)) {
	c, ok := credentialOf(r.GetAuth())
	if !ok {
		return nil
	}
	repo, _, _, err := registryclient.ParseReference(r.GetImage().GetImage())
	if err != nil {
		return nil // containerd says so
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	e := &entry{Repository: repo, Order: s.last, Credential: c}
	s.pulling = append(s.pulling, e)
	return func(id string) { s.ended(e, id) }
}

// ended ends the pull of e: id is the image's, "" if it has failed.
func (s *Store) ended(e *entry, id string) {
	gone := s.gone()
	k := &entry{Repository: e.Repository, ID: id, Order: e.Order, Credential: e.Credential}
	keep := id != "" && !gone(k)
	s.mu.Lock()
	s.pulling = slices.DeleteFunc(s.pulling, func(p *entry) bool { return p == e })
	if keep {
		n := 1
		s.kept = append([]*entry{k}, slices.DeleteFunc(s.kept, func(old *entry) bool {
			if old.Repository != k.Repository || old.ID != k.ID {
				return false
			}
			if old.Credential == k.Credential {
				return true
			}
			n++
			return n > maxCredentials
		})...)
	}
	s.mu.Unlock()
	if keep {
		s.save()
		s.Sweep() // it may have gone meanwhile
	}
	s.tellDropped(e)
}

// Follow has credentials dropped with their images: images lists those that are streamed, or an error for when it cannot tell, which drops nothing. Until Follow is called nothing is dropped.
// dropped is told of a repository when its last credential has gone, the one of a pull that has failed, too. Neither may call the Store.
func (s *Store) Follow(images func() ([]Image, error), dropped func(registryclient.Repository)) {
	s.mu.Lock()
	s.images, s.dropped = images, dropped
	s.mu.Unlock()
	s.Sweep()
}

// Sweep drops the credentials of images that are gone.
func (s *Store) Sweep() {
	s.mu.Lock()
	kept := slices.Clone(s.kept)
	s.mu.Unlock()
	if len(kept) == 0 {
		return
	}
	gone := s.gone()
	drop := slices.DeleteFunc(kept, func(e *entry) bool { return !gone(e) })
	if len(drop) == 0 {
		return
	}
	s.mu.Lock()
	s.kept = slices.DeleteFunc(s.kept, func(e *entry) bool { return slices.Contains(drop, e) })
	s.mu.Unlock()
	s.save()
	s.tellDropped(drop...)
}

// tellDropped tells of the repositories of gone that have no credential any more.
func (s *Store) tellDropped(gone ...*entry) {
	done := map[registryclient.Repository]bool{} // has one, or was told
	s.mu.Lock()
	for _, e := range slices.Concat(s.pulling, s.kept) {
		done[e.Repository] = true
	}
	dropped := s.dropped
	s.mu.Unlock()
	for _, e := range gone {
		if dropped != nil && !done[e.Repository] {
			done[e.Repository] = true
			dropped(e.Repository)
		}
	}
}

// gone returns what says of an entry whether its image is not streamed.
func (s *Store) gone() func(*entry) bool {
	s.mu.Lock()
	list := s.images
	s.mu.Unlock()
	nothing := func(*entry) bool { return false }
	if list == nil {
		return nothing
	}
	images, err := list()
	if err != nil {
		return nothing
	}
	here := map[Image]bool{}
	for _, i := range images {
		here[i] = true
	}
	return func(e *entry) bool { return !here[Image{e.Repository, e.ID}] && !here[Image{e.Repository, ""}] }
}

// Name implements credentials.Source.
func (s *Store) Name() string { return "CRI proxy" }

// Lookup implements credentials.Source: what pulls under way came with, then what has worked, the newest first. As in containerd, mirrors are shown it too, unless it is for one host.
func (s *Store) Lookup(_ context.Context, p registryclient.Place) (list []credentials.Login, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	newest := func(a, b *entry) int { return cmp.Compare(b.Order, a.Order) }
	for _, e := range append(slices.SortedFunc(slices.Values(s.pulling), newest), slices.SortedFunc(slices.Values(s.kept), newest)...) {
		l := credentials.Login{User: e.User, Secret: e.Secret}
		if e.Repository == p.Image && e.isFor(p.Names) && !slices.Contains(list, l) {
			list = append(list, l)
		}
	}
	return list, nil
}

// isFor reports whether c may be shown where a repository has one of names.
func (c Credential) isFor(names []registryclient.Repository) bool {
	return c.Host == "" || slices.ContainsFunc(names, func(n registryclient.Repository) bool {
		host, _, _ := strings.Cut(string(n), "/")
		return host == c.Host || host == "docker.io" && c.Host == "registry-1.docker.io"
	})
}
