package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

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
	pinned    bool     // CRI's: what pods themselves are made of

	missing []ocispec.Descriptor // the layers that are not in containerd, as lacking has found them
}

func (u unpacked) String() string { return u.namespace + "/" + strings.Join(u.names, ", ") }

// imagesOf lists the images that containers could be made of with one snapshotter, or any if that is "", and with none of the others.
func imagesOf(ctx context.Context, cl *client.Client, with string, without ...string) (list []unpacked, err error) {
	err = eachNamespace(ctx, cl, func(ctx context.Context, ns string) error {
		all, err := cl.ListImages(ctx)
		if err != nil {
			return err
		}
		for _, img := range all {
			if i := slices.IndexFunc(list, func(u unpacked) bool {
				return u.namespace == ns && u.image.Target().Digest == img.Target().Digest
			}); i >= 0 {
				list[i].names, list[i].pinned = append(list[i].names, img.Name()), list[i].pinned || isPinned(img)
				continue
			}
			is := true
			if with != "" {
				is, err = img.IsUnpacked(ctx, with)
			}
			for _, other := range without {
				if err == nil && is {
					is, err = img.IsUnpacked(ctx, other)
					is = !is
				}
			}
			if errdefs.IsNotFound(err) {
				continue // of another platform, or its content is not here: it runs nowhere
			}
			if err != nil {
				return fmt.Errorf("%s: %w", img.Name(), err)
			}
			if is {
				list = append(list, unpacked{namespace: ns, image: img, names: []string{img.Name()}, pinned: isPinned(img)})
			}
		}
		return nil
	})
	return list, err
}

func isPinned(img client.Image) bool { return img.Labels()["io.cri-containerd.pinned"] == "pinned" }

// content is where u's layers are, and are to be.
func (u unpacked) content() blobs.Image {
	return blobs.Image{Names: u.names, Target: u.image.Target(), Platform: u.image.Platform()}
}

// lacking lists those of images whose layers are not all in containerd, with these as missing.
func lacking(ctx context.Context, cl *client.Client, images []unpacked) (list []unpacked, err error) {
	for _, u := range images {
		if u.missing, err = blobs.Missing(namespaces.WithNamespace(ctx, u.namespace), cl.ContentStore(), u.content()); err != nil {
			return nil, fmt.Errorf("%s: %w", u, err)
		}
		if len(u.missing) > 0 {
			list = append(list, u)
		}
	}
	return list, nil
}

// unpack makes u an image of another snapshotter, as a pull with that would: layers whose blobs are not on the node are fetched. With "" that is all.
func (in *installer) unpack(ctx context.Context, cl *client.Client, u unpacked, snapshotter string) (err error) {
	ctx, done, err := cl.WithLease(namespaces.WithNamespace(ctx, u.namespace))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	if _, err := blobs.Fetch(ctx, cl.ContentStore(), u.content(), in.o.Fetch); err != nil || snapshotter == "" {
		return err
	}
	return u.image.Unpack(ctx, snapshotter)
}

// unpackAll does for all images what it can.
func (in *installer) unpackAll(ctx context.Context, cl *client.Client, images []unpacked, snapshotter string) error {
	var lost []error
	for _, u := range images {
		if err := in.unpack(ctx, cl, u, snapshotter); err != nil {
			lost = append(lost, fmt.Errorf("%s: %w", u, err))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.Join(lost...)
}

// criNamespace is containerd's namespace for pods.
const criNamespace = "k8s.io"

// withoutLayers lists the images that pods have by the snapshotter that CRI uses now, and whose layers are not all in containerd: another snapshotter cannot unpack them, and
// their next containers would not start. Where it serves a runtime handler alone, these are the pinned ones: the rest is pulled for that.
func (in *installer) withoutLayers(ctx context.Context, snapshotter string) ([]unpacked, error) {
	dump, err := in.dump(ctx, nil)
	if err != nil {
		return nil, err
	}
	now, err := snapshotterOf(dump)
	if err != nil || now == snapshotter {
		return nil, err
	}
	cl, err := client.New(in.o.Socket)
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	all, err := imagesOf(ctx, cl, now)
	if err != nil {
		return nil, err
	}
	return lacking(ctx, cl, slices.DeleteFunc(all, func(u unpacked) bool { return u.namespace != criNamespace || in.o.Runtime != "" && !u.pinned }))
}

// announceLayers prints what fetchLayers gets, and refuses to fill the disk with it.
func (in *installer) announceLayers(p plan) error {
	sizes := map[digest.Digest]int64{} // images have layers in common
	for _, u := range p.images {
		of := int64(0)
		for _, l := range u.missing {
			sizes[l.Digest] = l.Size
			of += l.Size
		}
		fmt.Fprintf(in.o.Out, "fetch the layers of %s, %d MB, which containerd has not kept (discard_unpacked_layers), and its next container needs\n", u, megabytes(of))
	}
	if len(sizes) == 0 {
		return nil
	}
	need := int64(0)
	for _, n := range sizes {
		need += n
	}
	room, err := roomIn(p.store)
	if err != nil {
		return err
	}
	fmt.Fprintf(in.o.Out, "fetch %d layers in all, %d MB, into %s, which has room for %d MB\n", len(sizes), megabytes(need), p.store, megabytes(room))
	if need > room {
		return fmt.Errorf("nothing was changed: %d MB are to be fetched, and %s has room for %d MB before it is %d%% full, from where on the kubelet removes images and evicts pods: %s",
			megabytes(need), p.store, megabytes(room), fullAt, withoutFetching)
	}
	return nil
}

// megabytes is n bytes, rounded up.
func megabytes(n int64) int64 { return (n + 999_999) / 1_000_000 }

// fullAt is how full, in percent, the kubelet lets a disk be: its imageGCHighThresholdPercent, as it is by default.
const fullAt = 85

// roomIn returns how many bytes there may be more in dir before its file system is too full for the kubelet.
func roomIn(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return max(0, int64(st.Bavail)-int64(st.Blocks)*(100-fullAt)/100) * st.Bsize, nil
}

const withoutFetching = "remove what can be pulled again (`crictl rmi`), or have the snapshotter serve a runtime handler alone (--runtime NAME)"

// fetchLayers gets the layers of images that withoutLayers has listed.
func (in *installer) fetchLayers(ctx context.Context, images []unpacked) error {
	if len(images) == 0 {
		return nil
	}
	cl, err := client.New(in.o.Socket)
	if err != nil {
		return err
	}
	defer cl.Close()
	if err := in.unpackAll(ctx, cl, images, ""); err != nil {
		return fmt.Errorf("nothing was changed: containerd has not kept the layers of images (discard_unpacked_layers), and they cannot be had: %s: %w", withoutFetching, err)
	}
	return nil
}
