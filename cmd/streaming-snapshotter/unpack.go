package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
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

// unpacker unpacks layers by a containerd: its unpack is snapshot.Snapshotter.Unpack. containerd gets the layer and unpacks it as in a pull. What it has is taken, then what the image has that is pulled, from where its
// pull comes from, then other images with that chain. The repository of the image that was streamed comes last: it may be his who has attached a lie. Whoever is silent or drips, as the attacker's registry may, is
// left for the next soon, and asked once more without haste if nobody else gives the layer.
type unpacker struct {
	socket string // containerd's
	from   blobs.Source
	head   time.Duration // how long a registry may take for the first byte; 0 is sourceHead

	mu   sync.Mutex
	slow map[string]time.Time // registries that are asked without haste until then
}

const (
	sourceHead  = 10 * time.Second
	sourceRate  = 1 << 20          // bytes per second, that one has to give after it
	sourceLasts = 10 * time.Minute // that one which did not is left for the others
)

var errSlowSource = errors.New("it is so slow that others are asked first")

func (u *unpacker) unpack(ctx context.Context, l snapshot.Layer, into func(do func([]mount.Mount) error) error) (err error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	cl, err := client.New(u.socket)
	if err != nil {
		return fmt.Errorf("ask containerd at %s (`cri_containerd`): %w", u.socket, err)
	}
	defer cl.Close()
	ctx = namespaces.WithNamespace(ctx, ns)
	// Of its own: that of the pull, which ctx comes from, ends with the pull, and what was fetched would go with it.
	lease, err := cl.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(24*time.Hour))
	if err != nil {
		return fmt.Errorf("ask containerd at %s (`cri_containerd`): %w", u.socket, err)
	}
	defer func() { err = errors.Join(err, cl.LeasesService().Delete(context.WithoutCancel(ctx), lease)) }()
	ctx = leases.WithLease(ctx, lease.ID)
	return u.unpackFrom(ctx, cl.ContentStore(), cl.DiffService(), holders(ctx, cl.ContentStore(), cl.ImageService(), l), into)
}

// unpackFrom unpacks the layer of the first of list that gives it.
func (u *unpacker) unpackFrom(ctx context.Context, cs content.Store, applier diff.Applier, list iter.Seq[holder], into func(do func([]mount.Mount) error) error) error {
	var errs []error
	var again []holder
	try := func(h holder, from blobs.Source) error {
		err := h.unpack(ctx, cs, applier, from, into)
		if err == nil {
			return nil
		}
		return fmt.Errorf("%s: %w", h.names[0], err)
	}
	for h := range list {
		err := try(h, u.hurried)
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case errors.Is(err, errSlowSource):
			again = append(again, h)
		default:
			errs = append(errs, err)
		}
	}
	for _, h := range again {
		err := try(h, u.from)
		if err == nil || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return errors.New("no image is known that has it")
	}
	return errors.Join(errs...)
}

// hurried is from, unless the registry is slow, or was lately.
func (u *unpacker) hurried(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) error {
	registry, _, _ := strings.Cut(ref, "/")
	u.mu.Lock()
	slow := time.Now().Before(u.slow[registry])
	u.mu.Unlock()
	if slow {
		return fmt.Errorf("%s: %w", registry, errSlowSource)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	head, began, got := cmp.Or(u.head, sourceHead), time.Now(), int64(0)
	late := time.AfterFunc(head, func() { cancel(errSlowSource) })
	defer late.Stop()
	err := u.from(ctx, ref, blob, writerFunc(func(p []byte) (int, error) {
		n, err := w.Write(p)
		got += int64(n)
		late.Reset(head + time.Duration(float64(got)/sourceRate*float64(time.Second)) - time.Since(began))
		return n, err
	}))
	if err == nil || !errors.Is(context.Cause(ctx), errSlowSource) {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.slow == nil {
		u.slow = map[string]time.Time{}
	}
	u.slow[registry] = time.Now().Add(sourceLasts)
	return fmt.Errorf("%s: %d bytes in %v: %w", registry, got, time.Since(began).Round(time.Second), errSlowSource)
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// holder is an image that has a layer in its place.
type holder struct {
	names  []string
	layer  ocispec.Descriptor
	diffID digest.Digest // as its config lists it
}

// holders lists those of layer l, the one to be asked first first.
func holders(ctx context.Context, cs content.Store, is images.Store, l snapshot.Layer) iter.Seq[holder] {
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
		all, err := is.List(ctx)
		if err != nil {
			all = nil // one less to be asked
		}
		names, targets := map[digest.Digest][]string{}, map[digest.Digest]ocispec.Descriptor{}
		for _, img := range all {
			if !strings.HasPrefix(img.Name, "sha256:") && img.Name != l.Ref { // CRI's name of an image by its config, and what was asked already
				names[img.Target.Digest], targets[img.Target.Digest] = append(names[img.Target.Digest], img.Name), img.Target
			}
		}
		suspect, _, _, _ := registryclient.ParseReference(l.Source.Ref)
		order := func(a, b string) int {
			return cmp.Or(cmp.Compare(inRepository(a, suspect), inRepository(b, suspect)), cmp.Compare(a, b))
		}
		for _, list := range names {
			slices.SortFunc(list, order)
		}
		for _, d := range slices.SortedFunc(maps.Keys(targets), func(a, b digest.Digest) int { return order(names[a][0], names[b][0]) }) {
			if h, err := holderOf(ctx, cs, names[d], targets[d], l); err == nil && !yield(h) {
				return
			}
		}
		if l.Source.Ref != "" {
			yield(streamed)
		}
	}
}

// inRepository is 1 if name is of repo, and 0 otherwise.
func inRepository(name string, repo registryclient.Repository) int {
	if of, _, _, err := registryclient.ParseReference(name); err == nil && of == repo {
		return 1
	}
	return 0
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

// unpack unpacks the layer of h. What containerd has unpacked has to be what the config lists: a manifest may have another layer.
func (h holder) unpack(ctx context.Context, cs content.Store, applier diff.Applier, from blobs.Source, into func(do func([]mount.Mount) error) error) error {
	if err := blobs.Layer(ctx, cs, h.names, h.layer, from); err != nil {
		return err
	}
	return into(func(mounts []mount.Mount) error {
		got, err := applier.Apply(ctx, h.layer, mounts)
		if err != nil {
			return fmt.Errorf("unpack layer %s: %w", h.layer.Digest, err)
		}
		if got.Digest != h.diffID {
			return fmt.Errorf("the tar of layer %s is %s, the image's config lists %s", h.layer.Digest, got.Digest, h.diffID)
		}
		return nil
	})
}

// readBlob is blobs.Source by the node's own registry client.
func (n *node) readBlob(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) error {
	if n.reg == nil {
		return errors.New("the daemon is in safe mode, and cannot read its configuration of registries")
	}
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
