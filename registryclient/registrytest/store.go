package registrytest

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const storePrefix = "/store"

// serveStore gives blobs to who has a valid signature, as an object store does. Credentials of the registry are none of its business: it refuses them.
func (r *Registry) serveStore(w http.ResponseWriter, req *http.Request) {
	path, ok := strings.CutPrefix(req.URL.Path, storePrefix)
	switch {
	case !ok || !strings.HasPrefix(path, "/v2/") || !strings.Contains(path, "/blobs/"):
		http.NotFound(w, req)
	case req.Header.Get("Authorization") != "":
		http.Error(w, "only one auth mechanism allowed", http.StatusBadRequest) // as S3 does
	case req.URL.Query().Get("sig") != r.signature(path):
		http.Error(w, "signature has expired", http.StatusForbidden)
	default:
		inner := req.Clone(req.Context())
		inner.URL.Path, inner.URL.RawPath, inner.URL.RawQuery = path, "", ""
		r.inner.ServeHTTP(w, inner)
	}
}

// ExpireRedirects makes the addresses invalid that blobs were redirected to so far.
func (r *Registry) ExpireRedirects() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.key = rand.Text()
}

func (r *Registry) signed(path string) string {
	return r.store.URL + storePrefix + path + "?sig=" + r.signature(path)
}

func (r *Registry) signature(path string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := hmac.New(sha256.New, []byte(r.key))
	m.Write([]byte(path))
	return hex.EncodeToString(m.Sum(nil))
}

// repositoryOf returns the repository of a path below /v2/, "" if there is none.
func repositoryOf(path string) string {
	path = strings.TrimPrefix(path, "/v2/")
	for _, kind := range []string{"/manifests/", "/blobs/", "/referrers/", "/tags/"} {
		if i := strings.LastIndex(path, kind); i >= 0 {
			return path[:i]
		}
	}
	return ""
}

func certPEM(c *x509.Certificate) []byte {
	if c == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func sortDescriptors(d []ocispec.Descriptor) {
	slices.SortFunc(d, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
}

// diskBlobs keeps blobs in a directory. go-containerregistry's own hashes the whole blob at each request, also for a range.
type diskBlobs struct{ dir string }

func newDiskBlobs(dir string) (*diskBlobs, error) {
	return &diskBlobs{dir}, os.MkdirAll(filepath.Join(dir, "sha256"), 0o755)
}

func (d *diskBlobs) path(h v1.Hash) string { return filepath.Join(d.dir, h.Algorithm, h.Hex) }

func (d *diskBlobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	fi, err := os.Stat(d.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return 0, registry.ErrNotFound
	} else if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (d *diskBlobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(d.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return nil, registry.ErrNotFound
	}
	return f, err
}

func (d *diskBlobs) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	defer rc.Close()
	f, err := os.CreateTemp(d.dir, "upload-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	defer f.Close()
	if _, err := io.Copy(f, rc); err != nil {
		return err
	}
	return os.Rename(f.Name(), d.path(h))
}

func (d *diskBlobs) Delete(_ context.Context, _ string, h v1.Hash) error {
	return os.Remove(d.path(h))
}
