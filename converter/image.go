package converter

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Media types of Docker's images, beside those of OCI.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// image is a platform manifest with its config: something that can be converted.
type image struct {
	desc     ocispec.Descriptor
	manifest ocispec.Manifest
	platform ocispec.Platform // the config's
	created  time.Time        // the config's; zero if it has none
	diffIDs  []digest.Digest  // one for each layer
	run      ocispec.ImageConfig
}

// first returns for each layer which one is the first that is the same, itself as a rule: of those that are read and converted alike.
func (img *image) first() []int {
	type same struct {
		src    digest.Digest
		typ    string // decides how the blob is read
		diffID digest.Digest
	}
	seen := make(map[same]int)
	list := make([]int, len(img.manifest.Layers))
	for i, src := range img.manifest.Layers {
		key := same{src.Digest, src.MediaType, img.diffIDs[i]}
		if _, dup := seen[key]; !dup {
			seen[key] = i
		}
		list[i] = seen[key]
	}
	return list
}

// bytes returns the size of the compressed layers, each different one once.
func (img *image) bytes() (n int64) {
	for i, first := range img.first() {
		if i == first {
			n += img.manifest.Layers[i].Size
		}
	}
	return n
}

// found is a manifest that a reference leads to, not yet looked into.
type found struct {
	desc     ocispec.Descriptor
	raw      []byte
	platform *ocispec.Platform // as the index says; nil if none did
}

// resolve returns what Create converts: the images that ref leads to: itself, or those of its platforms that are Linux and among want (all if
// want is empty).
func resolve(ctx context.Context, p Place, ref string, want []ocispec.Platform) ([]*image, error) {
	top, raw, err := p.Manifest(ctx, ref)
	if err != nil {
		return nil, resolveError(p, ref, err)
	}
	if !isIndex(top.MediaType) {
		img, err := load(ctx, p, top, raw)
		if err != nil {
			return nil, err
		}
		if len(want) > 0 && !slices.ContainsFunc(want, func(w ocispec.Platform) bool { return matches(w, img.platform) }) {
			return nil, &Error{UnsupportedPlatform, fmt.Errorf("%s is of %s only, not of the platform asked for", top.Digest, platformString(img.platform))}
		}
		return []*image{img}, nil
	}

	all, err := manifestsOf(ctx, p, found{desc: top, raw: raw})
	if err != nil {
		return nil, err
	}
	var images []*image
	var has []string
	for _, f := range all {
		if f.platform != nil {
			has = append(has, platformString(*f.platform))
			if f.platform.OS != "linux" || !wanted(want, *f.platform) {
				continue
			}
		}
		if _, f.raw, err = p.Manifest(ctx, f.desc.Digest.String()); err != nil {
			return nil, resolveError(p, f.desc.Digest.String(), err)
		}
		img, err := load(ctx, p, f.desc, f.raw)
		if err != nil {
			// What an index lists without a platform may be anything; what it calls a Linux image must be one.
			if f.platform == nil && CodeOf(err) != Unknown && CodeOf(err) != ResourceNotFound {
				continue
			}
			return nil, err
		}
		if f.platform == nil && !wanted(want, img.platform) {
			has = append(has, platformString(img.platform))
			continue
		}
		images = append(images, img)
	}
	if len(images) == 0 {
		return nil, &Error{NoSupportedPlatformFound, fmt.Errorf("index %s has %s", top.Digest, strings.Join(append(has, "nothing else"), ", "))}
	}
	return images, nil
}

func resolveError(p Place, ref string, err error) error {
	return fmt.Errorf("%s in %s: %w", strings.TrimSpace("manifest "+ref), p, err)
}

// manifestsOf lists the manifests of an index and of the indexes in it, in order, each once, but for those that are no
// images: attestations and other artifacts.
func manifestsOf(ctx context.Context, p Place, top found) ([]found, error) {
	var list []found
	seen := map[digest.Digest]bool{}
	var walk func(f found, depth int) error
	walk = func(f found, depth int) error {
		if depth > maxIndexDepth {
			return fmt.Errorf("index %s lies in more than %d indexes", f.desc.Digest, maxIndexDepth)
		}
		c, err := parseContent(f.raw)
		if err != nil {
			return fmt.Errorf("index %s: %w", f.desc.Digest, err)
		}
		for _, d := range c.Manifests {
			if seen[d.Digest] || isArtifact(d) || isAttestation(d) {
				continue
			}
			seen[d.Digest] = true
			if len(seen) > maxManifests {
				return fmt.Errorf("index %s has more than %d manifests", top.desc.Digest, maxManifests)
			}
			switch {
			case isIndex(d.MediaType):
				_, raw, err := p.Manifest(ctx, d.Digest.String())
				if err != nil {
					return resolveError(p, d.Digest.String(), err)
				}
				if err := walk(found{desc: d, raw: raw}, depth+1); err != nil {
					return err
				}
			case isManifest(d.MediaType):
				list = append(list, found{desc: d, platform: d.Platform})
			}
		}
		return nil
	}
	err := walk(top, 1)
	return list, err
}

