// Package registrytest is a registry for tests: it counts what it is asked and what it sends, and fails in the ways real ones fail.
//
// Storage and protocol are go-containerregistry's pkg/registry, in memory or with the blobs on disk. Around it are: a record of every request;
// faults, injected where a predicate says and as often as a number says; basic and token authentication; redirects of blobs to a second
// listener with signed addresses; and what go-containerregistry's lacks of the referrers API, the manifest's own artifact type and the filter.
// The referrers API can be left out, which leaves the tag schema.
//
// It is no product: manifests are forgotten when it ends, uploads are held in memory, and its TLS certificate is httptest's.
package registrytest

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options of a Registry.
type Options struct {
	Dir           string // of the blobs, kept from one registry to the next; "" is memory
	NoReferrers   bool   // only the tag schema
	NoFilter      bool   // referrers are not filtered by artifact type, as the specification allows
	ReferrersPage int    // referrers on a page; 0 is all
	NamesPage     int    // tags and repositories on a page; 0 is as go-containerregistry does: no link to what n leaves out
	RedirectBlobs bool   // GETs of blobs are sent on to the store's listener
	ClampRanges   bool   // a range may end beyond a blob's end, as RFC 9110 has it; otherwise that is 416
	TLS           bool   // https with httptest's certificate: see CAPEM
}

// Registry is a running registry. Its methods may be called at any time, from any goroutine.
type Registry struct {
	o     Options
	inner http.Handler
	front *httptest.Server
	store *httptest.Server // where blobs are redirected to

	closed chan struct{}

	authMu sync.Mutex // LOCK ORDER: before mu, because answers are recorded
	auth   authentication

	mu       sync.Mutex
	requests []*Request
	faults   []*injection
	key      string // of the store's signatures: changed, the old ones have expired
}

// Start runs a Registry until the test ends.
func Start(tb testing.TB, o Options) *Registry {
	tb.Helper()
	r, err := Run(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(r.Close)
	return r
}

// Run runs a Registry on loopback until Close.
func Run(o Options) (*Registry, error) {
	r := &Registry{o: o, key: rand.Text(), closed: make(chan struct{})}
	opts := []registry.Option{registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(!o.NoReferrers)}
	if o.Dir != "" {
		blobs, err := newDiskBlobs(o.Dir)
		if err != nil {
			return nil, err
		}
		opts = append(opts, registry.WithBlobHandler(blobs))
	}
	r.inner = buffered(registry.New(opts...))
	if o.ClampRanges {
		r.inner = clamped(r.inner)
	}
	r.store = serve(r.recorded("store", http.HandlerFunc(r.serveStore)), o.TLS)
	r.front = serve(r.recorded("registry", http.HandlerFunc(r.serveRegistry)), o.TLS)
	return r, nil
}

func serve(h http.Handler, tls bool) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // broken connections are the point
	if tls {
		s.EnableHTTP2 = true
		s.StartTLS()
	} else {
		s.Start()
	}
	return s
}

// Close ends what is still being served, stalled answers included, and waits for it.
func (r *Registry) Close() {
	r.mu.Lock()
	select {
	case <-r.closed:
		r.mu.Unlock()
		return
	default:
		close(r.closed)
	}
	r.mu.Unlock()
	for _, s := range []*httptest.Server{r.front, r.store} {
		s.CloseClientConnections()
		s.Close()
	}
}

// Host is host:port of the registry, as in an image reference.
func (r *Registry) Host() string { return hostOf(r.front) }

// StoreHost is host:port of what blobs are redirected to.
func (r *Registry) StoreHost() string { return hostOf(r.store) }

// URL is the registry's address without a path.
func (r *Registry) URL() string { return r.front.URL }

// CAPEM is the certificate to trust for a registry with TLS.
func (r *Registry) CAPEM() []byte { return certPEM(r.front.Certificate()) }

func hostOf(s *httptest.Server) string {
	u, err := url.Parse(s.URL)
	if err != nil {
		panic(err) // httptest made it
	}
	return u.Host
}

// ServeHTTP serves the registry, for callers with a listener of their own.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.front.Config.Handler.ServeHTTP(w, req)
}

// serveRegistry is the registry behind record, faults and authentication.
func (r *Registry) serveRegistry(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == tokenPath {
		r.serveToken(w, req)
		return
	}
	if !r.authorized(w, req) {
		return
	}
	switch {
	case Referrers(req) && !r.o.NoReferrers:
		r.serveReferrers(w, req)
	case r.o.NamesPage > 0 && (strings.HasSuffix(req.URL.Path, "/tags/list") || req.URL.Path == catalogPath):
		r.serveNames(w, req)
	case r.o.RedirectBlobs && Blobs(req) && req.Method == http.MethodGet:
		http.Redirect(w, req, r.signed(req.URL.Path), http.StatusTemporaryRedirect)
	case req.Method == http.MethodPut && Manifests(req) && !r.o.NoReferrers:
		r.putManifest(w, req)
	default:
		r.inner.ServeHTTP(w, req)
	}
}

// putManifest says which subject the manifest has, as a registry with the referrers API must.
func (r *Registry) putManifest(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var m ocispec.Manifest
	if json.Unmarshal(body, &m) == nil && m.Subject != nil {
		w.Header().Set("OCI-Subject", m.Subject.Digest.String())
	}
	req.Body = io.NopCloser(bytes.NewReader(body))
	r.inner.ServeHTTP(w, req)
}

