package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/blobs"
)

// eachNamespace calls f for each of containerd's namespaces.
func eachNamespace(ctx context.Context, cl *client.Client, f func(ctx context.Context, namespace string) error) error {
	list, err := cl.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, ns := range list {
		if err := f(namespaces.WithNamespace(ctx, ns), ns); err != nil {
			return fmt.Errorf("containerd's namespace %s: %w", ns, err)
		}
	}
	return nil
}

// users names the containers of a snapshotter, running or not: all lose their files with it.
func users(ctx context.Context, cl *client.Client, snapshotter string) (list []string, err error) {
	err = eachNamespace(ctx, cl, func(ctx context.Context, ns string) error {
		containers, err := cl.ContainerService().List(ctx)
		for _, c := range containers {
			if c.Snapshotter != snapshotter {
				continue
			}
			of := c.Image
			if pod := c.Labels["io.kubernetes.pod.name"]; pod != "" {
				of = "pod " + c.Labels["io.kubernetes.pod.namespace"] + "/" + pod + ", " + of
			}
			list = append(list, fmt.Sprintf("%s/%s (%s)", ns, c.ID, of))
		}
		return err
	})
	return list, err
}

// unpacked is an image that one snapshotter has, and another has not.
type unpacked struct {
	namespace string
	image     client.Image
	names     []string // all that it has
}

func (u unpacked) String() string { return u.namespace + "/" + strings.Join(u.names, ", ") }

// imagesOf lists the images that containers could be made of with one snapshotter, and not with the other.
func imagesOf(ctx context.Context, cl *client.Client, with, without string) (list []unpacked, err error) {
	err = eachNamespace(ctx, cl, func(ctx context.Context, ns string) error {
		all, err := cl.ListImages(ctx)
		if err != nil {
			return err
		}
		for _, img := range all {
			if i := slices.IndexFunc(list, func(u unpacked) bool {
				return u.namespace == ns && u.image.Target().Digest == img.Target().Digest
			}); i >= 0 {
				list[i].names = append(list[i].names, img.Name())
				continue
			}
			is, err := img.IsUnpacked(ctx, with)
			if err == nil && is {
				is, err = img.IsUnpacked(ctx, without)
				is = !is
			}
			if errdefs.IsNotFound(err) {
				continue // of another platform, or its content is not here: it runs nowhere
			}
			if err != nil {
				return fmt.Errorf("%s: %w", img.Name(), err)
			}
			if is {
				list = append(list, unpacked{ns, img, []string{img.Name()}})
			}
		}
		return nil
	})
	return list, err
}

// unpack makes u an image of another snapshotter, as a pull with that would: layers whose blobs are not on the node are fetched.
func (in *installer) unpack(ctx context.Context, cl *client.Client, u unpacked, snapshotter string) (err error) {
	ctx, done, err := cl.WithLease(namespaces.WithNamespace(ctx, u.namespace))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	if _, err := blobs.Fetch(ctx, cl.ContentStore(), blobs.Image{Names: u.names, Target: u.image.Target(), Platform: u.image.Platform()}, in.o.Fetch); err != nil {
		return err
	}
	return u.image.Unpack(ctx, snapshotter)
}

// removeSnapshots removes all of a snapshotter's, those before that others stand on.
func removeSnapshots(ctx context.Context, cl *client.Client, snapshotter string) error {
	return eachNamespace(ctx, cl, func(ctx context.Context, _ string) error {
		sn := cl.SnapshotService(snapshotter)
		for {
			parents, all := map[string]bool{}, []string{}
			if err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
				parents[i.Parent] = true
				all = append(all, i.Name)
				return nil
			}); err != nil || len(all) == 0 {
				return err
			}
			for _, name := range all {
				if parents[name] {
					continue
				}
				if err := sn.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("remove snapshot %s: %w", name, err)
				}
			}
		}
	})
}
