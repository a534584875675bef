package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// recordNamespace is containerd's namespace of the runs for profiles. It is there as long as one runs.
const recordNamespace = "streaming-profile"

type recordOptions struct {
	ref, address string
	args         []string // of the container; none for the image's own
	untilLog     string   // regular expression
	untilPort    int
	wait         time.Duration
	output       io.Writer // of the container
}

func newRecordCommand(configFile *string) *cobra.Command {
	var o recordOptions
	cmd := &cobra.Command{
		Use:   "record REF [-- COMMAND ...]",
		Short: "Run a container of the image until it is ready, and print the record of what it read",
		Long: `Mounts the image as "mount" does, runs a container on it in the host's network until it is ready, with this node's containerd, and prints what it read in the form of
"profile export", for "streamctl profile push --source recorded". The daemon has no part in it, and its record of the image stays. The container's output goes to
standard error. It is ready when one of the --until is met, when --for is over, when it ends, or at an interrupt. Afterwards all is removed.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			o.ref, o.args, o.output = args[0], args[1:], cmd.ErrOrStderr()
			b, err := recordProfile(cmd.Context(), c, *configFile, o)
			if err != nil {
				return fmt.Errorf("%s: %w", o.ref, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			return err
		},
	}
	cmd.Flags().StringVar(&o.address, "containerd", "/run/containerd/containerd.sock", "containerd's socket")
	cmd.Flags().StringVar(&o.untilLog, "until-log", "", "ready when a line of the output matches this regular expression")
	cmd.Flags().IntVar(&o.untilPort, "until-port", 0, "ready when this TCP port of the host takes connections")
	cmd.Flags().DurationVar(&o.wait, "for", time.Minute, "ready after this time in any case")
	return cmd
}

// recordProfile runs a container and returns the record of its start. The mount is its own: of another one of the image, the kernel may have read already what the
// container reads.
func recordProfile(ctx context.Context, c config, configFile string, o recordOptions) (record []byte, err error) {
	match, err := regexp.Compile(o.untilLog)
	if err != nil {
		return nil, fmt.Errorf("--until-log: %w", err)
	}
	client, err := containerd.New(o.address, containerd.WithDefaultNamespace(recordNamespace))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s (`--containerd` takes another socket): %w", o.address, err)
	}
	defer client.Close()
	image, err := imageToRecord(ctx, c, o.ref)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(existing(c.Root), "record-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rootfs, root, unmount, err := mountForRecord(ctx, dir, configFile, image.name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	// What is made is removed also after an interrupt, which is a way to say that the container is ready.
	own := namespaces.WithNamespace(context.WithoutCancel(ctx), recordNamespace)
	err = runForRecord(ctx, own, client, image, rootfs, o, newReadiness(o, match))
	if err = errors.Join(err, removeNamespace(own, client)); err != nil {
		return nil, err
	}
	return askProfile(own, root, image.manifest)
}

// recordImage is an image to run, with its config. It is an oci.Image, with a content store that has nothing but the config.
type recordImage struct {
	content.Store
	name     string // by digest
	manifest digest.Digest
	config   ocispec.Descriptor
	bytes    []byte // of the config
}

func (i *recordImage) Config(context.Context) (ocispec.Descriptor, error) { return i.config, nil }

func (i *recordImage) ContentStore() content.Store { return i }

// ReaderAt reads the config.
func (i *recordImage) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return configReader{bytes.NewReader(i.bytes)}, nil
}

type configReader struct{ *bytes.Reader }

func (configReader) Close() error { return nil }

// maxDocument bounds an image's manifest and its config, bytes.
const maxDocument = 8 << 20

// imageToRecord asks the registry for the image ref and its config.
func imageToRecord(ctx context.Context, c config, ref string) (*recordImage, error) {
	logins := newSources(c, nil)
	defer logins.close()
	reg, err := newRegistry(c, logins)
	if err != nil {
		return nil, err
	}
	defer reg.Close()
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	i := &recordImage{}
	if i.manifest, err = resolve(ctx, reg, mountOptions{ref: ref}, platforms.Default()); err != nil {
		return nil, err
	}
	i.name = string(repo) + "@" + i.manifest.String()
	b, err := reg.Manifest(ctx, repo, i.manifest, maxDocument)
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	i.config = m.Config
	i.bytes, err = reg.Blob(ctx, repo, m.Config.Digest, maxDocument)
	return i, err
}

// mountForRecord mounts the root file system for a container of an image in dir, until unmount. Another process serves the image, because none may use a mount that it
// serves; root is where its files are.
func mountForRecord(ctx context.Context, dir, configFile, image string) (rootfs, root string, unmount func() error, err error) {
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"image", "upper", "work", "rootfs"} { // the container's root has upper's mode
		if err := errors.Join(os.Mkdir(at(name), 0o755), os.Chmod(at(name), 0o755)); err != nil {
			return "", "", nil, err
		}
	}
	program, err := os.Executable()
	if err != nil {
		return "", "", nil, err
	}
	serve := exec.Command(program, "mount", "--config", configFile, "--cache", at("root"), image, at("image"))
	if configFile == "" {
		serve.Args = append(serve.Args[:2], serve.Args[4:]...)
	}
	serve.Stderr = os.Stderr
	// What the terminal sends ends the container first.
	serve.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	out, err := serve.StdoutPipe()
	if err != nil {
		return "", "", nil, err
	}
	ended := make(chan error, 1)
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread
		defer runtime.UnlockOSThread()
		err := serve.Start()
		started <- err
		if err == nil {
			ended <- serve.Wait()
		}
	}()
	if err := <-started; err != nil {
		return "", "", nil, err
	}
	stop := func() error {
		serve.Process.Signal(unix.SIGTERM) // fails if it has ended
		return <-ended
	}
	defer context.AfterFunc(ctx, func() { serve.Process.Signal(unix.SIGTERM) })()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return "", "", nil, cmp.Or(ctx.Err(), stop())
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", at("image"), at("upper"), at("work"))
	if err := unix.Mount("overlay", at("rootfs"), "overlay", 0, options); err != nil {
		return "", "", nil, errors.Join(fmt.Errorf("mount overlay at %s: %w", at("rootfs"), err), stop())
	}
	return at("rootfs"), at("root"), func() error { return errors.Join(unix.Unmount(at("rootfs"), 0), stop()) }, nil
}

// removeNamespace removes the namespace, unless another run is in it.
func removeNamespace(ctx context.Context, client *containerd.Client) error {
	err := client.NamespaceService().Delete(ctx, recordNamespace)
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		err = nil
	}
	return err
}

// runForRecord runs a container of image on rootfs until it is ready. own is for what is done after ctx has ended.
func runForRecord(ctx, own context.Context, client *containerd.Client, image oci.Image, rootfs string, o recordOptions, ready *readiness) (err error) {
	id := "record-" + strconv.Itoa(os.Getpid())
	spec := []oci.SpecOpts{
		oci.WithCgroup("/" + id), // the default is in a directory of the namespace, which would stay
		oci.WithRootFSPath(rootfs), oci.WithImageConfigArgs(image, o.args), oci.WithHostNamespace("network"), oci.WithHostHostsFile, oci.WithHostResolvconf,
	}
	if len(o.args) > 0 {
		spec = append(spec, oci.WithProcessArgs(o.args...))
	}
	container, err := client.NewContainer(own, id, containerd.WithNewSpec(spec...))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, container.Delete(own)) }()
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
