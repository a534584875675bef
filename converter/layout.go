package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layout is an OCI image layout. index.json lists its images, named by the annotation org.opencontainers.image.ref.name,
// and the referrers of its images, which have no name: a referrer is found by reading the manifests listed there. Those who
// change index.json hold a lock on the file oci-layout, and replace index.json in one step.
//
// It is not go-containerregistry's layout package, which rewrites index.json in place and without a lock, and trusts the
// blobs' names.
type layout struct {
	dir string
}

// newLayout opens the layout in dir; one that does not exist is made by the first thing that is put there.
func newLayout(dir string) (*layout, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &layout{dir: abs}, nil
}

func (l *layout) String() string { return "oci:" + l.dir }

func (l *layout) blobPath(dgst digest.Digest) (string, error) {
	// Validated, a digest has no slashes and no dots.
	if err := dgst.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w", dgst, err)
	}
	return filepath.Join(l.dir, "blobs", dgst.Algorithm().String(), dgst.Encoded()), nil
}

func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// openRegular opens a regular file for reading. Whoever made the layout may have put anything in its place, and to open a FIFO would be
// to wait for its writer.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (l *layout) index() (ocispec.Index, error) {
	var index ocispec.Index
	f, err := openRegular(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if err != nil {
		return index, notFound(err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxManifestSize+1))
	if err != nil {
		return index, err
	}
	if len(raw) > maxManifestSize {
		return index, fmt.Errorf("%s has more than %d bytes", f.Name(), maxManifestSize)
	}
	if err := json.Unmarshal(raw, &index); err != nil {
		return index, fmt.Errorf("parse %s: %w", f.Name(), err)
	}
	return index, nil
}

func (l *layout) Manifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	dgst := digest.Digest(ref)
	if !strings.Contains(ref, ":") {
		d, err := l.find(ref)
		if err != nil {
			return d, nil, err
		}
		dgst = d.Digest
	}
	path, err := l.blobPath(dgst)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	f, err := openRegular(path)
	if err != nil {
		return ocispec.Descriptor{}, nil, notFound(err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxManifestSize+1))
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	c, err := parseContent(raw)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	if dgst.Algorithm().FromBytes(raw) != dgst {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s has other bytes than its digest says", path)
	}
	d := c.descriptor(raw)
	d.Digest = dgst
	return d, raw, nil
}

// find looks tag up in index.json; "" is the only image there that is not a referrer of another.
func (l *layout) find(tag string) (ocispec.Descriptor, error) {
	index, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var found []ocispec.Descriptor
	var tags []string
	for _, d := range index.Manifests {
		name := d.Annotations[ocispec.AnnotationRefName]
		if tag == "" && d.ArtifactType == "" || tag != "" && name == tag {
			// Of equal names the last is the newest; of equal digests any will do.
			if len(found) > 0 && (tag != "" || found[len(found)-1].Digest == d.Digest) {
				found = nil
			}
			found = append(found, d)
		}
		if name != "" {
			tags = append(tags, name)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && tag != "":
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s has no image %q, only %q", ErrNotFound, l, tag, tags)
	case len(found) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s has no image", ErrNotFound, l)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s has %d images, of which one must be named: %s:TAG with one of %q", l, len(found), l, tags)
}

func (l *layout) Blob(ctx context.Context, d ocispec.Descriptor, off int64) (io.ReadCloser, error) {
	path, err := l.blobPath(d.Digest)
	if err != nil {
		return nil, err
	}
	f, err := openRegular(path)
	if err != nil {
		return nil, notFound(err)
	}
	if _, err := f.Seek(off, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (l *layout) HasBlob(ctx context.Context, dgst digest.Digest) (bool, error) {
	path, err := l.blobPath(dgst)
	if err != nil {
		return false, err
	}
	_, err = os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (l *layout) PutBlob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	if has, err := l.HasBlob(ctx, d.Digest); has || err != nil {
		return err
	}
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	v, err := newVerifyReader(rc, d)
	if err != nil {
		return err
	}
	path, err := l.blobPath(d.Digest)
	if err != nil {
		return err
	}
	return replaceFile(path, contextReader{ctx, v})
}

func (l *layout) Mount(context.Context, ocispec.Descriptor, string) (bool, error) { return false, nil }

// contextReader ends a copy when ctx does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// replaceFile writes a file in one step: those who open path find the old one or the whole new one.
func replaceFile(path string, r io.Reader) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// lock makes the layout if it does not exist, and takes its lock.
func (l *layout) lock() (unlock func(), err error) {
	if err := os.MkdirAll(l.dir, 0o777); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(l.dir, ocispec.ImageLayoutFile), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() == 0 {
		if _, err := fmt.Fprintf(f, `{"imageLayoutVersion":"%s"}`, ocispec.ImageLayoutVersion); err != nil {
			return nil, err
		}
	}
	return func() { f.Close() }, nil
}

func (l *layout) writeIndex(index ocispec.Index) error {
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(l.dir, ocispec.ImageIndexFile), bytes.NewReader(raw))
}

func (l *layout) PutManifest(ctx context.Context, d ocispec.Descriptor, raw []byte, tag string) error {
	c, err := parseContent(raw)
	if err != nil {
		return err
	}
	if err := l.PutBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }); err != nil {
		return err
	}
	entry := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	switch {
	case tag != "":
		entry.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	case c.Subject != nil:
		entry.ArtifactType, entry.Annotations = c.descriptor(raw).ArtifactType, c.Annotations
	default:
		return nil // a part of an index: found through that
	}
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	index, err := l.index()
	if errors.Is(err, ErrNotFound) {
		index, err = ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}, nil
	}
	if err != nil {
		return err
	}
	keep := []ocispec.Descriptor{}
	for _, old := range index.Manifests {
		name := old.Annotations[ocispec.AnnotationRefName]
		if tag != "" && name == tag || tag == "" && name == "" && old.Digest == d.Digest {
			continue
		}
		keep = append(keep, old)
	}
	index.Manifests = append(keep, entry)
	return l.writeIndex(index)
}

