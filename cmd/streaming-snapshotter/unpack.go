package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/blobs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot"
)

// unpack is snapshot.Snapshotter.Unpack by the containerd at socket, with blobs of from: containerd gets the layer and unpacks it as in a pull. What it has is taken, then what the image has that is pulled, with
// what its pull comes with, then other images with that chain. The image that was streamed comes last: it may be his who has attached a lie.
func unpack(ctx context.Context, socket string, from blobs.Source, l snapshot.Layer, fresh func() ([]mount.Mount, error)) (err error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	cl, err := client.New(socket)
	if err != nil {
		return fmt.Errorf("ask containerd at %s (`cri_containerd`): %w", socket, err)
	}
	defer cl.Close()
	ctx, done, err := cl.WithLease(namespaces.WithNamespace(ctx, ns))
	if err != nil {
		return fmt.Errorf("ask containerd at %s (`cri_containerd`): %w", socket, err)
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	errs := []error{errors.New("no image is known that has it")}
	for h := range holders(ctx, cl, l) {
		err := h.unpack(ctx, cl, from, fresh)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", h.names[0], err))
	}
	return errors.Join(errs[min(1, len(errs)-1):]...)
}

// holder is an image that has a layer in its place.
type holder struct {
	names  []string
	layer  ocispec.Descriptor
	diffID digest.Digest // as its config lists it
}

// holders lists those of layer l, the one to be asked first first.
func holders(ctx context.Context, cl *client.Client, l snapshot.Layer) iter.Seq[holder] {
	cs := cl.ContentStore()
	return func(yield func(holder) bool) {
		streamed := holder{[]string{l.Source.Ref}, l.Source.Layer, l.Source.DiffID}
		_, err := cs.Info(ctx, streamed.layer.Digest)
		if l.Source.Ref != "" && err == nil && !yield(streamed) {
			return
		}
		if l.Ref != "" {
			if h, err := holderOf(ctx, cs, []string{l.Ref}, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: l.Manifest}, l); err == nil && !yield(h) {
				return
			}
		}
		all, err := cl.ImageService().List(ctx)
		if err != nil {
			all = nil // one less to be asked
		}
		names, targets := map[digest.Digest][]string{}, map[digest.Digest]ocispec.Descriptor{}
		for _, img := range all {
			if !strings.HasPrefix(img.Name, "sha256:") { // CRI's name of an image by its config
				names[img.Target.Digest], targets[img.Target.Digest] = append(names[img.Target.Digest], img.Name), img.Target
			}
		}
		for d, target := range targets {
			if h, err := holderOf(ctx, cs, names[d], target, l); err == nil && !yield(h) {
				return
			}
		}
		if l.Source.Ref != "" {
			yield(streamed)
		}
	}
}

// holderOf returns what an image in containerd has of l. An error says that it has it not, or is of another platform.
func holderOf(ctx context.Context, cs content.Store, names []string, target ocispec.Descriptor, l snapshot.Layer) (h holder, err error) {
	m, err := images.Manifest(ctx, cs, target, platforms.Default())
	if err != nil {
		return h, err
	}
	raw, err := content.ReadBlob(ctx, cs, m.Config)
	var config ocispec.Image
	if err == nil {
		err = json.Unmarshal(raw, &config)
	}
	if err != nil {
		return h, err
	}
	diffIDs := config.RootFS.DiffIDs
	if len(m.Layers) != len(diffIDs) || len(diffIDs) <= l.Number || identity.ChainID(slices.Clone(diffIDs[:l.Number+1])) != l.ChainID {
		return h, errors.New("it has not that layer")
	}
	return holder{names, m.Layers[l.Number], diffIDs[l.Number]}, nil
}

// unpack unpacks the layer of h into fresh mounts. What containerd has unpacked has to be what the config lists: a manifest may have another layer.
func (h holder) unpack(ctx context.Context, cl *client.Client, from blobs.Source, fresh func() ([]mount.Mount, error)) error {
	if err := blobs.Layer(ctx, cl.ContentStore(), h.names, h.layer, from); err != nil {
		return err
	}
	mounts, err := fresh()
	if err != nil {
		return err
	}
	got, err := cl.DiffService().Apply(ctx, h.layer, mounts)
	if err != nil {
		return fmt.Errorf("unpack layer %s: %w", h.layer.Digest, err)
	}
	if got.Digest != h.diffID {
		return fmt.Errorf("the tar of layer %s is %s, the image's config lists %s", h.layer.Digest, got.Digest, h.diffID)
	}
	return nil
}

// readBlob is blobs.Source by the node's own registry client.
func (n *node) readBlob(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) error {
	return readBlob(ctx, n.reg, ref, blob, 0, w)
}

// readBlob writes blob from its byte had on to w.
func readBlob(ctx context.Context, reg *registryclient.Client, ref string, blob ocispec.Descriptor, had int64, w io.Writer) error {
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		return err
	}
	r, err := reg.ReadRange(ctx, repo, blob.Digest, had, blob.Size-had, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(w, r)
	return err
}
