package converter

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"
)

// RegistryOptions say how to reach registries.
type RegistryOptions struct {
	PlainHTTP bool // HTTP to every registry; loopback and private addresses are tried with HTTPS and HTTP in any case
	Insecure  bool // HTTPS without verifying certificates
	UserAgent string
	Keychain  authn.Keychain    // nil is docker's config.json with its credential helpers, anonymous where that says nothing
	Transport http.RoundTripper // nil is go-containerregistry's; Insecure applies to an *http.Transport
	Stall     time.Duration     // how long a registry may say nothing before a request of it has failed; 0 is a minute
	Limiter   *rate.Limiter     // of requests, those for tokens too: places that share it share the rate; nil is none
}

// registry is a repository of a registry. go-containerregistry does manifests, referrers and pushes, with its tokens and
// retries; what it lacks is a read from the middle of a blob, and the way back out of the referrers tag.
type registry struct {
	repo   name.Repository
	opts   []name.Option
	puller *remote.Puller
	pusher *remote.Pusher

	base     http.RoundTripper
	keychain authn.Keychain

	mu     sync.Mutex
	client *http.Client // nil until the first request that needs it
	hasAPI *bool        // whether the registry has the referrers API; nil until asked
}

// streams is how many blobs may be open at once on one registry: more than any number of jobs that makes sense.
const streams = 64

func openRegistry(image string, o RegistryOptions) (Place, string, error) {
	if strings.Contains(image, "://") {
		return nil, "", fmt.Errorf("image name %q: want HOST/REPO:TAG, without a scheme", image)
	}
	var opts []name.Option
	if o.PlainHTTP {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.ParseReference(image, opts...)
	if err != nil {
		return nil, "", fmt.Errorf("image name %q: %w", image, err)
	}
	r := &registry{repo: ref.Context(), opts: opts, base: o.Transport, keychain: o.Keychain}
	if r.base == nil {
		r.base = remote.DefaultTransport
	}
	if t, ok := r.base.(*http.Transport); ok && o.Insecure {
		r.base = insecure(t)
	}
	r.base = patient{r.base, cmp.Or(o.Stall, defaultStall)}
	if o.Limiter != nil {
		r.base = limited{r.base, o.Limiter}
	}
	if r.keychain == nil {
		r.keychain = authn.DefaultKeychain
	}
	ro := []remote.Option{
		remote.WithAuthFromKeychain(r.keychain), remote.WithTransport(r.base),
		remote.WithUserAgent(o.UserAgent), remote.WithJobs(streams),
	}
	if r.puller, err = remote.NewPuller(ro...); err != nil {
		return nil, "", err
	}
	if r.pusher, err = remote.NewPusher(ro...); err != nil {
		return nil, "", err
	}
	return r, ref.Identifier(), nil
}

// insecure returns t without the verification of certificates.
func insecure(t *http.Transport) *http.Transport {
	t = t.Clone()
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = &tls.Config{}
	}
	t.TLSClientConfig.InsecureSkipVerify = true
	return t
}

// Shared returns o with a transport for all places that are opened with it, so that they share connections.
func (o RegistryOptions) Shared() RegistryOptions {
	base := o.Transport
	if base == nil {
		base = remote.DefaultTransport
	}
	if t, ok := base.(*http.Transport); ok && o.Insecure {
		o.Transport, o.Insecure = insecure(t), false
	}
	return o
}

// limited waits for its turn before each request.
type limited struct {
	http.RoundTripper
	limiter *rate.Limiter
}

func (l limited) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := l.limiter.Wait(req.Context()); err != nil {
		return nil, fmt.Errorf("%s %s: wait for the rate of requests: %w", req.Method, req.URL.Redacted(), err)
	}
	return l.RoundTripper.RoundTrip(req)
}

func (r *registry) String() string { return r.repo.Name() }

func (r *registry) reference(ref string) name.Reference {
	if strings.Contains(ref, ":") {
		return r.repo.Digest(ref)
	}
	return r.repo.Tag(ref)
}

// registryError makes a 404 ErrNotFound, and says the way out of what an operator can mend.
func (r *registry) registryError(err error) error {
	var te *transport.Error
	if !errors.As(err, &te) {
		return err
	}
	switch te.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w (no such repository, or `docker login %s` is needed)", err, r.repo.RegistryStr())
	}
	return err
}

func (r *registry) Manifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	got, err := r.puller.Get(ctx, r.reference(ref))
	if err != nil {
		return ocispec.Descriptor{}, nil, r.registryError(err)
	}
	c, err := parseContent(got.Manifest)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", r.reference(ref), err)
	}
	if c.MediaType == "" {
		c.MediaType = string(got.MediaType)
	}
	d := c.descriptor(got.Manifest)
	d.Digest = digest.Digest(got.Digest.String())
	return d, got.Manifest, nil
}

