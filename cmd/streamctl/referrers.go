package main

import (
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

func newListReferrers() *cobra.Command {
	var (
		image        target
		output       outputFlag
		artifactType string
		registry     string
	)
	cmd := &cobra.Command{
		Use:   "list-referrers REF",
		Short: "List what refers to an image and its platforms",
		Long: `List what refers to an image and its platforms.

The image is REF, or -n REGISTRY -t REPO:TAG, or, as with Azure's command, -r REGISTRY -n REPO:TAG.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := listReferrers(cmd, args, &image, artifactType)
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
	cmd.Flags().StringVarP(&registry, "registry", "r", "", "registry of the image that --name names, as with Azure's command")
	oneImage := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		// Azure's -n is the image here, and -r its registry: so it is with -r, and without -t.
		if registry != "" && image.image != "" {
			return usage("list-referrers: -r REGISTRY goes with -n REPO:TAG, and -n REGISTRY with -t REPO:TAG")
		}
		if image.image == "" && image.name != "" {
			image.image, image.name = image.name, registry
		}
		return oneImage(cmd, args)
	}
	output.add(cmd)
	cmd.Flags().StringVar(&artifactType, "artifact-type", "", "only referrers of this type")
	return cmd
}

func listReferrers(cmd *cobra.Command, args []string, image *target, artifactType string) ([]converter.Referrer, error) {
	c, n, err := image.atService(cmd, args, "platform")
	if err != nil {
		return nil, err
	}
	if c == nil {
		p, ref, platforms, err := image.open(cmd, args)
		if err != nil {
			return nil, err
		}
		return converter.ListReferrers(cmd.Context(), p, ref, platforms, artifactType)
	}
	info, err := c.Image(cmd.Context(), n.registry, n.repository, n.ref)
	if err != nil {
		return nil, err
	}
	return referrersIn(info, artifactType), nil
}

// referrersIn are the referrers that the service knows of an image, as converter.ListReferrers lists them.
func referrersIn(info service.ImageInfo, artifactType string) []converter.Referrer {
	list := []converter.Referrer{}
	add := func(subject digest.Digest, platform string, of []service.ReferrerInfo) {
		for _, r := range of {
			if artifactType == "" || r.ArtifactType == artifactType {
				list = append(list, converter.Referrer{Annotations: r.Annotations, ArtifactType: r.ArtifactType, Digest: r.Digest, MediaType: r.MediaType, Size: r.Size, Subject: subject, Platform: platform})
			}
		}
	}
	add(info.Digest, "", info.Referrers)
	for _, p := range info.Platforms {
		platform := p.Platform
		if p.Digest == info.Digest {
			platform = "" // no index
		}
		add(p.Digest, platform, p.Referrers)
	}
	return list
}

func newDelete() *cobra.Command {
	var (
		image  target
		output outputFlag
	)
	cmd := &cobra.Command{
		Use:   "delete REF",
		Short: "Delete the streaming artifacts of an image and its profiles; the image stays",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, n, err := image.atService(cmd, args, "platform")
			if err != nil {
				return err
			}
			var deleted []digest.Digest
			if c != nil {
				img, err := resolve(cmd.Context(), c, n)
				if err != nil {
					return err
				}
				deleted, err = c.DeleteArtifacts(cmd.Context(), img, "")
				return printDeleted(cmd, output, deleted, err)
			}
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			deleted, err = converter.DeleteArtifacts(cmd.Context(), p, ref, platforms)
			return printDeleted(cmd, output, deleted, err)
		},
	}
	image.add(cmd)
	output.add(cmd)
	return cmd
}

// printDeleted prints what was deleted, before err as well, and returns err.
func printDeleted(cmd *cobra.Command, output outputFlag, deleted []digest.Digest, err error) error {
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
}
