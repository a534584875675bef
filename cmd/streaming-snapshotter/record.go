package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// recordNamespace is containerd's namespace of the runs for profiles: what they pull and make is theirs, and goes with them.
const recordNamespace = "streaming-profile"

type recordOptions struct {
	ref, address, snapshotter string
	args                      []string // of the container; none for the image's own
	untilLog                  string   // regular expression
	untilPort                 int
	wait                      time.Duration
	output                    io.Writer // of the container
}

func newRecordCommand(configFile *string) *cobra.Command {
	var o recordOptions
	cmd := &cobra.Command{
		Use:   "record REF [-- COMMAND ...]",
		Short: "Run a container of the image until it is ready, and print the record of what it read",
		Long: `Pulls the image into a namespace of its own on this node's containerd, runs a container of it in the host's network until it is ready, and prints what it read in the form of
"profile export", for "streamctl profile push --source recorded". The container's output goes to standard error. It is ready when one of the --until
is met, when --for is over, when it ends, or at an interrupt. Afterwards container and image are removed.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			o.ref, o.args, o.output = args[0], args[1:], cmd.ErrOrStderr()
			b, err := recordProfile(cmd.Context(), c, o)
			if err != nil {
				return fmt.Errorf("%s: %w", o.ref, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			return err
		},
	}
	cmd.Flags().StringVar(&o.address, "containerd", "/run/containerd/containerd.sock", "containerd's socket")
	cmd.Flags().StringVar(&o.snapshotter, "snapshotter", "streaming", "the daemon's name in containerd's proxy_plugins")
	cmd.Flags().StringVar(&o.untilLog, "until-log", "", "ready when a line of the output matches this regular expression")
	cmd.Flags().IntVar(&o.untilPort, "until-port", 0, "ready when this TCP port of the host takes connections")
	cmd.Flags().DurationVar(&o.wait, "for", time.Minute, "ready after this time in any case")
	return cmd
}

// recordProfile runs a container and returns the record of its start.
func recordProfile(ctx context.Context, c config, o recordOptions) (record []byte, err error) {
	match, err := regexp.Compile(o.untilLog)
	if err != nil {
		return nil, fmt.Errorf("--until-log: %w", err)
	}
	client, err := containerd.New(o.address, containerd.WithDefaultNamespace(recordNamespace))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	defer client.Close()
	manifest, err := manifestOf(ctx, c, o.ref, "")
	if err != nil {
		return nil, err
	}
	image, err := pullForRecord(namespaces.WithNamespace(ctx, recordNamespace), client, c, o)
	if err != nil {
		return nil, err
	}
	// What is made is removed also after an interrupt, which is a way to say that the container is ready.
	own := namespaces.WithNamespace(context.WithoutCancel(ctx), recordNamespace)
	defer func() {
		err = errors.Join(err, client.ImageService().Delete(own, image.Name(), images.SynchronousDelete()))
	}()
	if _, err := askProfile(c.Root, again, manifest); err != nil {
		return nil, err
	}
	if err := runForRecord(ctx, own, client, image, o, newReadiness(o, match)); err != nil {
		return nil, err
	}
	return askProfile(c.Root, "", manifest)
}

func pullForRecord(ctx context.Context, client *containerd.Client, c config, o recordOptions) (containerd.Image, error) {
	credentials := registryclient.DockerCredentials()
	hosts := dockerconfig.HostOptions{
		HostDir:     dockerconfig.HostDirFromRoot(c.HostsDir),
		Credentials: func(host string) (string, string, error) { return credentials(ctx, host) },
	}
	return client.Pull(ctx, o.ref, containerd.WithPullUnpack, containerd.WithPullSnapshotter(o.snapshotter),
		containerd.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(o.ref)),
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: dockerconfig.ConfigureHosts(ctx, hosts)})))
}

// runForRecord runs a container of image until it is ready. own is for what is done after ctx has ended.
func runForRecord(ctx, own context.Context, client *containerd.Client, image containerd.Image, o recordOptions, ready *readiness) (err error) {
	spec := []oci.SpecOpts{oci.WithImageConfigArgs(image, o.args), oci.WithHostNamespace("network"), oci.WithHostHostsFile, oci.WithHostResolvconf}
	if len(o.args) > 0 {
		spec = append(spec, oci.WithProcessArgs(o.args...))
	}
	id := "record-" + strconv.Itoa(os.Getpid())
	container, err := client.NewContainer(own, id, containerd.WithImage(image), containerd.WithSnapshotter(o.snapshotter),
		containerd.WithNewSnapshot(id, image), containerd.WithNewSpec(spec...))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, container.Delete(own, containerd.WithSnapshotCleanup)) }()
	task, err := container.NewTask(own, cio.NewCreator(cio.WithStreams(nil, ready, ready)))
	if err != nil {
		return err
	}
	defer func() {
		_, deleteErr := task.Delete(own, containerd.WithProcessKill)
		err = errors.Join(err, deleteErr)
	}()
	exited, err := task.Wait(own)
	if err != nil {
		return err
	}
	if err := task.Start(own); err != nil {
		return err
	}
	if ended := ready.wait(ctx, exited); !ended {
		if err := task.Kill(own, unix.SIGKILL); err != nil {
			return err
		}
		<-exited
	}
	return nil
}

// readiness sees when a container is ready, by its output and otherwise.
type readiness struct {
	o     recordOptions
	match *regexp.Regexp // nil matches nothing

	mu      sync.Mutex
	line    []byte // so far
	matched chan struct{}
	done    bool // matched is closed
}

func newReadiness(o recordOptions, match *regexp.Regexp) *readiness {
	if o.untilLog == "" {
		match = nil
	}
	return &readiness{o: o, match: match, matched: make(chan struct{})}
}

// maxLine bounds what is kept of a line, bytes.
const maxLine = 64 << 10

// Write takes a piece of the output.
func (r *readiness) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.o.output.Write(p); err != nil {
		return 0, err
	}
	r.line = append(r.line, p...)
	for {
		line, rest, whole := bytes.Cut(r.line, []byte("\n"))
		if !r.done && r.match != nil && r.match.Match(line) {
			close(r.matched)
			r.done = true
		}
		if !whole {
			r.line = r.line[max(0, len(r.line)-maxLine):]
			return len(p), nil
		}
		r.line = rest
	}
}

// wait waits until the container is ready. It reports whether it has ended.
func (r *readiness) wait(ctx context.Context, exited <-chan containerd.ExitStatus) (ended bool) {
	end := time.After(r.o.wait)
	var poll <-chan time.Time
	if r.o.untilPort > 0 {
		t := time.NewTicker(20 * time.Millisecond)
		defer t.Stop()
		poll = t.C
	}
	for {
		select {
		case <-exited:
			return true
		case <-r.matched:
			return false
		case <-end:
			return false
		case <-ctx.Done():
			return false
		case <-poll:
			conn, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(r.o.untilPort)), time.Second)
			if err == nil {
				conn.Close()
				return false
			}
		}
	}
}