// isArtifact: go-containerregistry (ko, crane) gives images an artifactType too, their config's media type.
func isArtifact(d ocispec.Descriptor) bool {
	return d.ArtifactType != "" && d.ArtifactType != ocispec.MediaTypeImageConfig && d.ArtifactType != dockerConfig
}

// isAttestation: BuildKit's provenance and SBOM manifests lie in the index beside the images that they are about.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" || d.Platform != nil && d.Platform.OS == "unknown"
}

// load reads the manifest's config and says whether the image can be converted. The descriptor's size and media type are
// what others claim and are checked.
func load(ctx context.Context, p Place, d ocispec.Descriptor, raw []byte) (*image, error) {
	if d.Size != int64(len(raw)) {
		return nil, fmt.Errorf("manifest %s has %d bytes, its descriptor says %d", d.Digest, len(raw), d.Size)
	}
	c, err := parseContent(raw)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if c.MediaType == "" {
		c.MediaType = d.MediaType
	}
	switch {
	case c.ArtifactType == artifact.ArtifactType || c.ArtifactType == "application/vnd.azure.artifact.streaming.v1":
		return nil, &Error{UnsupportedArtifactType, fmt.Errorf("%s is a streaming artifact itself", d.Digest)}
	case !isManifest(c.MediaType) || c.MediaType != d.MediaType:
		return nil, &Error{UnsupportedMediaType, fmt.Errorf("manifest %s is of type %q", d.Digest, c.MediaType)}
	case c.Config == nil || c.Config.MediaType != ocispec.MediaTypeImageConfig && c.Config.MediaType != dockerConfig:
		var config string
		if c.Config != nil {
			config = c.Config.MediaType
		}
		return nil, &Error{ImageNotRunnable, fmt.Errorf("manifest %s has a config of type %q, not an image's", d.Digest, config)}
	case len(c.Layers) > artifact.MaxLayers:
		return nil, fmt.Errorf("manifest %s has %d layers: more than %d are not supported", d.Digest, len(c.Layers), artifact.MaxLayers)
	}
	img := &image{desc: d}
	if err := json.Unmarshal(raw, &img.manifest); err != nil {
		return nil, fmt.Errorf("parse manifest %s: %w", d.Digest, err)
	}
	for i, l := range append([]ocispec.Descriptor{d, img.manifest.Config}, img.manifest.Layers...) {
		if l.Digest.Validate() != nil || l.Digest.Algorithm() != digest.SHA256 {
			what := "config"
			if i > 1 {
				what = fmt.Sprintf("layer %d", i-2)
			}
			return nil, fmt.Errorf("manifest %s: %s has the digest %q: only SHA-256 can be converted", d.Digest, what, l.Digest)
		}
	}

	config, err := readBlob(ctx, p, img.manifest.Config, maxConfigSize)
	if err != nil {
		return nil, resolveError(p, d.Digest.String(), fmt.Errorf("config: %w", err))
	}
	var parsed ocispec.Image
	if err := json.Unmarshal(config, &parsed); err != nil {
		return nil, fmt.Errorf("parse config %s: %w", img.manifest.Config.Digest, err)
	}
	img.platform = ocispec.Platform{OS: parsed.OS, Architecture: parsed.Architecture, Variant: parsed.Variant}
	if parsed.Created != nil {
		img.created = *parsed.Created
	}
	img.diffIDs, img.run = parsed.RootFS.DiffIDs, parsed.Config
	if parsed.OS != "linux" || parsed.Architecture == "" {
		return nil, &Error{UnsupportedPlatform, fmt.Errorf("manifest %s is of %s", d.Digest, platformString(img.platform))}
	}
	for i, l := range img.manifest.Layers {
		if err := checkLayer(ctx, p, l); err != nil {
			return nil, fmt.Errorf("layer %d of manifest %s, %s: %w", i, d.Digest, l.Digest, err)
		}
	}
	if len(img.diffIDs) != len(img.manifest.Layers) {
		return nil, &Error{ImageNotRunnable, fmt.Errorf("manifest %s has %d layers, its config %d diffIDs", d.Digest, len(img.manifest.Layers), len(img.diffIDs))}
	}
	return img, nil
}

// matches says whether p is what was asked for; a variant not asked for is any.
func matches(want, p ocispec.Platform) bool {
	return want.OS == p.OS && want.Architecture == p.Architecture && (want.Variant == "" || variant(want) == variant(p))
}

func wanted(want []ocispec.Platform, p ocispec.Platform) bool {
	return len(want) == 0 || slices.ContainsFunc(want, func(w ocispec.Platform) bool { return matches(w, p) })
}

// variant is p's variant; arm64 without one is v8, as everywhere.
func variant(p ocispec.Platform) string {
	if p.Architecture == "arm64" && p.Variant == "" {
		return "v8"
	}
	return p.Variant
}

func platformString(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// ParsePlatform reads "os/architecture" or "os/architecture/variant".
func ParsePlatform(s string) (ocispec.Platform, error) {
	f := strings.Split(s, "/")
	if len(f) < 2 || len(f) > 3 || slices.Contains(f, "") {
		return ocispec.Platform{}, fmt.Errorf("platform %q is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT", s)
	}
	p := ocispec.Platform{OS: f[0], Architecture: f[1]}
	if len(f) == 3 {
		p.Variant = f[2]
	}
	return p, nil
}