// serveReferrers mends what go-containerregistry answers: it gives the config's media type as the artifact type, never filters and has one page.
func (r *Registry) serveReferrers(w http.ResponseWriter, req *http.Request) {
	got := r.internal(http.MethodGet, req.URL.Path, nil, nil)
	var index ocispec.Index
	if got.Code != http.StatusOK || json.Unmarshal(got.Body.Bytes(), &index) != nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(got.Code)
		w.Write(got.Body.Bytes())
		return
	}
	query := req.URL.Query()
	want := query.Get("artifactType")
	found := []ocispec.Descriptor{}
	for _, d := range index.Manifests {
		var m ocispec.Manifest
		b := r.internal(http.MethodGet, manifestsOf(req.URL.Path)+d.Digest.String(), nil, nil).Body.Bytes()
		if json.Unmarshal(b, &m) == nil && m.ArtifactType != "" {
			d.ArtifactType = m.ArtifactType
		}
		if want == "" || r.o.NoFilter || d.ArtifactType == want {
			found = append(found, d)
		}
	}
	if want != "" && !r.o.NoFilter {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if index.Manifests = found; r.o.ReferrersPage > 0 {
		sortDescriptors(found) // go-containerregistry keeps them in a map
		index.Manifests = page(w, req, found, r.o.ReferrersPage)
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(index)
}

const catalogPath = "/v2/_catalog"

// serveNames serves the lists of tags and of repositories in pages.
func (r *Registry) serveNames(w http.ResponseWriter, req *http.Request) {
	got := r.internal(http.MethodGet, req.URL.Path, nil, nil)
	var list struct {
		Name         string   `json:"name,omitempty"`
		Tags         []string `json:"tags,omitempty"`
		Repositories []string `json:"repositories,omitempty"`
	}
	if got.Code == http.StatusOK && json.Unmarshal(got.Body.Bytes(), &list) == nil {
		slices.Sort(list.Repositories) // go-containerregistry keeps them in a map
		list.Tags = page(w, req, list.Tags, r.o.NamesPage)
		list.Repositories = page(w, req, list.Repositories, r.o.NamesPage)
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(list)
		return
	}
	w.WriteHeader(got.Code)
	w.Write(got.Body.Bytes())
}

// page returns the page of size of all that the query asks for, and links to the next.
func page[T any](w http.ResponseWriter, req *http.Request, all []T, size int) []T {
	query := req.URL.Query()
	var from int
	fmt.Sscanf(query.Get("from"), "%d", &from)
	from = min(max(from, 0), len(all))
	end := min(from+size, len(all))
	if end < len(all) {
		query.Set("from", fmt.Sprint(end))
		w.Header().Set("Link", fmt.Sprintf("<%s?%s>; rel=\"next\"", req.URL.Path, query.Encode()))
	}
	return all[from:end]
}

func manifestsOf(referrersPath string) string {
	return referrersPath[:strings.LastIndex(referrersPath, "/referrers/")] + "/manifests/"
}

// internal asks the inner registry directly: not recorded, no faults, no authentication.
func (r *Registry) internal(method, path string, header http.Header, body []byte) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, bytes.NewReader(body))
	for k, v := range header {
		req.Header[k] = v
	}
	w := httptest.NewRecorder()
	r.inner.ServeHTTP(w, req)
	return w
}

// PutBlob stores a blob, past everything that is recorded or injected.
func (r *Registry) PutBlob(repo string, b []byte) digest.Digest {
	dgst := digest.FromBytes(b)
	if w := r.internal(http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+dgst.String(), nil, b); w.Code != http.StatusCreated {
		panic(fmt.Sprintf("registrytest: put blob: %d %s", w.Code, w.Body))
	}
	return dgst
}

// PutManifest stores a manifest under its digest and, if it is not "", under tag.
func (r *Registry) PutManifest(repo, tag, mediaType string, b []byte) digest.Digest {
	dgst := digest.FromBytes(b)
	if tag == "" {
		tag = dgst.String()
	}
	header := http.Header{"Content-Type": {mediaType}}
	if w := r.internal(http.MethodPut, "/v2/"+repo+"/manifests/"+tag, header, b); w.Code != http.StatusCreated {
		panic(fmt.Sprintf("registrytest: put manifest: %d %s", w.Code, w.Body))
	}
	return dgst
}

// buffered reads an upload before it is handled: go-containerregistry's reads it under a lock, for which other uploads of the same HTTP/2 connection wait with its flow-control window full.
func buffered(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/uploads/") {
			b, err := io.ReadAll(r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			r = r.Clone(r.Context())
			r.Body = io.NopCloser(bytes.NewReader(b))
		}
		h.ServeHTTP(w, r)
	})
}

// clamped lets a range end beyond the end of a blob, as caches ask for their last slice. go-containerregistry's answers 416.
func clamped(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var from, to int64
		if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); n == 2 && r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			head := r.Clone(r.Context())
			head.Method = http.MethodHead
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, head)
			if size := answer.Result().ContentLength; from < size && to >= size {
				r = r.Clone(r.Context())
				r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, size-1))
			}
		}
		h.ServeHTTP(w, r)
	})
}
