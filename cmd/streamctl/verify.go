package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newVerify() *cobra.Command {
	var (
		image  target
		output outputFlag
		jobs   jobsFlag
	)
	cmd := &cobra.Command{
		Use:   "verify REF",
		Short: "Prove that the streaming artifacts of an image are that image",
		Long: `Prove that the streaming artifacts of an image are that image, by reading them whole.

The first difference is named on standard error, and the exit status is 1. With --server the service reads them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			done, err := verify(cmd, args, &image, jobs)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), map[string]any{"verified": done})
			}
			for _, v := range done {
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %d layers, %s, are those of %s\n", v.Platform, v.Artifact, v.Layers, size(v.Bytes), v.Subject)
				for _, p := range v.Profiles {
					fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %s profile, %d chunks, %s, are the artifact's\n", v.Platform, p.Digest, p.Source, p.Chunks, size(p.Size))
				}
			}
			return nil
		},
	}
	image.add(cmd)
	output.add(cmd)
	jobs.add(cmd)
	return cmd
}

func verify(cmd *cobra.Command, args []string, image *target, jobs jobsFlag) ([]converter.Verified, error) {
	c, n, err := image.atService(cmd, args, "platform", "jobs")
	if err != nil {
		return nil, err
	}
	if c != nil {
		img, err := resolve(cmd.Context(), c, n)
		if err != nil {
			return nil, err
		}
		return c.Verify(cmd.Context(), img)
	}
	p, ref, platforms, err := image.open(cmd, args)
	if err != nil {
		return nil, err
	}
	progress := newProgress(cmd.ErrOrStderr(), "verified")
	defer progress.stop()
	return converter.Verify(cmd.Context(), p, ref, converter.VerifyOptions{Platforms: platforms, Jobs: int(jobs), Progress: progress.report})
}
