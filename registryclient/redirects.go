package registryclient

import (
	"net/url"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	maxRedirects = 4096
	// redirectLife bounds how long a place is used without asking the registry, which may have withdrawn the right to read. Signed
	// URLs live for some 10 to 20 minutes.
	redirectLife = 5 * time.Minute
)

// redirects remembers where the hosts sent us for blobs. The zero value is ready.
type redirects struct {
	mu sync.Mutex
	m  map[redirectKey]redirect
}

type redirectKey struct {
	host *host
	name string
	blob digest.Digest
}

type redirect struct {
	to   *url.URL
	till time.Time
}

func (r *redirects) get(k redirectKey) *url.URL {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.m[k]; ok && time.Now().Before(e.till) {
		return e.to
	}
	return nil
}

func (r *redirects) put(k redirectKey, to *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if len(r.m) >= maxRedirects {
		for k, e := range r.m {
			if !now.Before(e.till) {
				delete(r.m, k)
			}
		}
	}
	if r.m == nil || len(r.m) >= maxRedirects {
		r.m = map[redirectKey]redirect{} // full of living ones: to ask again costs one round trip each
	}
	r.m[k] = redirect{to, now.Add(redirectLife)}
}

// forget drops what is remembered for k, if it is to; nil is anything. Who failed at an old place must not drop another's new one.
func (r *redirects) forget(k redirectKey, to *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if to == nil || r.m[k].to == to {
		delete(r.m, k)
	}
}
