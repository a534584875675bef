package converter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Place is where images are: a repository of a registry, or an OCI layout. All methods may be called at once from several
// goroutines. What is not there is ErrNotFound.
type Place interface {
	// String names the place: "registry.example.com/team/app", "oci:/srv/images".
	String() string
	// Manifest fetches the manifest or index that ref names: a tag, a digest, or "" for the only one of a layout. Its
	// bytes are verified against a digest. The descriptor has the media type, digest, size and artifact type.
	Manifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error)
	// Resolve says what ref names, as Manifest does, without fetching it and without the artifact type.
	Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error)
	// Tags lists the tags that name images, sorted. A place that does not exist is ErrNotFound.
	Tags(ctx context.Context) ([]string, error)
	// Blob opens the blob d from offset off on; the bytes are not verified. With a smaller size than the blob's, bytes behind it need
	// not come. The caller closes it.
	Blob(ctx context.Context, d ocispec.Descriptor, off int64) (io.ReadCloser, error)
	// HasBlob says whether the blob is there.
	HasBlob(ctx context.Context, dgst digest.Digest) (bool, error)
	// PutBlob stores a blob unless it is there; open may be called several times. Bytes that are not the descriptor's
	// are an error, and nothing is stored.
	PutBlob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error
	// Mount makes a blob of the place named from available here without copying it, if it can. False without an error
	// says that it could not.
	Mount(ctx context.Context, d ocispec.Descriptor, from string) (bool, error)
	// PutManifest stores a manifest or index whose blobs and manifests are here. With a tag it is named so; with a
	// subject it becomes a referrer of that.
	PutManifest(ctx context.Context, d ocispec.Descriptor, raw []byte, tag string) error
	// Referrers lists the manifests whose subject is subject. None is an empty list.
	Referrers(ctx context.Context, subject digest.Digest) ([]ocispec.Descriptor, error)
	// Delete deletes the manifest dgst, a referrer of subject if that is not "".
	Delete(ctx context.Context, dgst, subject digest.Digest) error
}

// Limits on what a place may make us hold in memory or walk through.
const (
	maxManifestSize = 4 << 20 // bytes of a manifest or index: what registries accept
	maxConfigSize   = 8 << 20 // bytes of an image's config
	maxIndexDepth   = 4       // an index in an index in an index ...
	maxManifests    = 1000    // of one image
)

// OpenOptions say how to reach places.
type OpenOptions struct {
	Registry RegistryOptions
}

// Open opens the place that an image's name begins with, and returns the rest of the name: a tag, a digest, or "".
// Names are "oci:DIR", "oci:DIR:TAG", "oci:DIR@DIGEST" for OCI layouts, and anything else is a registry's,
// "HOST/REPO:TAG" or "HOST/REPO@DIGEST", with docker's abbreviations ("debian" is index.docker.io/library/debian:latest).
func Open(image string, o OpenOptions) (Place, string, error) {
	if rest, ok := strings.CutPrefix(image, "oci:"); ok {
		dir, ref, err := splitLayoutName(rest)
		if err != nil {
			return nil, "", fmt.Errorf("image name %q: %w", image, err)
		}
		l, err := newLayout(dir)
		return l, ref, err
	}
	return openRegistry(image, o.Registry)
}

// splitLayoutName splits DIR[:TAG] or DIR@DIGEST. A tag has no slash, so that a colon in the directory's name is no harm
// unless it is in the last element.
func splitLayoutName(s string) (dir, ref string, err error) {
	if i := strings.LastIndex(s, "@"); i >= 0 && strings.Contains(s[i:], ":") && !strings.Contains(s[i:], "/") {
		if err := digest.Digest(s[i+1:]).Validate(); err != nil {
			return "", "", err
		}
		dir, ref = s[:i], s[i+1:]
		// DIR:TAG@DIGEST is DIR@DIGEST, as it is with registries.
		if j := strings.LastIndex(dir, ":"); j >= 0 && !strings.Contains(dir[j:], "/") {
			dir = dir[:j]
		}
	} else if i := strings.LastIndex(s, ":"); i >= 0 && !strings.Contains(s[i:], "/") {
		dir, ref = s[:i], s[i+1:]
		if ref == "" {
			return "", "", errors.New("the tag is empty")
		}
	} else {
		dir = s
	}
	if dir == "" {
		return "", "", errors.New("the directory is empty")
	}
	return dir, ref, nil
}

