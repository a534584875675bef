package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/install"
)

// installFlags are what install and uninstall take.
type installFlags struct {
	root       string
	dryRun     bool
	containerd string
	restart    string
}

func (f *installFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "/", "where the host's root directory is, in a pod with the host's process IDs")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "print each step, with a diff of each file, and change nothing")
	cmd.Flags().StringVar(&f.containerd, "containerd", "", "containerd's socket (default: the configuration's)")
	cmd.Flags().StringVar(&f.restart, "restart-containerd", "", "shell command that restarts containerd (default: systemctl restart of its unit)")
}

// onHost runs the command on the host, if that is elsewhere; done then. config is a file that the host does not have; "" for none.
func (f *installFlags) onHost(cmd *cobra.Command, config string, args ...string) (done bool, err error) {
	if f.root == "/" {
		return false, nil
	}
	args = append([]string{cmd.Name()}, args...)
	if f.dryRun {
		args = append(args, "--dry-run")
	}
	for name, value := range map[string]string{"containerd": f.containerd, "restart-containerd": f.restart} {
		if value != "" {
			args = append(args, "--"+name, value)
		}
	}
	if config == "" {
		return true, install.On(cmd.Context(), f.root, args)
	}
	if _, err := loadConfig(config); err != nil { // an error that names this file
		return true, err
	}
	at, err := os.Open(config)
	if err != nil {
		return true, err
	}
	defer at.Close()
	return true, install.On(cmd.Context(), f.root, append(args, "--config", "/proc/self/fd/3"), at)
}

// handlerName is what Kubernetes takes as the handler of a RuntimeClass.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

func newInstallCommand(configFile *string) *cobra.Command {
	var f installFlags
	var stream []string
	var handler string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install or upgrade this program, its units and its part of containerd's configuration on this host",
		Long: `Puts this program, its units and, where there is none, its configuration on the host, and itself into containerd's configuration: in the form that fits
containerd's version and its files, and after containerd's own program has said what these then come to. Restarts containerd, if its configuration has changed; containers go on.
On any failure, or an interrupt, all files are put back as they were. Run again with a newer program it is the upgrade.

The host's configuration, ` + defaultConfig + `, stays as it is, but --config FILE replaces it. With --runtime NAME containerd gets a runtime handler of
that name, like its default one, and the snapshotter serves the pods that ask for it, by a RuntimeClass, and no others.

Without systemd the daemon is run below supervise, and --restart-containerd has to say how containerd is restarted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if *configFile != "" && len(stream) > 0 {
				return errors.New("--stream is for a configuration that is made: the one that --config gives says itself what is streamed")
			}
			if handler != "" && !handlerName.MatchString(handler) {
				return fmt.Errorf("--runtime %q: want a name of lower-case letters, digits and hyphens", handler)
			}
			var args []string
			for _, s := range stream {
				args = append(args, "--stream", s)
			}
			if handler != "" {
				args = append(args, "--runtime", handler)
			}
			if done, err := f.onHost(cmd, *configFile, args...); done {
				return err
			}
			return install.Install(cmd.Context(), func() (install.Options, error) {
				o, err := installOptions(f, *configFile, stream, cmd.OutOrStdout())
				o.Runtime = handler
				return o, err
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&handler, "runtime", "", "make a runtime handler of this name, and serve its pods alone (default: all that CRI pulls)")
	cmd.Flags().StringArrayVar(&stream, "stream", nil, "repositories to stream from, HOST/REPOSITORY with globs, for a configuration that is made; may be repeated")
	return cmd
}

func newUninstallCommand(configFile *string) *cobra.Command {
	var f installFlags
	var retire, dropImages, discardChanges bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take away what install has put on this host",
		Long: `Puts back every file that install has replaced, removes what it has added, restarts containerd without the snapshotter, and removes the snapshotter's own files.
Refuses while there are containers with files of the snapshotter; with --retire it then has nothing new use the snapshotter, so that all of them go in time. Images are unpacked for containerd's own snapshotter before, and what was never downloaded is fetched: they run as before.
On any failure, or an interrupt, all files are put back as they were.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if *configFile != "" {
				return errors.New("the units know one configuration file, " + defaultConfig + ": --config cannot be given")
			}
			var args []string
			if retire {
				args = append(args, "--retire")
			}
			if dropImages {
				args = append(args, "--drop-images")
			}
			if discardChanges {
				args = append(args, "--discard-changes")
			}
			if done, err := f.onHost(cmd, "", args...); done {
				return err
			}
			return install.Uninstall(cmd.Context(), func() (install.Options, error) {
				o, err := installOptions(f, "", nil, cmd.OutOrStdout())
				o.Retire, o.DropImages, o.DiscardChanges = retire, dropImages, discardChanges
				return o, err
			})
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&retire, "retire", false, "while there are containers with files of the snapshotter, have nothing new use it, and fail; run again when they are gone, it uninstalls")
	cmd.Flags().BoolVar(&dropImages, "drop-images", false, "go on if images cannot be fetched: they have to be pulled again")
	cmd.Flags().BoolVar(&discardChanges, "discard-changes", false, "go on if files that install has written were changed since")
	return cmd
}

