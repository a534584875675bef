package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/blobs"
	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

func newFetchCommand(configFile *string) *cobra.Command {
	var socket, namespace string
	cmd := &cobra.Command{
		Use:   "fetch REF...",
		Short: "Get the layers of streamed images into containerd's content store, for what exports, pushes or converts them",
		Long: `containerd has no layers of an image that is streamed. What wants them, as "ctr images export", "ctr images push" or "ctr images convert",
fails with "content digest sha256:...: not found" before this. It downloads those that are missing from where the image is from, with the daemon's configuration and
the credentials that it finds itself; what kubelet has sent with a pull only the daemon has. containerd keeps them until the image is removed.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			cl, err := client.New(cmp.Or(socket, c.Containerd))
			if err != nil {
				return err
			}
			defer cl.Close()
			var errs []error
			for _, ref := range args {
				if err := fetchImage(namespaces.WithNamespace(cmd.Context(), namespace), cl, ref, fetchBlobs(c), cmd.OutOrStdout()); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", ref, err))
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVar(&socket, "containerd", "", "containerd's socket (default: the configuration's)")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "k8s.io", "containerd's namespace")
	return cmd
}

// fetchImage gets the layers of an image that containerd has.
func fetchImage(ctx context.Context, cl *client.Client, ref string, from blobs.Source, out io.Writer) (err error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return err
	}
	img, err := cl.ImageService().Get(ctx, named.String())
	if errdefs.IsNotFound(err) {
		ns, _ := namespaces.Namespace(ctx)
		return fmt.Errorf("containerd has no such image in its namespace %s: %w", ns, err)
	}
	if err != nil {
		return err
	}
	ctx, done, err := cl.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	got, err := blobs.Fetch(ctx, cl.ContentStore(), blobs.Image{Names: []string{img.Name}, Target: img.Target, Platform: platforms.Default()}, from)
	if err != nil {
		return err
	}
	size := int64(0)
	for _, l := range got {
		size += l.Size
	}
	_, err = fmt.Fprintf(out, "%s: fetched %d layers, %s\n", img.Name, len(got), bytesText(size))
	return err
}

// fetchBlobs returns what fetches blobs with the daemon's configuration and credentials, but for those that came with pulls.
func fetchBlobs(c config) blobs.Source {
	return func(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) (err error) {
		repo, _, _, err := registryclient.ParseReference(ref)
		if err != nil {
			return err
		}
		logins := newSources(c, nil)
		defer func() { err = errors.Join(err, logins.close()) }()
		reg, err := registryclient.New(registryclient.Options{
			HostsDir: c.HostsDir, Credentials: credentials.Chain(logins...), UserAgent: "streaming-snapshotter/" + version(), Wait: c.ResolveTimeout.D,
		})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, reg.Close()) }()
		r, err := reg.ReadRange(ctx, repo, blob.Digest, 0, blob.Size, 0)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(w, r)
		return err
	}
}
