package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newCopy() *cobra.Command {
	var (
		reg    registryFlags
		output outputFlag
		jobs   jobsFlag
	)
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy an image, all its platforms, and all their referrers",
		Long: `Copy an image, all its platforms, and all their referrers, between registries and OCI layouts.

All digests stay. What DST has already is not copied again. DST without a tag is :latest.`,
		Args: exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, ref, err := reg.open(args[0])
			if err != nil {
				return err
			}
			dst, tag, err := reg.open(args[1])
			if err != nil {
				return err
			}
			switch {
			case tag == "":
				tag = "latest"
			case strings.Contains(tag, ":"):
				return usage("cp: DST is named by a tag, not by a digest: %s", args[1])
			}
			progress := newProgress(cmd.ErrOrStderr(), "copied")
			c, err := converter.Copy(cmd.Context(), src, ref, dst, tag, converter.CopyOptions{Jobs: int(jobs), Progress: progress.report})
			progress.stop()
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), c)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %d manifests, %d of them referrers, %d new blobs of %s\n", c.Digest, c.Manifests, c.Referrers, c.Blobs, size(c.Bytes))
			return nil
		},
	}
	reg.add(cmd)
	output.add(cmd)
	jobs.add(cmd)
	return cmd
}
