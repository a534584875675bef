package converter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Description says what a reference leads to, as far as manifests and a config say it.
type Description struct {
	Desc      ocispec.Descriptor // of what the reference names, with its artifact type
	Subject   digest.Digest      // what it refers to; "" if it is no referrer
	Created   time.Time          // as the first image's config says; zero if it does not
	Platforms []PlatformImage    // none of what is no image: a chart, a signature, an artifact
}

// PlatformImage is an image of one platform.
type PlatformImage struct {
	Desc     ocispec.Descriptor // of its manifest
	Platform ocispec.Platform
	Layers   []ocispec.Descriptor // none if the manifest is not in the place, which is allowed in an index
}

// String names the platform: "linux/arm64/v8".
func (i PlatformImage) String() string { return platformString(i.Platform) }

// Size is the bytes of the compressed layers.
func (i PlatformImage) Size() (n int64) {
	for _, l := range i.Layers {
		n += l.Size
	}
	return n
}

// Wanted says whether the platform is among want, as CreateOptions.Platforms choose; none is all.
func (i PlatformImage) Wanted(want []ocispec.Platform) bool { return wanted(want, i.Platform) }

// Describe looks at what ref names: at its manifests, and at the config of the first and of those whose index does not say their platform. It judges
// nothing: what cannot be converted is described, too.
func Describe(ctx context.Context, p Place, ref string) (Description, error) {
	top, raw, err := p.Manifest(ctx, ref)
	if err != nil {
		return Description{}, resolveError(p, ref, err)
	}
	d := Description{Desc: top}
	c, err := parseContent(raw)
	if err != nil {
		return d, resolveError(p, ref, err)
	}
	if c.Subject != nil {
		d.Subject = c.Subject.Digest
	}
	list := []found{{desc: top, raw: raw}}
	switch {
	case d.Subject != "" || isArtifact(top):
		return d, nil
	case isIndex(top.MediaType):
		if list, err = manifestsOf(ctx, p, list[0]); err != nil {
			return d, err
		}
	case !isManifest(top.MediaType):
		return d, nil
	}
	for _, f := range list {
		img, created, err := describeImage(ctx, p, f, d.Created.IsZero())
		if err != nil {
			return d, resolveError(p, f.desc.Digest.String(), err)
		}
		if img == nil {
			continue
		}
		if d.Created.IsZero() {
			d.Created = created
		}
		d.Platforms = append(d.Platforms, *img)
	}
	return d, nil
}

// describeImage describes what f leads to; nil if that is no image.
func describeImage(ctx context.Context, p Place, f found, config bool) (*PlatformImage, time.Time, error) {
	var created time.Time
	img := &PlatformImage{Desc: bare(f.desc)}
	if f.platform != nil {
		img.Platform = *f.platform
	}
	if f.raw == nil {
		_, raw, err := p.Manifest(ctx, f.desc.Digest.String())
		if errors.Is(err, ErrNotFound) && f.platform != nil {
			return img, created, nil
		}
		if err != nil {
			return nil, created, err
		}
		f.raw = raw
	}
	c, err := parseContent(f.raw)
	if err != nil {
		return nil, created, err
	}
	if c.Config == nil || c.Config.MediaType != ocispec.MediaTypeImageConfig && c.Config.MediaType != dockerConfig {
		return nil, created, nil
	}
	img.Layers = c.Layers
	if f.platform != nil && !config {
		return img, created, nil
	}
	raw, err := readBlob(ctx, p, *c.Config, maxConfigSize)
	if err != nil {
		return nil, created, fmt.Errorf("config: %w", err)
	}
	var parsed ocispec.Image
	if err := json.Unmarshal(raw, &parsed); err != nil {
		return nil, created, fmt.Errorf("parse config %s: %w", c.Config.Digest, err)
	}
	if f.platform == nil {
		img.Platform = ocispec.Platform{OS: parsed.OS, Architecture: parsed.Architecture, Variant: parsed.Variant}
	}
	if parsed.Created != nil {
		created = *parsed.Created
	}
	return img, created, nil
}
