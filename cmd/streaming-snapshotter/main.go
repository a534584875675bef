// Command streaming-snapshotter is the node daemon: a containerd proxy snapshotter that mounts images from their streaming
// artifacts. This package is configuration and wiring; the work is done by the packages it plugs together.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

// defaultConfig is read if it is there and --config is not given.
const defaultConfig = "/etc/streaming-snapshotter/config.toml"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)                                   // a second signal kills, whatever the first is waiting for
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil))) // as the daemon's
	if cmd, err := newCommand().ExecuteContextC(ctx); err != nil {
		var status exitStatus
		if errors.As(err, &status) {
			os.Exit(int(status))
		}
		if errors.Is(err, context.Canceled) && ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "streaming-snapshotter:", plain.Text(err.Error(), "\n"))
		if cmd.Name() == "check" {
			os.Exit(int(checkUnknown))
		}
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	var configFile string
	root := &cobra.Command{
		Use:           "streaming-snapshotter",
		Short:         "Streams container images to containerd from their streaming artifacts",
		SilenceErrors: true,
		Version:       version(),
		// Usage is the answer to wrong arguments, not to what fails later.
		PersistentPreRun: func(cmd *cobra.Command, _ []string) { cmd.SilenceUsage = true },
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.PersistentFlags().StringVar(&configFile, "config", "", "configuration file (default "+defaultConfig+" if it exists)")
	root.AddCommand(
		&cobra.Command{
			Use:   "serve",
			Short: "Serve the snapshots service to containerd",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				st, err := fdstore.Open()
				if err != nil {
					return err
				}
				if name := os.Getenv(logEnv); name != "" {
					stop, err := keepLog(name, false)
					if err != nil {
						return err
					}
					defer stop()
				}
				return serve(cmd.Context(), configFile, st, safeFor)
			},
		},
		&cobra.Command{
			Use:   "config",
			Short: "Print the effective configuration",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := loadConfig(configFile)
				if err != nil {
					return err
				}
				return c.write(cmd.OutOrStdout())
			},
		},
		newCheckCommand(&configFile),
		newFetchCommand(&configFile),
		newMountCommand(&configFile),
		newStatusCommand(&configFile),
		newInstallCommand(&configFile),
		newUninstallCommand(&configFile),
		newPauseCommand(&configFile),
		newQuarantineCommand(&configFile),
		newResumeCommand(&configFile),
		newProfileCommand(&configFile),
		newSuperviseCommand(),
		newWatchCommand(&configFile),
		&cobra.Command{
			Use:   "version",
			Short: "Print the version",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "streaming-snapshotter %s\n", version())
				return err
			},
		},
	)
	return root
}

func newMountCommand(configFile *string) *cobra.Command {
	var o mountOptions
	cmd := &cobra.Command{
		Use:   "mount REF DIR",
		Short: "Mount an image's artifact at DIR, read-only, nosuid and nodev, without containerd, until interrupted",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			st, err := fdstore.Open()
			if err != nil {
				return err
			}
			o.ref, o.dir, o.out = args[0], args[1], cmd.OutOrStdout()
			return mountImage(cmd.Context(), c, o, st)
		},
	}
	cmd.Flags().StringVar(&o.platform, "platform", "", "os/arch[/variant] of an index (default: this machine's)")
	cmd.Flags().StringVar(&o.cache, "cache", "", "directory that keeps what was fetched (default: a temporary one)")
	cmd.Flags().BoolVar(&o.untrusted, "untrusted", false, "whatever the trust policy of its repository is")
	cmd.Flags().StringVar(&o.mode, "mount-mode", "", "auto, file, loop or tree (default: the configuration's)")
	return cmd
}

func newSuperviseCommand() *cobra.Command {
	var socket, logTo string
	cmd := &cobra.Command{
		Use:   "supervise [-- COMMAND ...]",
		Short: "Keep the mounts and the socket of a command of this program beyond its life, and run it again when it ends",
		Long: `Keeps the mounts, and the socket, of "serve" or "mount" beyond its life, and runs it again when it ends, as in

  streaming-snapshotter supervise -- serve
  streaming-snapshotter supervise -- mount REF DIR

Who reads meanwhile waits. SIGHUP ends the command and runs it again, with the program and the configuration that are there then. SIGTERM and
SIGINT end both, and unmount everything: containers that use streamed images read no file from then on that they have not read yet.
Without a command it only keeps descriptors, for programs that have the path given by --socket in $` + fdstore.KeeperEnv + `.
If systemd keeps descriptors for it, it may itself be restarted, and unmounts nothing.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("config") {
				return errors.New("supervise reads no configuration: give --config to the command, as in supervise -- serve --config FILE")
			}
			return supervise(cmd.Context(), socket, logTo, args)
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "where to keep descriptors for others (default: a temporary one, for the command)")
	cmd.Flags().StringVar(&logTo, "log", "", "file to whose end the output goes, which then has 16 MiB at most, and FILE.1 as much of what was before (default: standard error)")
	return cmd
}

// version is the module's, as the go command recorded it.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return b.Main.Version
	}
	return "unknown"
}
