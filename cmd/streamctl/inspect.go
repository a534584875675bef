package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newInspect() *cobra.Command {
	var (
		image  imageFlags
		output outputFlag
	)
	cmd := &cobra.Command{
		Use:   "inspect REF",
		Short: "Describe the streaming artifacts of an image",
		Long: `Describe the streaming artifacts of an image: layers, chunks, sizes, their ratio to the source, profiles, and signatures as they
describe themselves.

Only manifests and indexes are read; verify reads everything.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			list, err := converter.Inspect(cmd.Context(), p, ref, platforms, describeSignature)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), map[string]any{"artifacts": list})
			}
			for i, a := range list {
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := printInspection(cmd.OutOrStdout(), a); err != nil {
					return err
				}
			}
			return nil
		},
	}
	image.add(cmd)
	output.add(cmd)
	return cmd
}

func printInspection(w io.Writer, a converter.Inspection) error {
	fmt.Fprintf(w, "artifact  %s\nsubject   %s\nconfig    %s\nplatform  %s\n", a.Artifact, a.Subject, a.Config, a.Platform)
	t := newTable(w)
	fmt.Fprintln(t, "LAYER\tSOURCE\tSIZE\tARTIFACT\tSIZE\tRATIO\tINDEX\tTAR\tHEADERS\tCHUNKS")
	var headers int64
	for i, l := range a.Layers {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", i, short(l.Source), size(l.SourceSize), short(l.Digest), size(l.Size),
			ratio(l.Size, l.SourceSize), size(l.IndexSize), size(l.TarSize), size(l.HeadersSize), l.Chunks)
		headers += l.HeadersSize
	}
	fmt.Fprintf(t, "all\t\t%s\t\t%s\t%s\t%s\t%s\t%s\t%d\n", size(a.Source), size(a.Size), ratio(a.Size, a.Source), size(a.IndexSize),
		size(a.TarSize), size(headers), a.Chunks)
	if err := t.Flush(); err != nil {
		return err
	}
	for _, s := range a.Signatures {
		fmt.Fprintln(w, "signature", printSignature(s, false))
	}
	if len(a.Profiles) == 0 {
		return nil
	}
	fmt.Fprintln(t, "PROFILE\tDIGEST\tCREATED\tCHUNKS\tSIZE")
	for _, p := range a.Profiles {
		created := "-"
		if p.Created != nil {
			created = p.Created.Format(time.RFC3339)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", p.Source, short(p.Digest), created, p.Chunks, size(p.Size))
	}
	return t.Flush()
}
