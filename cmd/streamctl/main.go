// Command streamctl makes streaming artifacts and looks after them: it converts images of registries and OCI layouts,
// lists, inspects, verifies and deletes their artifacts, and copies images together with their referrers. docs/cli.md
// describes it. It needs no daemon, no root and no containerd: all it does is in package converter.
//
// `streamctl serve` is the conversion service (package serve), and the other commands ask one instead of doing the work
// themselves if they are told which.
//
// Results go to standard output, everything else to standard error. It exits with 0 when it did what it was asked, with 1
// when it could not or when verify found a difference, and with 2 when it was called wrongly.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	_ "golang.org/x/crypto/x509roots/fallback" // its image has no certificates of a system
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends the work in order, a second one ends the process.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// usageError is a wrong call.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// run runs streamctl with its arguments, without its name, and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	msg := strings.Join(strings.Fields(err.Error()), " ")
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		msg = "interrupted"
	}
	var u usageError
	if errors.As(err, &u) {
		fmt.Fprintf(stderr, "streamctl: %s (see streamctl help)\n", msg)
		return 2
	}
	fmt.Fprintf(stderr, "streamctl: %s\n", msg)
	return 1
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "streamctl",
		Short:         "Make streaming artifacts of images, and look after them",
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				return usage("there is no command %q; is it %q?", args[0], s[0])
			}
			return usage("there is no command %q", args[0])
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if cmd == root {
			return usageError{err}
		}
		return usageError{fmt.Errorf("%s: %w", cmd.Name(), err)}
	})
	root.AddCommand(newCreate(), newShow(), newUpdate(), newOperation(), newListReferrers(), newInspect(), newVerify(), newSign(), newDelete(), newImport(), newCopy(), newProfile(), newConfigure(), newServe(),
		newVersion())
	completions(root)
	return root
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "streamctl %s\n", version())
			return err
		},
	}
}

// version is the module's version, or the commit that it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown)"
	}
	return info.Main.Version
}

// exactly is cobra.ExactArgs with a usageError.
func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usage("%s takes %d arguments, not %d: streamctl %s", cmd.Name(), n, len(args), cmd.Use)
		}
		return nil
	}
}