// content is what manifests and indexes have in common with what we need of both.
type content struct {
	MediaType    string               `json:"mediaType"`
	ArtifactType string               `json:"artifactType"`
	Config       *ocispec.Descriptor  `json:"config"`
	Manifests    []ocispec.Descriptor `json:"manifests"`
	Layers       []ocispec.Descriptor `json:"layers"`
	Subject      *ocispec.Descriptor  `json:"subject"`
	Annotations  map[string]string    `json:"annotations"`
}

func parseContent(raw []byte) (content, error) {
	var c content
	if len(raw) > maxManifestSize {
		return c, fmt.Errorf("a manifest of %d bytes: more than %d is not accepted", len(raw), maxManifestSize)
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("parse manifest: %w", err)
	}
	return c, nil
}

// descriptor describes c, whose bytes are raw, as a registry lists referrers: a manifest without an artifactType has its
// config's media type for one.
func (c content) descriptor(raw []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{
		MediaType: c.MediaType, ArtifactType: c.ArtifactType,
		Digest: digest.FromBytes(raw), Size: int64(len(raw)),
	}
	if d.MediaType == "" {
		// The OCI specifications let manifests leave it out; the shape tells.
		if d.MediaType = ocispec.MediaTypeImageManifest; c.Manifests != nil {
			d.MediaType = ocispec.MediaTypeImageIndex
		}
	}
	if d.ArtifactType == "" && c.Config != nil {
		d.ArtifactType = c.Config.MediaType
	}
	return d
}

// verifyReader passes on exactly the bytes that d describes, and fails otherwise: with fewer, with more, or at the end
// with others. Its error is *sourceError, so that the failure of a source can be told from that of a decoder.
type verifyReader struct {
	r        io.Reader
	d        ocispec.Descriptor
	verifier digest.Verifier
	n        int64
	err      error
}

// sourceError is a failure to read a source. It is temporary unless the bytes were there and others than they should be.
type sourceError struct {
	err       error
	temporary bool
}

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

func newVerifyReader(r io.Reader, d ocispec.Descriptor) (*verifyReader, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	if d.Size < 0 {
		return nil, fmt.Errorf("%s has a size of %d", d.Digest, d.Size)
	}
	return &verifyReader{r: r, d: d, verifier: d.Digest.Verifier()}, nil
}

func (v *verifyReader) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	// One byte more than is left tells a blob that is too long.
	if room := v.d.Size - v.n + 1; int64(len(p)) > room {
		p = p[:room]
	}
	n, err := v.r.Read(p)
	v.n += int64(n)
	v.verifier.Write(p[:n]) // a hash.Hash: never fails
	switch {
	case v.n > v.d.Size:
		v.err = &sourceError{err: fmt.Errorf("blob %s is longer than its %d bytes", v.d.Digest, v.d.Size)}
		return 0, v.err
	case err == io.EOF && v.n < v.d.Size:
		v.err = &sourceError{err: fmt.Errorf("blob %s ended after %d of %d bytes: %w", v.d.Digest, v.n, v.d.Size, io.ErrUnexpectedEOF), temporary: true}
	case err == io.EOF && !v.verifier.Verified():
		v.err = &sourceError{err: fmt.Errorf("blob %s has other bytes than its digest says", v.d.Digest)}
	case err == io.EOF:
		v.err = io.EOF
	case err != nil:
		v.err = &sourceError{err: fmt.Errorf("read blob %s: %w", v.d.Digest, err), temporary: true}
	}
	return n, v.err
}

// readBlob reads a small blob whole, verified.
func readBlob(ctx context.Context, p Place, d ocispec.Descriptor, max int64) ([]byte, error) {
	if d.Size > max {
		return nil, fmt.Errorf("blob %s has %d bytes: more than %d is not accepted", d.Digest, d.Size, max)
	}
	rc, err := p.Blob(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	v, err := newVerifyReader(rc, d)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(v)
}