func (l *layout) Referrers(ctx context.Context, subject digest.Digest) ([]ocispec.Descriptor, error) {
	index, err := l.index()
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			return nil, nil
		}
		return nil, err
	}
	var list []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	for _, d := range index.Manifests {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		got, raw, err := l.Manifest(ctx, d.Digest.String())
		if errors.Is(err, ErrNotFound) {
			continue // layouts may list what they do not hold
		}
		if err != nil {
			return nil, err
		}
		c, err := parseContent(raw)
		if err != nil {
			return nil, err
		}
		if c.Subject != nil && c.Subject.Digest == subject {
			got.Annotations = c.Annotations
			list = append(list, got)
		}
	}
	return list, nil
}

// Delete deletes the manifest, and those of its blobs that no manifest of the layout refers to any more. (Somebody who puts
// the same blobs at the same moment may lose them: layouts have no lock that lasts from a blob to its manifest.)
func (l *layout) Delete(ctx context.Context, dgst, subject digest.Digest) error {
	_, raw, err := l.Manifest(ctx, dgst.String())
	if err != nil {
		return err
	}
	c, err := parseContent(raw)
	if err != nil {
		return err
	}
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	index, err := l.index()
	if err != nil {
		return err
	}
	keep := []ocispec.Descriptor{}
	used := map[digest.Digest]bool{}
	for _, d := range index.Manifests {
		if d.Digest == dgst {
			continue
		}
		keep = append(keep, d)
		if err := l.mark(ctx, d.Digest, used, 0); err != nil {
			return err
		}
	}
	index.Manifests = keep
	if err := l.writeIndex(index); err != nil {
		return err
	}
	gone := append([]ocispec.Descriptor{{Digest: dgst}}, c.Layers...)
	if c.Config != nil {
		gone = append(gone, *c.Config)
	}
	for _, d := range gone {
		path, err := l.blobPath(d.Digest)
		if err != nil || used[d.Digest] {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// mark notes dgst and all that it refers to in used.
func (l *layout) mark(ctx context.Context, dgst digest.Digest, used map[digest.Digest]bool, depth int) error {
	if used[dgst] {
		return nil
	}
	if depth > maxIndexDepth {
		return fmt.Errorf("%s lies in more than %d indexes", dgst, maxIndexDepth)
	}
	used[dgst] = true
	_, raw, err := l.Manifest(ctx, dgst.String())
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	c, err := parseContent(raw)
	if err != nil {
		return err
	}
	for _, d := range c.Manifests {
		if err := l.mark(ctx, d.Digest, used, depth+1); err != nil {
			return err
		}
	}
	for _, d := range c.Layers {
		used[d.Digest] = true
	}
	if c.Config != nil {
		used[c.Config.Digest] = true
	}
	return nil
}
