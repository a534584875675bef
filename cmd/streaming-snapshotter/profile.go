package main

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

func newProfileCommand(configFile *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "What containers of an image read at their start",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var platform string
	export := &cobra.Command{
		Use:   "export REF",
		Short: "Print the record of the image's first start on this node, for `streamctl profile push`",
		Long: `Print what the daemon has recorded of the image's first start on this node: the chunks that were read, in the order of first use, as JSON.
While the start goes on, it is what was read until now. "streamctl profile push" makes a profile of one or more such records and attaches it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			b, err := exportProfile(cmd.Context(), c, args[0], platform)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			return err
		},
	}
	export.Flags().StringVar(&platform, "platform", "", "os/arch[/variant] of an index (default: this machine's)")
	cmd.AddCommand(export, newRecordCommand(configFile))
	return cmd
}

// exportProfile returns the record that the daemon has of the image ref. A reference by a platform manifest's digest asks no registry.
func exportProfile(ctx context.Context, c config, ref, platform string) ([]byte, error) {
	_, _, dgst, err := registryclient.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	var known error
	if dgst != "" {
		var b []byte
		if b, known = askProfile(ctx, c.Root, dgst); known == nil {
			return b, nil
		}
	}
	manifest, err := manifestOf(ctx, c, ref, platform)
	if err != nil {
		return nil, cmp.Or(known, err)
	}
	if manifest == dgst {
		return nil, known
	}
	return askProfile(ctx, c.Root, manifest)
}

// manifestOf asks the registry for the digest of the platform manifest that ref names.
func manifestOf(ctx context.Context, c config, ref, platform string) (digest.Digest, error) {
	matcher, err := platformMatcher(platform)
	if err != nil {
		return "", err
	}
	logins := newSources(c, nil)
	defer logins.close()
	reg, err := newRegistry(c, logins)
	if err != nil {
		return "", err
	}
	defer reg.Close()
	return resolve(ctx, reg, mountOptions{ref: ref, platform: platform}, matcher)
}

// newRegistry returns a client for what is asked of registries beside the images that are streamed.
func newRegistry(c config, logins sources) (*registryclient.Client, error) {
	return registryclient.New(registryclient.Options{
		HostsDir: c.HostsDir, Credentials: credentials.Chain(logins...), UserAgent: "streaming-snapshotter/" + version(),
	})
}

// platformMatcher matches a platform, this machine's if there is none given.
func platformMatcher(platform string) (platforms.MatchComparer, error) {
	if platform == "" {
		return platforms.Default(), nil
	}
	p, err := platforms.Parse(platform)
	if err != nil {
		return nil, fmt.Errorf("--platform: %w", err)
	}
	return platforms.Only(p), nil
}
