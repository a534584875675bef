package converter

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Profile describes a profile attached to an image.
type Profile struct {
	Digest  digest.Digest `json:"digest"` // of its manifest
	Source  string        `json:"source"` // static, recorded or learned
	Created *time.Time    `json:"created,omitempty"`
	Hot     digest.Digest `json:"hot"` // the hot blob
	Size    int64         `json:"size"`
	Chunks  int           `json:"chunks"`
}

// AttachProfile makes the hot blob of the profile and attaches both to the image that ref names, in place of the profile of the
// same source that was there. Of an index's images it is the one whose artifact has the profile's layers; there must be one.
// created is nothing to do with now: the same arguments give the same bytes. Of o the jobs and the temporary directory count. What
// could not be deleted of the profile before is a warning.
func AttachProfile(ctx context.Context, p Place, ref string, profile *artifact.Profile, source string, created time.Time, o Options) (Profile, []string, error) {
	list, err := artifactsNamed(ctx, p, ref, nil)
	if err != nil {
		return Profile{}, nil, err
	}
	for _, a := range list {
		if a.manifest != nil && covers(a.manifest, profile) {
			return attachProfile(ctx, p, a.manifest, a.desc.Digest, profile, source, created, o)
		}
	}
	return Profile{}, nil, fmt.Errorf("%w: no artifact of %s in %s has all of the profile's layers: it was made of another", ErrNotFound, ref, p)
}

// covers says whether all layers of the profile are the artifact's.
func covers(m *artifact.Manifest, profile *artifact.Profile) bool {
	for _, l := range profile.Layers {
		if !slices.ContainsFunc(m.Layers, func(have artifact.Layer) bool { return have.IndexDigest == l }) {
			return false
		}
	}
	return true
}

func attachProfile(ctx context.Context, p Place, a *artifact.Manifest, of digest.Digest, profile *artifact.Profile, source string, created time.Time, o Options) (Profile, []string, error) {
	res := Profile{Source: source, Chunks: len(profile.Chunks)}
	if len(profile.Chunks) == 0 {
		return res, nil, errors.New("a profile without a chunk is of no use")
	}
	old, err := profilesOf(ctx, p, a.Subject.Digest)
	if err != nil {
		return res, nil, err
	}
	hot, err := tempFile(o.TempDir)
	if err != nil {
		return res, nil, err
	}
	defer hot.Close()
	m := &artifact.ProfileManifest{Subject: a.Subject, Source: source, Created: created}
	if m.Hot, err = writeHot(ctx, p, a, profile, hot, o); err != nil {
		return res, nil, fmt.Errorf("hot blob for %s: %w", a.Subject.Digest, err)
	}
	if m.Hints, err = hintOf(ctx, p, of); err != nil {
		return res, nil, err
	}
	blobs := []struct {
		desc ocispec.Descriptor
		r    func() io.Reader
	}{
		{m.Hot, func() io.Reader { return io.NewSectionReader(hot, 0, m.Hot.Size) }},
		{ocispec.DescriptorEmptyJSON, func() io.Reader { return bytes.NewReader(ocispec.DescriptorEmptyJSON.Data) }},
	}
	for _, b := range blobs {
		if err := p.PutBlob(ctx, b.desc, func() (io.ReadCloser, error) { return io.NopCloser(b.r()), nil }); err != nil {
			return res, nil, fmt.Errorf("push %s: %w", b.desc.Digest, err)
		}
	}
	d, err := putProfile(ctx, p, m)
	if err != nil {
		return res, nil, err
	}
	res = describeProfile(d.Digest, m, profile)
	gone := func(f attachedProfile) bool {
		return f.manifest != nil && f.manifest.Source == source && f.desc.Digest != d.Digest
	}
	warnings, err := deleteProfiles(ctx, p, a.Subject.Digest, old, gone)
	return res, warnings, err
}

