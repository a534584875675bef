package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

func newProfile() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "What containers of an image read at their start",
		Args:  exactly(0),
		RunE:  func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newProfilePush())
	return cmd
}

func newProfilePush() *cobra.Command {
	var (
		registry registryFlags
		jobs     jobsFlag
		output   outputFlag
		source   string
	)
	cmd := &cobra.Command{
		Use:   "push REF FILE...",
		Short: "Make a profile of records of an image's start, and attach it",
		Long: `Make a profile of records of an image's start, and attach it in place of the profile of the same source that was there.

A FILE is what "streaming-snapshotter profile export" prints on a node that has started the image. Several are merged: the chunks that at least half
of them have, in the order of their mean place.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage("push takes an image and files: streamctl profile %s", cmd.Use)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if source != artifact.ProfileLearned && source != artifact.ProfileRecorded {
				return usage("--source %s: want %s or %s", source, artifact.ProfileLearned, artifact.ProfileRecorded)
			}
			var records []*artifact.Profile
			for _, path := range args[1:] {
				p, err := readRecord(path)
				if err != nil {
					return fmt.Errorf("record %s: %w", path, err)
				}
				records = append(records, p)
			}
			p, ref, err := registry.open(args[0], loginFlags{})
			if err != nil {
				return err
			}
			merged := artifact.MergeProfiles(records)
			got, warnings, err := converter.AttachProfile(cmd.Context(), p, ref, merged, source, time.Now(), converter.Options{Jobs: int(jobs), TempDir: os.TempDir()})
			for _, w := range warnings {
				fmt.Fprintf(cmd.ErrOrStderr(), "streamctl: warning: %s\n", w)
			}
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(cmd.OutOrStdout(), got)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d chunks, hot blob of %s, of %d records\n", got.Digest, got.Chunks, size(got.Size), len(records))
			return err
		},
	}
	registry.add(cmd)
	jobs.add(cmd)
	output.add(cmd)
	cmd.Flags().StringVar(&source, "source", artifact.ProfileLearned, "where the records are from: "+artifact.ProfileLearned+" (starts on nodes) or "+artifact.ProfileRecorded+" (a run made for it)")
	return cmd
}

func readRecord(path string) (*artifact.Profile, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p := &artifact.Profile{}
	return p, json.Unmarshal(b, p)
}
