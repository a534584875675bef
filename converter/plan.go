package converter

import (
	"context"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Planned is a platform's manifest that Create converts.
type Planned struct {
	Platform string
	Subject  ocispec.Descriptor
	Layers   int
	Bytes    int64         // of its compressed layers, each different one once
	Artifact digest.Digest // the one that it has, for which Create does nothing without Force; "" if there is none
}

// Plan says what Create would convert of the image that ref names with o, whether that has Force or not. With a Signer, an artifact that it has not signed is none.
// It reads manifests, configs and signatures, no layer. Its errors are those of Create.
func Plan(ctx context.Context, p Place, ref string, o CreateOptions) ([]Planned, error) {
	images, err := resolveImage(ctx, p, ref, o.Platforms)
	if err != nil {
		return nil, err
	}
	var list []Planned
	for _, img := range images {
		plan := Planned{Platform: platformString(img.platform), Subject: bare(img.desc), Layers: len(img.manifest.Layers), Bytes: img.bytes()}
		attached, err := artifactsOf(ctx, p, img.desc.Digest)
		if err != nil {
			return nil, err
		}
		a, signature, err := has(ctx, p, img, attached, o.Signer)
		if err != nil && CodeOf(err) != SigningFailed { // which is Create's to say
			return nil, err
		}
		if a != nil && (o.Signer == nil || signature != "") {
			plan.Artifact = a.desc.Digest
		}
		list = append(list, plan)
	}
	return list, nil
}

// resolveImage is resolve for those who asked for the image: that it is not there is an *Error.
func resolveImage(ctx context.Context, p Place, ref string, platforms []ocispec.Platform) ([]*image, error) {
	images, err := resolve(ctx, p, ref, platforms)
	if err != nil && CodeOf(err) == ResourceNotFound {
		err = &Error{ResourceNotFound, err}
	}
	return images, err
}