// putProfile attaches a profile whose hot blob is there.
func putProfile(ctx context.Context, p Place, m *artifact.ProfileManifest) (ocispec.Descriptor, error) {
	raw, err := m.Encode()
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode manifest of the profile: %w", err)
	}
	d := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ProfileType,
		Digest: digest.FromBytes(raw), Size: int64(len(raw)),
	}
	if err := p.PutManifest(ctx, d, raw, ""); err != nil {
		return d, fmt.Errorf("attach profile to %s: %w", m.Subject.Digest, err)
	}
	return d, nil
}

func describeProfile(dgst digest.Digest, m *artifact.ProfileManifest, profile *artifact.Profile) Profile {
	d := Profile{Digest: dgst, Source: m.Source, Hot: m.Hot.Digest, Size: m.Hot.Size, Chunks: len(profile.Chunks)}
	if !m.Created.IsZero() {
		d.Created = &m.Created
	}
	return d
}

// deleteProfiles deletes those of list that gone is true of. That one stays is a warning, because it is only a hint.
func deleteProfiles(ctx context.Context, p Place, subject digest.Digest, list []attachedProfile, gone func(attachedProfile) bool) (warnings []string, err error) {
	for _, f := range list {
		if !gone(f) {
			continue
		}
		if err := p.Delete(ctx, f.desc.Digest, subject); err != nil && !errors.Is(err, ErrNotFound) {
			if ctx.Err() != nil {
				return warnings, err
			}
			warnings = append(warnings, fmt.Sprintf("the profile %s stays: %v", f.desc.Digest, err))
		}
	}
	return warnings, nil
}

// deleteStale deletes the profiles of the artifact's subject that list layers of one that was there before: with other chunks they
// are no use.
func deleteStale(ctx context.Context, p Place, a *artifact.Manifest) (warnings []string, err error) {
	list, err := profilesOf(ctx, p, a.Subject.Digest)
	if err != nil {
		return nil, err
	}
	return deleteProfiles(ctx, p, a.Subject.Digest, list, func(f attachedProfile) bool {
		if f.manifest == nil {
			return false // a newer release's
		}
		h, err := readHead(ctx, p, f.manifest)
		return err == nil && !covers(a, &h.Profile)
	})
}

// frame is a chunk's frame on its way from its layer's blob to the hot blob.
type frame struct {
	layer int // of the profile
	chunk int // of the layer
	from  int64
	size  int64
	to    int64
}

// runGap is how far frames of a blob may lie apart to be read in one request: less than what goes over a wire while one is asked for.
const runGap = 64 << 10

// writeHot writes the hot blob into hot, with a copy of each index of the artifact that is not too large. Each frame is verified on its way.
func writeHot(ctx context.Context, p Place, a *artifact.Manifest, profile *artifact.Profile, hot *os.File, o Options) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: artifact.HotMediaType}
	h := &artifact.HotHead{Profile: artifact.Profile{Layers: slices.Clone(profile.Layers), Chunks: profile.Chunks}}
	for _, l := range a.Layers {
		if !slices.Contains(h.Layers, l.IndexDigest) {
			h.Layers = append(h.Layers, l.IndexDigest)
		}
	}
	layers, err := indexesOf(ctx, p, a, &h.Profile)
	if err != nil {
		return d, err
	}
	for _, l := range layers {
		n := l.IndexSize
		if n > artifact.MaxHotIndex {
			n = 0
		}
		h.Indexes = append(h.Indexes, n)
	}
	head, err := h.Encode()
	if err != nil {
		return d, err
	}
	for i, l := range layers {
		head = append(head, l.raw[:h.Indexes[i]]...)
	}
	d.Size = h.Frames()
	frames := make([]frame, len(profile.Chunks))
	for i, c := range profile.Chunks {
		if n := layers[c.Layer].index.NumChunks(); c.Chunk >= n {
			return d, fmt.Errorf("profile lists chunk %d of a layer that has %d: %w", c.Chunk, n, artifact.ErrInvalid)
		}
		at := layers[c.Layer].index.Chunk(c.Chunk)
		frames[i] = frame{layer: c.Layer, chunk: c.Chunk, from: at.BlobOffset, size: at.BlobSize, to: d.Size}
		d.Size += at.BlobSize
	}
	slices.SortFunc(frames, func(a, b frame) int { return cmp.Or(cmp.Compare(a.layer, b.layer), cmp.Compare(a.from, b.from)) })

	if _, err := hot.WriteAt(head, 0); err != nil {
		return d, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.jobs())
	for len(frames) > 0 {
		n := 1
		for n < len(frames) && frames[n].layer == frames[0].layer && frames[n].from-(frames[n-1].from+frames[n-1].size) <= runGap {
			n++
		}
		run := frames[:n]
		frames = frames[n:]
		g.Go(func() error { return copyFrames(gctx, p, layers[run[0].layer], run, hot) })
	}
	if err := g.Wait(); err != nil {
		return d, err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(hot, 0, d.Size)); err != nil {
		return d, err
	}
	d.Digest = digest.NewDigest(digest.SHA256, sum)
	return d, nil
}