// httpClient returns a client that is logged in for reading.
func (r *registry) httpClient(ctx context.Context) (*http.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		return r.client, nil
	}
	auth, err := authn.Resolve(ctx, r.keychain, r.repo)
	if err != nil {
		return nil, err
	}
	rt, err := transport.NewWithContext(ctx, r.repo.Registry, auth, transport.NewRetry(r.base), []string{r.repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	r.client = &http.Client{Transport: rt}
	return r.client, nil
}

// get sends a GET below the repository. The caller closes the body.
func (r *registry) get(ctx context.Context, path string, header http.Header, allowed ...int) (*http.Response, error) {
	client, err := r.httpClient(ctx)
	if err != nil {
		return nil, r.registryError(err)
	}
	return r.send(ctx, client, r.repo.RepositoryStr()+"/"+path, header, allowed...)
}

// send sends a GET below /v2/. The caller closes the body.
func (r *registry) send(ctx context.Context, client *http.Client, path string, header http.Header, allowed ...int) (*http.Response, error) {
	address := r.repo.Scheme() + "://" + r.repo.RegistryStr() + "/v2/" + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		return nil, unsigned(err)
	}
	if err := transport.CheckError(resp, allowed...); err != nil {
		resp.Body.Close()
		return nil, r.registryError(err)
	}
	return resp, nil
}

// unsigned takes out of an error what lets its reader do what was asked for: registries send to stores by addresses that are signed.
func unsigned(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		if u, parseErr := url.Parse(ue.URL); parseErr == nil && u.RawQuery != "" {
			u.RawQuery = "..."
			ue.URL = u.Redacted()
		}
	}
	return err
}

func (r *registry) Blob(ctx context.Context, d ocispec.Descriptor, off int64) (io.ReadCloser, error) {
	// Anything but identity would let a proxy compress what is compressed, and Go undo it unasked.
	h := http.Header{"Accept-Encoding": {"identity"}}
	if off > 0 {
		// Some registries know no open ranges.
		h.Set("Range", fmt.Sprintf("bytes=%d-%d", off, d.Size-1))
	}
	resp, err := r.get(ctx, "blobs/"+d.Digest.String(), h, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return nil, err
	}
	if off > 0 && resp.StatusCode == http.StatusOK {
		if _, err := io.CopyN(io.Discard, resp.Body, off); err != nil {
			resp.Body.Close()
			return nil, fmt.Errorf("skip to %d of blob %s: %w", off, d.Digest, err)
		}
	}
	return resp.Body, nil
}

func (r *registry) HasBlob(ctx context.Context, dgst digest.Digest) (bool, error) {
	l, err := r.puller.Layer(ctx, r.repo.Digest(dgst.String()))
	if err != nil {
		return false, r.registryError(err)
	}
	e, ok := l.(interface{ Exists() (bool, error) })
	if !ok {
		return false, fmt.Errorf("look for blob %s: %T cannot tell", dgst, l)
	}
	has, err := e.Exists()
	return has, r.registryError(err)
}

func (r *registry) PutBlob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	h, err := v1.NewHash(d.Digest.String())
	if err != nil {
		return err
	}
	return r.registryError(r.pusher.Upload(ctx, r.repo, blob{h: h, size: d.Size, open: open}))
}

func (r *registry) Mount(ctx context.Context, d ocispec.Descriptor, from string) (bool, error) {
	if strings.HasPrefix(from, "oci:") {
		return false, nil
	}
	repo, err := name.NewRepository(from, r.opts...)
	if err != nil || repo.Registry.Name() != r.repo.Registry.Name() {
		return false, nil
	}
	h, err := v1.NewHash(d.Digest.String())
	if err != nil {
		return false, err
	}
	// A registry that does not mount asks for the bytes instead, which are not here.
	b := blob{h: h, size: d.Size, open: func() (io.ReadCloser, error) { return nil, errors.New("not mounted") }}
	err = r.pusher.Upload(ctx, r.repo, &remote.MountableLayer{Layer: b, Reference: repo.Digest(d.Digest.String())})
	if err != nil && ctx.Err() != nil {
		return false, err
	}
	return err == nil, nil
}

// blob is a v1.Layer with what an upload asks of it.
type blob struct {
	h    v1.Hash
	size int64
	open func() (io.ReadCloser, error)
}

func (b blob) Digest() (v1.Hash, error)             { return b.h, nil }
func (b blob) DiffID() (v1.Hash, error)             { return b.h, nil }
func (b blob) Size() (int64, error)                 { return b.size, nil }
func (b blob) Compressed() (io.ReadCloser, error)   { return b.open() }
func (b blob) Uncompressed() (io.ReadCloser, error) { return b.open() }

// MediaType is one that is not foreign, or the upload would be left out.
func (b blob) MediaType() (types.MediaType, error) { return types.OCILayerZStd, nil }

// manifest is a remote.Taggable.
type manifest struct {
	raw       []byte
	mediaType string
}

func (m manifest) RawManifest() ([]byte, error)        { return m.raw, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.MediaType(m.mediaType), nil }
