package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

func showSettings(cmd *cobra.Command, image *target, repository string, output outputFlag) error {
	c, err := image.need(cmd)
	if err != nil {
		return err
	}
	host, err := image.host()
	if err != nil {
		return err
	}
	s, err := c.Settings(cmd.Context(), host, repository)
	if err != nil {
		return err
	}
	return printSettings(cmd.OutOrStdout(), s, "", output)
}

func newUpdate() *cobra.Command {
	var (
		remote     serviceFlags
		host       hostFlags
		repository string
		enable     switchFlag
		existing   bool
		rules      rulesFlags
		output     outputFlag
	)
	cmd := &cobra.Command{
		Use:   "update",
		Short: "Say whether the conversion service converts what is pushed to a repository",
		Long: `Say whether the conversion service converts what is pushed to a repository, and which of it.

REPO is a name, or a pattern: a star stands for any characters. Images that were pushed before are not converted unless
--existing is given. Artifacts stay when streaming is turned off.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if repository == "" || enable == "" {
				return usage("update: which repository, and what? --repository REPO --enable-streaming true|false")
			}
			if existing && !enable.on() {
				return usage("update: --existing converts what is there, and goes with --enable-streaming true")
			}
			c, err := remote.need(cmd)
			if err != nil {
				return err
			}
			s := service.Settings{Repository: repository, Active: enable.on()}
			if s.Registry, err = host.host(); err != nil {
				return err
			}
			if s.Rules, err = rules.over(cmd, func() (service.Settings, error) { return c.Settings(cmd.Context(), s.Registry, repository) }, repository); err != nil {
				return err
			}
			if s, err = c.SetSettings(cmd.Context(), s, existing); err != nil {
				return err
			}
			return printSettings(cmd.OutOrStdout(), s, service.Succeeded, output)
		},
	}
	host.add(cmd, "the repository")
	cmd.Flags().StringVar(&repository, "repository", "", "the repository, or a pattern as in 'team/*'")
	cmd.Flags().Var(&enable, "enable-streaming", "whether what is pushed is converted")
	cmd.Flags().BoolVar(&existing, "existing", false, "convert what was pushed before, too")
	rules.add(cmd)
	remote.add(cmd)
	output.add(cmd)
	return cmd
}

// switchFlag is --enable-streaming: "true" or "false", "" when it is not given. Azure's examples have True.
type switchFlag string

func (f *switchFlag) String() string { return string(*f) }
func (f *switchFlag) Type() string   { return "true|false" }
func (f *switchFlag) on() bool       { return *f == "true" }

func (f *switchFlag) Set(s string) error {
	b, err := strconv.ParseBool(strings.ToLower(s))
	if err != nil {
		return usage("%q is neither true nor false", s)
	}
	*f = switchFlag(strconv.FormatBool(b))
	return nil
}

// rulesFlags are the rules of a repository's settings. Those that are not given stay as they are.
type rulesFlags struct {
	platforms []string
	minSize   string
	keep      int
}

func (f *rulesFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.platforms, "platform", nil, "convert only this platform of pushed images (repeatable); \"\" is all")
	cmd.Flags().StringVar(&f.minSize, "min-size", "", "convert only images whose compressed layers have so many bytes, as in 50MiB; 0 is all")
	cmd.Flags().IntVar(&f.keep, "keep", 0, "keep the artifacts of so many of the newest tags; 0 is all")
}

// over returns the rules that repository has by its own settings, with those that are given.
func (f *rulesFlags) over(cmd *cobra.Command, current func() (service.Settings, error), repository string) (service.Rules, error) {
	s, err := current()
	if err != nil {
		return service.Rules{}, err
	}
	r := s.Rules
	if s.Repository != repository {
		r = service.Rules{} // those of a pattern, which go on counting for others
	}
	if cmd.Flags().Changed("platform") {
		r.Platforms = nil
		for _, p := range f.platforms {
			if p != "" {
				r.Platforms = append(r.Platforms, p)
			}
		}
	}
	if cmd.Flags().Changed("min-size") {
		if r.MinSize, err = tomlfile.ParseSize(f.minSize); err != nil {
			return r, usage("--min-size: %w", err)
		}
	}
	if cmd.Flags().Changed("keep") {
		if r.Keep = f.keep; f.keep < 0 {
			return r, usage("--keep %d: want 0 or more", f.keep)
		}
	}
	return r, nil
}

// settingsResult is a repository's settings as Azure's commands print them, and what only ours has.
type settingsResult struct {
	service.AzureSettings
	Registry   string        `json:"registry"`
	Repository string        `json:"repository"`
	Rules      service.Rules `json:"rules,omitzero"`
	Changed    time.Time     `json:"changed,omitzero"`
	By         string        `json:"by,omitempty"`
}

// printSettings prints settings; status is that of their change, "" for none.
func printSettings(w io.Writer, s service.Settings, status service.State, output outputFlag) error {
	if output.json() {
		return writeJSON(w, settingsResult{s.Azure(status), s.Registry, s.Repository, s.Rules, s.Changed, s.By})
	}
	t := newTable(w)
	fmt.Fprintln(t, "REPOSITORY\tSTREAMING\tPLATFORMS\tMIN SIZE\tKEEP\tCHANGED\tBY")
	state := "Inactive"
	if s.Active {
		state = "Active"
	}
	keep := "all"
	if s.Rules.Keep > 0 {
		keep = strconv.Itoa(s.Rules.Keep)
	}
	fmt.Fprintf(t, "%s/%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Registry, s.Repository, state, dash(strings.Join(s.Rules.Platforms, ",")), size(s.Rules.MinSize), keep, dash(when(s.Changed)), dash(s.By))
	return t.Flush()
}