// indexesOf fetches the indexes of the profile's layers, which are the artifact's.
func indexesOf(ctx context.Context, p Place, a *artifact.Manifest, profile *artifact.Profile) ([]indexedLayer, error) {
	var layers []artifact.Layer
	for _, dgst := range profile.Layers {
		i := slices.IndexFunc(a.Layers, func(l artifact.Layer) bool { return l.IndexDigest == dgst })
		if i < 0 {
			return nil, fmt.Errorf("profile lists a layer with the index %s, which the artifact does not have: %w", dgst, artifact.ErrInvalid)
		}
		layers = append(layers, a.Layers[i])
	}
	return readIndexes(ctx, p, layers)
}

// copyFrames copies a run of frames, which lie one after the other in the layer's blob.
func copyFrames(ctx context.Context, p Place, l indexedLayer, run []frame, hot *os.File) error {
	pos, end := run[0].from, run[len(run)-1].from+run[len(run)-1].size
	rc, err := p.Blob(ctx, ocispec.Descriptor{Digest: l.Digest, Size: end}, pos)
	if err != nil {
		return err
	}
	defer rc.Close()
	var raw, tar []byte
	for _, f := range run {
		if _, err := io.CopyN(io.Discard, rc, f.from-pos); err != nil {
			return fmt.Errorf("read blob %s: %w", l.Digest, err)
		}
		raw = slices.Grow(raw[:0], int(f.size))[:f.size]
		if _, err := io.ReadFull(rc, raw); err != nil {
			return fmt.Errorf("read blob %s: %w", l.Digest, err)
		}
		if tar, err = l.index.Decompress(f.chunk, raw, tar); err != nil {
			return fmt.Errorf("blob %s: %w", l.Digest, err)
		}
		if _, err := hot.WriteAt(raw, f.to); err != nil {
			return err
		}
		pos = f.from + f.size
	}
	return nil
}

// attachedProfile is a referrer with a profile's type.
type attachedProfile = attachedOf[artifact.ProfileManifest]

// profilesOf lists the profiles attached to the platform manifest subject, with those that this release cannot use.
func profilesOf(ctx context.Context, p Place, subject digest.Digest) ([]attachedProfile, error) {
	return attachedTo(ctx, p, subject, artifact.ProfileType, artifact.DecodeProfileManifest,
		func(m *artifact.ProfileManifest) digest.Digest { return m.Subject.Digest })
}

// readHead reads the list at the beginning of the profile's hot blob.
func readHead(ctx context.Context, p Place, m *artifact.ProfileManifest) (*artifact.HotHead, error) {
	rc, err := p.Blob(ctx, m.Hot, 0)
	if err != nil {
		return nil, fmt.Errorf("hot blob %s: %w", m.Hot.Digest, err)
	}
	defer rc.Close()
	h, err := artifact.ReadHotHead(rc)
	if err != nil {
		return nil, fmt.Errorf("hot blob %s: %w", m.Hot.Digest, err)
	}
	return h, nil
}

