package main

import (
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newListReferrers() *cobra.Command {
	var (
		image        imageFlags
		output       outputFlag
		artifactType string
	)
	cmd := &cobra.Command{
		Use:   "list-referrers REF",
		Short: "List what refers to an image and its platforms",
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			list, err := converter.ListReferrers(cmd.Context(), p, ref, platforms, artifactType)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), map[string]any{"manifests": list})
			}
			t := newTable(cmd.OutOrStdout())
			fmt.Fprintln(t, "DIGEST\tTYPE\tSIZE\tSUBJECT\tPLATFORM")
			for _, r := range list {
				fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", r.Digest, r.ArtifactType, r.Size, short(r.Subject), r.Platform)
			}
			return t.Flush()
		},
	}
	image.add(cmd)
	output.add(cmd)
	cmd.Flags().StringVar(&artifactType, "artifact-type", "", "only referrers of this type")
	return cmd
}

func newDelete() *cobra.Command {
	var (
		image  imageFlags
		output outputFlag
	)
	cmd := &cobra.Command{
		Use:   "delete REF",
		Short: "Delete the streaming artifacts of an image and its profiles; the image stays",
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			deleted, err := converter.DeleteArtifacts(cmd.Context(), p, ref, platforms)
			if output.json() {
				if deleted == nil {
					deleted = []digest.Digest{}
				}
				if werr := writeJSON(cmd.OutOrStdout(), map[string]any{"deleted": deleted}); err == nil {
					err = werr
				}
				return err
			}
			for _, d := range deleted {
				fmt.Fprintln(cmd.OutOrStdout(), "deleted", d)
			}
			return err
		},
	}
	image.add(cmd)
	output.add(cmd)
	return cmd
}
