package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
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
fails with "content digest sha256:...: not found" before this. It downloads those that are missing from where the image is from, by the daemon, with its
configuration and credentials, those too that came with pulls through its CRI proxy; or without them where no daemon answers. containerd keeps them until the image is removed.`,
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
				if err := fetchImage(namespaces.WithNamespace(cmd.Context(), namespace), cl, ref, fetchBlobs(c, blobIdle), cmd.OutOrStdout()); err != nil {
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

// fetchBlobs returns what fetches blobs by the daemon, which has the credentials that came with pulls, and what it does not give, or not go on with for
// as long as idle, with its configuration and the credentials that are found here.
func fetchBlobs(c config, idle time.Duration) blobs.Source {
	return func(ctx context.Context, ref string, blob ocispec.Descriptor, w io.Writer) (err error) {
		path := "/blob?" + url.Values{"ref": {ref}, "digest": {blob.Digest.String()}, "size": {strconv.FormatInt(blob.Size, 10)}}.Encode()
		had, daemonErr := copyFromDaemon(ctx, c.Root, path, w, idle)
		if daemonErr == nil || ctx.Err() != nil {
			return daemonErr
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
		if err := readBlob(ctx, reg, ref, blob, had, w); err != nil {
			return fmt.Errorf("%w (and by the daemon: %w)", err, daemonErr)
		}
		return nil
	}
}

// blobIdle is how long a daemon may take to go on with a blob.
const blobIdle = time.Minute

// copyFromDaemon copies what getFromDaemon gets to w, and returns how much that was.
func copyFromDaemon(ctx context.Context, root, path string, w io.Writer, idle time.Duration) (had int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	from, err := getFromDaemon(ctx, root, path)
	if err != nil {
		return 0, err
	}
	defer from.Close() // all is read, or its error is told
	const step = 256 << 10
	hangs := time.AfterFunc(idle, func() { cancel(fmt.Errorf("it has sent less than %d bytes in %v", step, idle)) })
	defer hangs.Stop()
	for err == nil {
		var n int64
		n, err = io.CopyN(w, from, step)
		had += n
		hangs.Reset(idle)
	}
	if errors.Is(err, io.EOF) {
		return had, nil
	}
	return had, cmp.Or(context.Cause(ctx), err)
}

// serveBlob returns what answers fetchBlobs. It gives up what does not begin within patience: only containers wait for longer for a registry that is away.
func (n *node) serveBlob(patience time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if n.reg == nil {
			http.Error(w, "the daemon is in safe mode, and cannot read its configuration of registries", http.StatusServiceUnavailable)
			return
		}
		repo, _, _, err := registryclient.ParseReference(r.FormValue("ref"))
		size, sizeErr := strconv.ParseInt(r.FormValue("size"), 10, 64)
		if err := errors.Join(err, sizeErr); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		late := time.AfterFunc(patience, cancel)
		b, err := n.reg.ReadRange(ctx, repo, digest.Digest(r.FormValue("digest")), 0, size, 0)
		if !late.Stop() && errors.Is(err, context.Canceled) {
			err = fmt.Errorf("not within %v", patience)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer b.Close()
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10)) // so that what ends early is known to
		io.Copy(w, b)                                                 // who has gone does not want it
	}
}
