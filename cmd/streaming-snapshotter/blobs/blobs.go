// Package blobs gets the layers of streamed images into containerd's content store. containerd has only an image's manifest and config where the layers are streamed: that is
// enough to run it, and not to export, push, commit or convert it, nor to unpack it for another snapshotter.
//
// The principle: afterwards the store is as after a normal pull. The layers are the image's own, by their digests; no tag is resolved again.
package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Source writes a blob of the image ref to w.
type Source func(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) error

// Image is one in containerd.
type Image struct {
	Names    []string // that it has; the first by which a layer can be had is taken
	Target   ocispec.Descriptor
	Platform platforms.MatchComparer // of an index
}

// Missing lists those layers of an image that are not in the content store. ctx says the namespace.
func Missing(ctx context.Context, cs content.Store, img Image) ([]ocispec.Descriptor, error) {
	return missing(ctx, cs, img, images.ChildrenHandler(cs))
}

// Fetch gets those layers of an image that are not in the content store, and has containerd keep all of them for as long as it has the image. It returns the
// layers that it got. ctx says the namespace, and has a lease, without which they may go while others come.
func Fetch(ctx context.Context, cs content.Store, img Image, from Source) (got []ocispec.Descriptor, err error) {
	list, err := missing(ctx, cs, img, images.SetChildrenLabels(cs, images.ChildrenHandler(cs))) // with discard_unpacked_layers they are not referred to
	if err != nil {
		return nil, err
	}
	for _, d := range list {
		if err := Layer(ctx, cs, img.Names, d, from); err != nil {
			return got, err
		}
		got = append(got, d)
	}
	return got, nil
}

// missing calls manifest for the image's manifest.
func missing(ctx context.Context, cs content.Store, img Image, manifest images.HandlerFunc) (list []ocispec.Descriptor, err error) {
	choose := images.LimitManifests(images.FilterPlatforms(images.ChildrenHandler(cs), img.Platform), img.Platform, 1)
	err = images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		switch {
		case images.IsIndexType(d.MediaType):
			return choose(ctx, d)
		case images.IsManifestType(d.MediaType):
			return manifest(ctx, d)
		case !images.IsLayerType(d.MediaType):
			return nil, nil
		}
		if _, err := cs.Info(ctx, d.Digest); err == nil || !errdefs.IsNotFound(err) {
			return nil, err
		}
		if !slices.ContainsFunc(list, func(other ocispec.Descriptor) bool { return other.Digest == d.Digest }) {
			list = append(list, d)
		}
		return nil, nil
	}), img.Target)
	return list, err
}

// Layer gets a layer that is not in the content store by the first of its image's names that serves. What comes is held against its digest by containerd. ctx says the namespace, and has a lease.
func Layer(ctx context.Context, cs content.Store, names []string, l ocispec.Descriptor, from Source) error {
	var errs []error
	for _, name := range names {
		w, err := content.OpenWriter(ctx, cs, content.WithRef("streaming-snapshotter-"+l.Digest.String()), content.WithDescriptor(l))
		if errdefs.IsAlreadyExists(err) {
			return nil
		}
		if err == nil {
			err = w.Truncate(0)
		}
		if err == nil {
			err = from(ctx, name, l, w)
		}
		if err == nil {
			err = w.Commit(ctx, l.Size, l.Digest)
		}
		if w != nil {
			err = errors.Join(err, w.Close())
		}
		if err == nil || errdefs.IsAlreadyExists(err) {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("fetch layer %s: %w", l.Digest, errors.Join(errs...))
}
