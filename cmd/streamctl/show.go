package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

func newShow() *cobra.Command {
	var (
		image      target
		repository string
		output     outputFlag
		starts     bool
	)
	cmd := &cobra.Command{
		Use:   "show [REF]",
		Short: "Show an image with its platforms and artifacts, or the settings of a repository",
		Long: `Show an image (REF, or -n REGISTRY -t REPO:TAG) with its platforms, what refers to them and what of them can be streamed;
with --starts, how long its starts took on nodes, as they have reported to the conversion service;
or, with -n REGISTRY --repository REPO, whether the conversion service converts what is pushed there.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if repository != "" {
				return showSettings(cmd, &image, repository, output)
			}
			info, err := describe(cmd, args, &image)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), info)
			}
			if starts {
				return printStarts(cmd.OutOrStdout(), info)
			}
			return printImage(cmd.OutOrStdout(), info)
		},
	}
	image.add(cmd)
	oneImage := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if repository == "" {
			return oneImage(cmd, args)
		}
		if len(args) > 0 || image.image != "" || len(image.platforms) > 0 || starts {
			return usage("show: --repository REPO shows settings, and an image shows itself: one of both")
		}
		return nil
	}
	cmd.Flags().StringVar(&repository, "repository", "", "show the settings of this repository, or of a pattern as in 'team/*'")
	cmd.Flags().BoolVar(&starts, "starts", false, "how long its starts took, as nodes have reported to the conversion service")
	output.add(cmd)
	return cmd
}

// describe asks the service or the registry for an image.
func describe(cmd *cobra.Command, args []string, image *target) (service.ImageInfo, error) {
	c, n, err := image.atService(cmd, args, "platform")
	if err != nil {
		return service.ImageInfo{}, err
	}
	if c != nil {
		return c.Image(cmd.Context(), n.registry, n.repository, n.ref)
	}
	if err := there(cmd, "starts"); err != nil {
		return service.ImageInfo{}, err
	}
	p, ref, _, err := image.open(cmd, args)
	if err != nil {
		return service.ImageInfo{}, err
	}
	n = named{registry: p.String()}
	if len(args) == 0 || !strings.HasPrefix(args[0], "oci:") {
		if n, err = image.named(args); err != nil {
			return service.ImageInfo{}, err
		}
	}
	info, err := service.Describe(cmd.Context(), p, service.Image{Registry: n.registry, Repository: n.repository}, ref)
	if len(image.platforms) > 0 {
		info.Platforms = slices.DeleteFunc(info.Platforms, func(p service.PlatformInfo) bool { return !wanted(image.platforms, p.Platform) })
	}
	return info, err
}

// wanted says whether one of the platforms asked for is the platform; one without a variant is any of its variants.
func wanted(asked []string, platform string) bool {
	return slices.ContainsFunc(asked, func(p string) bool { return p == platform || strings.HasPrefix(platform, p+"/") })
}

func printImage(w io.Writer, info service.ImageInfo) error {
	fmt.Fprintf(w, "image     %s\n", info.Image)
	if info.Tag != "" {
		fmt.Fprintf(w, "tag       %s\n", info.Tag)
	}
	fmt.Fprintf(w, "type      %s\n", info.MediaType)
	if op := info.Last; op != nil {
		fmt.Fprintf(w, "operation %s %s, %s\n", op.ID, op.State, progressOf(*op))
	}
	t := newTable(w)
	fmt.Fprintln(t, "PLATFORM\tDIGEST\tLAYERS\tSIZE\tSTREAMING\tSIZE\tINDEX\tPROFILE\tREFERRERS")
	for _, p := range info.Platforms {
		artifact, bytes, index, profile := "-", "-", "-", "-"
		if s := p.Streaming; s != nil {
			artifact, bytes, index, profile = short(s.Artifact), size(s.Size), size(s.Index), dash(s.Profile)
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%d\n", dash(p.Platform), short(p.Digest), len(p.Layers), size(p.Size), artifact, bytes, index, profile, len(p.Referrers))
	}
	return t.Flush()
}

// printStarts prints a row for each artifact and profile that nodes have started the image with: those of now first. Times are seconds.
func printStarts(w io.Writer, info service.ImageInfo) error {
	t := newTable(w)
	fmt.Fprintln(t, "PLATFORM\tNOW\tPROFILE\tARTIFACT\tSTARTS\tPULL\tREADS\tP90\tREADY\tP90\tWAITS FOR\tLAST")
	seconds := func(known int64, s float64) string {
		if known == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f", s)
	}
	rows := 0
	for _, p := range info.Platforms {
		if p.Starts == nil {
			continue
		}
		for _, v := range p.Starts.Variants {
			now := "-"
			if v.Current {
				now = "yes"
			}
			rows++
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", dash(p.Platform), now, v.Profile, short(v.Artifact), v.Starts, seconds(v.Pull.Count, v.Pull.Median),
				seconds(v.Reads.Count, v.Reads.Median), seconds(v.Reads.Count, v.Reads.P90), seconds(v.Ready.Count, v.Ready.Median), seconds(v.Ready.Count, v.Ready.P90), size(v.Missed), v.Last.UTC().Format(time.RFC3339))
		}
	}
	if rows == 0 {
		fmt.Fprintf(w, "No node has reported a start of %s.\n", info.Image)
		return nil
	}
	return t.Flush()
}
