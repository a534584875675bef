package main

import (
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newVerify() *cobra.Command {
	var (
		image  target
		output outputFlag
		jobs   jobsFlag
		judge  judgeFlags
		of     string
	)
	cmd := &cobra.Command{
		Use:   "verify REF",
		Short: "Prove that the streaming artifacts of an image are that image",
		Long: `Prove that the streaming artifacts of an image are that image, by reading them whole.

The first difference is named on standard error, and the exit status is 1. With --server the service reads them.

What is proven is that the artifact's bytes are those of the image whose digest is printed, and nothing has to be trusted for
it but that digest: a REF with a tag is what the registry says now, REPO@DIGEST is the image itself. --subject says it of
an artifact that is named by its own digest.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			done, err := verify(cmd, args, &image, jobs, judge, of)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), map[string]any{"verified": done})
			}
			for _, v := range done {
				in := ""
				if v.Image != "" && v.Image != v.Subject {
					in = " in " + v.Image.String()
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %d layers, %s, are those of %s%s\n", v.Platform, v.Artifact, v.Layers, size(v.Bytes), v.Subject, in)
				for _, s := range v.Signatures {
					fmt.Fprintf(cmd.OutOrStdout(), "%s signature %s\n", v.Platform, printSignature(s, judge.signed))
				}
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
	judge.add(cmd)
	cmd.Flags().StringVar(&of, "subject", "", "digest of the image that the artifacts must be of, or of an index that has it")
	return cmd
}

func verify(cmd *cobra.Command, args []string, image *target, jobs jobsFlag, judge judgeFlags, of string) ([]converter.Verified, error) {
	if !judge.signed {
		for _, name := range []string{"scope", "notation-dir", "notation-plugin-dir"} {
			if cmd.Flags().Changed(name) {
				return nil, usage("verify: --%s goes with --signed", name)
			}
		}
	}
	if of != "" && digest.Digest(of).Validate() != nil {
		return nil, usage("verify: --subject %q is no digest", of)
	}
	c, n, err := image.atService(cmd, args, "platform", "jobs", "signed", "scope", "notation-dir", "notation-plugin-dir", "subject")
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
	judged, err := judge.judge(p)
	if err != nil {
		return nil, err
	}
	progress := newProgress(cmd.ErrOrStderr(), "verified")
	defer progress.stop()
	done, err := converter.Verify(cmd.Context(), p, ref, converter.VerifyOptions{Platforms: platforms, Jobs: int(jobs), Progress: progress.report,
		Image: digest.Digest(of), Judge: judged, Signed: judge.signed})
	if err == nil && of == "" && digest.Digest(ref).Validate() != nil {
		warn(cmd, []string{fmt.Sprintf("the image was named without its digest: that it is the one proven here is the word of %s", p)})
	}
	return done, err
}