// installOptions are for the host that this process runs on. configFile is the configuration that it is to have; "" for its own, or one that is made.
func installOptions(f installFlags, configFile string, stream patterns, out io.Writer) (install.Options, error) {
	c, err := loadConfig(configFile)
	if err != nil {
		return install.Options{}, err
	}
	var text []byte
	if configFile != "" {
		if text, err = os.ReadFile(configFile); err != nil {
			return install.Options{}, err
		}
	} else if _, err := os.Stat(defaultConfig); errors.Is(err, os.ErrNotExist) {
		c.Stream, c.Containerd = append(patterns{}, stream...), cmp.Or(f.containerd, c.Containerd)
		if err := c.validate(); err != nil {
			return install.Options{}, err
		}
		keys := map[string]any{"stream": c.Stream}
		if c.Containerd != defaults().Containerd {
			keys["cri_containerd"] = c.Containerd
		}
		if text, err = toml.Marshal(keys); err != nil {
			return install.Options{}, err
		}
		text = append([]byte("# `streaming-snapshotter config` prints all keys.\n"), text...)
	} else if len(stream) > 0 && !slices.Equal(stream, c.Stream) {
		fmt.Fprintf(out, "%s is there and stays as it is, with stream = %q\n", defaultConfig, []string(c.Stream))
	}
	asks := c.Containerd
	c.Containerd = cmp.Or(f.containerd, c.Containerd)
	o := install.Options{
		Program: "/proc/self/exe", ConfigFile: defaultConfig, Config: text, Replace: configFile != "", Address: c.Address, Root: c.Root, CRIProxy: c.CRIProxy, DryRun: f.dryRun, Out: out, Socket: c.Containerd, Asks: asks, Fetch: fetchBlobs(c, blobIdle),
		Containerd: func() (install.Containerd, error) { return runningContainerd(c.Containerd) },
		Loaded: func(ctx context.Context) ([]string, error) {
			loaded, err := (&containerdReport{Address: c.Containerd}).ask(ctx)
			if errors.Is(err, os.ErrNotExist) {
				err = fmt.Errorf("containerd does not answer at %s (`--containerd` takes another socket)", c.Containerd)
			}
			return loaded, err
		},
		Ready: func(ctx context.Context) error {
			s, err := askStatusOf(ctx, c.Root)
			if err == nil && s.SafeMode != "" {
				err = fmt.Errorf("the daemon is in safe mode: %s", s.SafeMode)
			}
			if err == nil && !reaches(c.Address) {
				err = fmt.Errorf("nobody answers at %s", c.Address)
			}
			if err == nil && c.CRIProxy != "" {
				err = servesCRI(ctx, c.CRIProxy)
			}
			return err
		},
	}
	if f.restart != "" {
		o.Restart = []string{"/bin/sh", "-c", f.restart}
	}
	return o, nil
}

// servesCRI asks for containerd's image service at a socket: what a kubelet has there.
func servesCRI(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := runtime.NewImageServiceClient(conn).ImageFsInfo(ctx, &runtime.ImageFsInfoRequest{}); err != nil {
		return fmt.Errorf("containerd's image service at %s (`cri_proxy`): %w", socket, err)
	}
	return nil
}

// runningContainerd says what serves the socket at address.
func runningContainerd(address string) (c install.Containerd, err error) {
	pid := peerOf(address)
	if pid <= 0 {
		return c, fmt.Errorf("containerd has to run, and does not answer at %s (`--containerd` takes another socket)", address)
	}
	if c.Program, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
		return c, err
	}
	c.Program = strings.TrimSuffix(c.Program, " (deleted)") // an upgrade has replaced it: the next start takes that
	c.Config = startedWith(pid, "/etc/containerd/config.toml")
	c.Unit = "containerd.service"
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err == nil {
		for part := range strings.SplitSeq(strings.TrimSpace(string(b)), "/") {
			if strings.HasSuffix(part, ".service") {
				c.Unit = part
			}
		}
	}
	return c, nil
}
