package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/install"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// The kill switch is a file of root, looked at in each pull: so nothing is restarted, no daemon has to answer, and it holds over restarts.

func pauseFile(root string) string { return filepath.Join(root, "paused") }

// pausedSince says since when nothing new is streamed from the node whose files are in root; "" if streaming is not paused.
func pausedSince(root string) string {
	fi, err := os.Lstat(pauseFile(root))
	if err != nil {
		return ""
	}
	return fi.ModTime().UTC().Format(time.RFC3339)
}

// unlessPaused allows what allow does while streaming is not paused.
func unlessPaused(root string, allow func(registryclient.Repository) error) func(registryclient.Repository) error {
	return func(repo registryclient.Repository) error {
		if err := allow(repo); err != nil {
			return err
		}
		if since := pausedSince(root); since != "" {
			return reason.New(reason.Paused, fmt.Errorf("streaming is paused since %s", since))
		}
		return nil
	}
}

func newPauseCommand(configFile *string) *cobra.Command {
	return &cobra.Command{
		Use:   "pause",
		Short: "Stream nothing new from now on: images are pulled in the normal way until resume",
		Long: `Streams nothing new from the next pull on, without a restart of anything, and over restarts of the daemon and of the machine, until resume.
What is streamed already stays so: its containers read on, and new ones start.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root := configured(*configFile).Root
			if err := os.MkdirAll(root, 0o700); err != nil {
				return err
			}
			f, err := os.OpenFile(pauseFile(root), os.O_WRONLY|os.O_CREATE, 0o600)
			if err != nil {
				return err
			}
			return errors.Join(install.SyncDir(root), f.Close())
		},
	}
}

func newResumeCommand(configFile *string) *cobra.Command {
	return &cobra.Command{
		Use:   "resume",
		Short: "End a pause: images are streamed again from the next pull on",
		Long: `Ends a pause: images are streamed again from the next pull on. One that was pulled in the normal way meanwhile stays as it is until it is
removed and pulled again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root := configured(*configFile).Root
			if err := os.Remove(pauseFile(root)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err := install.SyncDir(root); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		},
	}
}