// describeProfiles describes the profiles of subject that this release can read.
func describeProfiles(ctx context.Context, p Place, subject digest.Digest) ([]Profile, error) {
	list, err := profilesOf(ctx, p, subject)
	if err != nil {
		return nil, err
	}
	var all []Profile
	for _, f := range list {
		if f.manifest == nil {
			continue // a newer release's, or damaged: a hint that is no use here
		}
		h, err := readHead(ctx, p, f.manifest)
		if errors.Is(err, artifact.ErrUnsupported) {
			continue // another release's, likewise
		}
		if err != nil {
			return all, fmt.Errorf("profile %s: %w", f.desc.Digest, err)
		}
		all = append(all, describeProfile(f.desc.Digest, f.manifest, &h.Profile))
	}
	return all, nil
}

// verifyProfiles proves the profiles of subject: that each lists chunks of one of the artifacts, and that the frames in its hot
// blob are theirs. The first difference is an error that is ErrDifferent.
func verifyProfiles(ctx context.Context, p Place, subject digest.Digest, artifacts []*artifact.Manifest) ([]Profile, error) {
	list, err := profilesOf(ctx, p, subject)
	if err != nil {
		return nil, err
	}
	done := []Profile{} // an empty list in JSON, too
	for _, f := range list {
		if f.manifest == nil {
			return done, different("profile %s: its manifest: %w", f.desc.Digest, f.err)
		}
		h, err := verifyHot(ctx, p, f.manifest, artifacts)
		if err != nil {
			return done, fmt.Errorf("profile %s: hot blob %s: %w", f.desc.Digest, f.manifest.Hot.Digest, err)
		}
		done = append(done, describeProfile(f.desc.Digest, f.manifest, &h.Profile))
	}
	return done, nil
}

func verifyHot(ctx context.Context, p Place, m *artifact.ProfileManifest, artifacts []*artifact.Manifest) (*artifact.HotHead, error) {
	rc, err := p.Blob(ctx, m.Hot, 0)
	if err != nil {
		return nil, blobError(p, "read", err)
	}
	defer rc.Close()
	v, err := newVerifyReader(rc, m.Hot)
	if err != nil {
		return nil, different("%w", err)
	}
	h, err := artifact.ReadHotHead(v)
	if err != nil {
		return nil, hotError(p, v, err)
	}
	i := slices.IndexFunc(artifacts, func(a *artifact.Manifest) bool { return covers(a, &h.Profile) })
	if i < 0 {
		return nil, different("it lists layers that no artifact of the image has")
	}
	layers, err := indexesOf(ctx, p, artifacts[i], &h.Profile)
	if err != nil {
		return nil, blobError(p, "read", err)
	}
	var raw, tar []byte
	for n, size := range h.Indexes {
		raw = slices.Grow(raw[:0], int(size))[:size]
		if _, err := io.ReadFull(v, raw); err != nil {
			return nil, hotError(p, v, err)
		}
		if size > 0 && !bytes.Equal(raw, layers[n].raw) {
			return nil, different("its copy of the index of layer %s is not that", layers[n].Digest)
		}
	}
	for n, c := range h.Chunks {
		x := layers[c.Layer].index
		if c.Chunk >= x.NumChunks() {
			return nil, different("entry %d is chunk %d of a layer that has %d", n, c.Chunk, x.NumChunks())
		}
		size := x.Chunk(c.Chunk).BlobSize
		raw = slices.Grow(raw[:0], int(size))[:size]
		if _, err := io.ReadFull(v, raw); err != nil {
			return nil, hotError(p, v, err)
		}
		if tar, err = x.Decompress(c.Chunk, raw, tar); err != nil {
			return nil, different("entry %d: %w", n, err)
		}
	}
	if n, err := io.Copy(io.Discard, v); err != nil || n > 0 {
		if err != nil {
			return nil, hotError(p, v, err)
		}
		return nil, different("%d bytes follow its last frame", n)
	}
	return h, nil
}

// hotError tells a source that fails from bytes that are wrong.
func hotError(p Place, v *verifyReader, err error) error {
	if v.err != nil && v.err != io.EOF {
		return blobError(p, "read", v.err)
	}
	return different("%w", err)
}
