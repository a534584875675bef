// Package registryclient talks to registries for the node: referrers, manifests and ranged reads of blobs, over the hosts that containerd's certs.d configuration gives.
//
// Every operation is one question to the hosts of a repository, in the order of hosts.toml and the registry itself last: the first good answer
// counts, a host that fails is asked again only after the others, and when all have failed for a while (Options.Budget; for reads Options.Wait) the caller gets the
// reason. What is learnt on the way is remembered, so that the usual question costs one round trip: tokens per host and repository, the
// place where a blob's redirect led, hosts that are down, hosts without the referrers API.
//
// Whatever has a digest is verified, except ranges of blobs: who reads those knows the digests of the chunks inside.
//
// The package does not push, keeps nothing on disk and logs nothing. Credentials go to the registry's hosts and to the token server that a
// host names, never to where a redirect leads; query strings, which carry signatures, are left out of errors.
package registryclient

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotFound: no host has it.
var ErrNotFound = errors.New("not found")

// Options of a Client.
type Options struct {
	HostsDir    string      // certs.d; "" is none
	Credentials Credentials // nil is anonymous
	UserAgent   string      // "" is "streaming-snapshotter"

	Budget time.Duration    // how long an operation goes on without getting anything before it fails; 0 is 30 s
	Wait   time.Duration    // the same for ReadRange, whose callers cannot do without: running containers; 0 is Budget. Access that is denied ends it after half a minute
	OnHost func(HostStatus) // told when a host goes away, comes back or gave wrong answers: once each, not per request; it must not block or call the Client. Nil is nobody

	Stall time.Duration // how long one request may stay silent before it counts as broken; 0 is 15 s
}

const (
	defaultBudget = 30 * time.Second
	defaultStall  = 15 * time.Second
)

// Client is safe for concurrent use.
type Client struct {
	o     Options
	meter meter

	mu         sync.Mutex
	registries map[string]*registry
	redirects  redirects
	hedges     int // earned for second requests, in parts of one
}

// Stats counts what a Client has sent and received since New, token requests and failures included.
type Stats struct {
	Requests int64
	Bytes    int64 // of response bodies
}

type meter struct{ requests, bytes atomic.Int64 }

// New returns a Client.
func New(o Options) (*Client, error) {
	if o.Budget < 0 || o.Wait < 0 || o.Stall < 0 {
		return nil, errors.New("registry client: negative Budget, Wait or Stall")
	}
	if o.Budget == 0 {
		o.Budget = defaultBudget
	}
	if o.Wait == 0 {
		o.Wait = o.Budget
	}
	if o.Stall == 0 {
		o.Stall = defaultStall
	}
	if o.UserAgent == "" {
		o.UserAgent = "streaming-snapshotter"
	}
	go x509.SystemCertPool() // read once for each process, which takes 20 ms: not in the first pull
	return &Client{o: o, registries: map[string]*registry{}}, nil
}

// Stats returns the counts so far.
func (c *Client) Stats() Stats {
	return Stats{Requests: c.meter.requests.Load(), Bytes: c.meter.bytes.Load()}
}

// Close closes idle connections. Operations under way are not disturbed, and the Client stays usable.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.registries {
		r.closeIdle()
	}
	return nil
}

// Manifest fetches a manifest by digest (verified) of at most max bytes.
func (c *Client) Manifest(ctx context.Context, repo Repository, dgst digest.Digest, max int64) ([]byte, error) {
	b, err := c.fetch(ctx, repo, "manifests", dgst, max)
	if err != nil {
		return nil, fmt.Errorf("fetch manifest %s@%s: %w", repo, dgst, err)
	}
	return b, nil
}

// Blob fetches a whole small blob (verified) of at most max bytes.
func (c *Client) Blob(ctx context.Context, repo Repository, dgst digest.Digest, max int64) ([]byte, error) {
	b, err := c.fetch(ctx, repo, "blobs", dgst, max)
	if err != nil {
		return nil, fmt.Errorf("fetch blob %s@%s: %w", repo, dgst, err)
	}
	return b, nil
}

func (c *Client) fetch(ctx context.Context, repo Repository, kind string, dgst digest.Digest, max int64) ([]byte, error) {
	if err := dgst.Validate(); err != nil {
		return nil, err
	}
	k, err := c.newCall(ctx, repo, canPull)
	if err != nil {
		return nil, err
	}
	defer k.end()
	q := question{path: kind + "/" + dgst.String()}
	if kind == "blobs" {
		q.blob = dgst
	} else {
		q.accept = manifestTypes
	}
	var b []byte
	err = k.ask(func(h *host) error {
		var err error
		if _, b, err = k.read(h, q, max); err != nil {
			return err
		}
		if got := dgst.Algorithm().FromBytes(b); got != dgst {
			h.wrong("it gave bytes that are not those of their digest")
			return refusedAs(ErrMismatch, "content has digest %s", got)
		}
		return nil
	})
	return b, err
}

// maxManifest bounds what Resolve takes: registries commonly refuse larger ones.
const maxManifest = 4 << 20

// Resolve fetches the manifest or index that ref ("host/repo:tag" or "host/repo@digest") names.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	desc, b, err := c.resolve(ctx, ref)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("resolve %s: %w", ref, err)
	}
	return desc, b, nil
}

func (c *Client) resolve(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	repo, tag, dgst, err := ParseReference(ref)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	need, object := canResolve, tag
	if dgst != "" {
		need, object = canPull, dgst.String()
	}
	k, err := c.newCall(ctx, repo, need)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	defer k.end()
	var (
		desc ocispec.Descriptor
		b    []byte
	)
	q := question{path: "manifests/" + object, accept: manifestTypes}
	err = k.ask(func(h *host) error {
		header, body, err := k.read(h, q, maxManifest)
		if err != nil {
			return err
		}
		b = body
		// The digest is that of the bytes we got. What the registry says in Docker-Content-Digest proves nothing and is not asked.
		algorithm := digest.Canonical
		if dgst != "" {
			algorithm = dgst.Algorithm()
		}
		got := algorithm.FromBytes(b)
		if dgst != "" && got != dgst {
			return refusedAs(ErrMismatch, "content has digest %s", got)
		}
		mediaType, err := mediaTypeOf(header, b)
		if err != nil {
			return err
		}
		desc = ocispec.Descriptor{MediaType: mediaType, Digest: got, Size: int64(len(b))}
		return nil
	})
	return desc, b, err
}
