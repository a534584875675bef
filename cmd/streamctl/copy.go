package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// end is one end of a copy: a place, and an image's name there.
type end struct {
	place converter.Place
	ref   string // tag or digest; "" is the only image of a layout, or, of a destination, no tag
}

// copyFlags are what all copies have.
type copyFlags struct {
	registryFlags
	output outputFlag
	jobs   jobsFlag
}

func (f *copyFlags) add(cmd *cobra.Command) {
	f.registryFlags.add(cmd)
	f.output.add(cmd)
	f.jobs.add(cmd)
}

// copy copies an image with all its platforms and referrers to one end after the other: the bytes go to the first alone if the others are in its registry.
func (f *copyFlags) copy(cmd *cobra.Command, src end, dst ...end) error {
	var c converter.Copied
	for i, d := range dst {
		progress := newProgress(cmd.ErrOrStderr(), "copied")
		got, err := converter.Copy(cmd.Context(), src.place, src.ref, d.place, d.ref, converter.CopyOptions{Jobs: int(f.jobs), Progress: progress.report})
		progress.stop()
		if err != nil {
			return err
		}
		if i == 0 {
			c = got
		}
		src = end{d.place, got.Digest.String()}
	}
	if f.output.json() {
		return writeJSON(cmd.OutOrStdout(), c)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %d manifests, %d of them referrers, %d new blobs of %s\n", c.Digest, c.Manifests, c.Referrers, c.Blobs, size(c.Bytes))
	return err
}

func newCopy() *cobra.Command {
	var flags copyFlags
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy an image, all its platforms, and all their referrers",
		Long: `Copy an image, all its platforms, and all their referrers, between registries and OCI layouts.

All digests stay. What DST has already is not copied again. DST without a tag is :latest.`,
		Args: exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, ref, err := flags.open(args[0], loginFlags{})
			if err != nil {
				return err
			}
			dst, tag, err := flags.open(args[1], loginFlags{})
			if err != nil {
				return err
			}
			switch {
			case tag == "":
				tag = "latest"
			case strings.Contains(tag, ":"):
				return usage("cp: DST is named by a tag, not by a digest: %s", args[1])
			}
			return flags.copy(cmd, end{src, ref}, end{dst, tag})
		},
	}
	flags.add(cmd)
	return cmd
}

func newImport() *cobra.Command {
	var (
		flags        copyFlags
		host         hostFlags
		login        loginFlags
		source       string
		images       []string
		repositories []string
		force        bool
	)
	cmd := &cobra.Command{
		Use:   "import",
		Short: "Copy an image with its referrers into the registry",
		Long: `Copy an image, all its platforms, and all their referrers, into the registry.

It is named as --image says, or as at the source. A tag that names another image is not taken from that, unless --force is
given. -u and -p are for the source's registry; the registry that is copied to has docker's credentials.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if source == "" {
				return usage("import: what? --source HOST/REPO:TAG")
			}
			if err := login.read(cmd); err != nil {
				return err
			}
			place, ref, err := flags.open(source, login)
			if err != nil {
				return err
			}
			targets, err := importTargets(source, images, repositories)
			if err != nil {
				return err
			}
			registry, err := host.host()
			if err != nil {
				return err
			}
			var dst []end
			for _, t := range targets {
				d, _, err := flags.open(registry+"/"+t.name(), loginFlags{})
				if err != nil {
					return err
				}
				if !force {
					if err := mayName(cmd.Context(), end{place, ref}, end{d, t.ref}, registry+"/"+t.name()); err != nil {
						return err
					}
				}
				dst = append(dst, end{d, t.ref})
			}
			return flags.copy(cmd, end{place, ref}, dst...)
		},
	}
	host.add(cmd, "the new image")
	cmd.Flags().StringVar(&source, "source", "", "the image: HOST/REPO:TAG, HOST/REPO@DIGEST, or oci:DIR:TAG")
	cmd.Flags().StringArrayVarP(&images, "image", "t", nil, "what it is named in the registry: REPO:TAG (repeatable; default: as at the source)")
	cmd.Flags().StringArrayVar(&repositories, "repository", nil, "copy it into this repository without a tag (repeatable)")
	cmd.Flags().BoolVar(&force, "force", false, "take the tag from the image that it names now")
	login.add(cmd, "the source's registry")
	flags.add(cmd)
	return cmd
}

// destination is an image's name in a registry; ref "" is none.
type destination struct{ repository, ref string }

func (d destination) name() string {
	if d.ref == "" {
		return d.repository
	}
	return d.repository + ":" + d.ref
}

// importTargets says how the image is named in the registry.
func importTargets(source string, images, repositories []string) (list []destination, err error) {
	if len(images) == 0 && len(repositories) == 0 {
		if strings.HasPrefix(source, "oci:") {
			return nil, usage("import: an image of an OCI layout has no repository: give -t REPO:TAG")
		}
		_, repository, ref, err := splitImage(source)
		if err == nil && strings.Contains(ref, ":") {
			ref = "" // copied by its digest, as Azure's does with --repository
		}
		return []destination{{repository, ref}}, err
	}
	for _, image := range images {
		// Any host will do: the name below it is what counts.
		_, repository, tag, err := splitImage("localhost/" + image)
		if err != nil {
			return nil, usage("import: -t %s: want REPO:TAG", image)
		}
		if strings.Contains(tag, ":") {
			return nil, usage("import: an image is named by a tag, not by a digest: -t %s (--repository names none)", image)
		}
		list = append(list, destination{repository, tag})
	}
	for _, r := range repositories {
		list = append(list, destination{repository: r})
	}
	return list, nil
}

// mayName refuses to take a tag from another image.
func mayName(ctx context.Context, src, dst end, name string) error {
	if dst.ref == "" {
		return nil
	}
	there, _, err := dst.place.Manifest(ctx, dst.ref)
	if errors.Is(err, converter.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	here, _, err := src.place.Manifest(ctx, src.ref)
	if err == nil && here.Digest != there.Digest {
		err = fmt.Errorf("%s names another image, %s: give another -t, or --force", name, there.Digest)
	}
	return err
}
