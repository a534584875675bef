package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
)

// waitFlags say how long to wait for the service.
type waitFlags struct {
	no      bool
	timeout time.Duration
}

func (f *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.no, "no-wait", false, "with --server: do not wait for the end of the conversion")
	cmd.Flags().DurationVar(&f.timeout, "wait-timeout", 0, "with --server: how long to wait for it, as in 10m; it goes on all the same")
}

// submitted is what create prints with -o json when the service converts: Azure's keys, and how it ended.
type submitted struct {
	ID        string             `json:"id,omitempty"` // "" of what was refused
	Status    service.State      `json:"status"`
	Image     string             `json:"image"`
	Artifacts []service.Artifact `json:"artifacts,omitempty"`
	ErrorCode converter.Code     `json:"errorCode,omitempty"`
	Message   string             `json:"message,omitempty"`
}

// submit has the service convert an image, and waits for the end unless it is not to.
func submit(cmd *cobra.Command, c *client.Client, n named, r service.Request, wait waitFlags, output outputFlag) error {
	if wait.timeout < 0 || wait.no && wait.timeout > 0 {
		return usage("create: --wait-timeout is how long to wait, and --no-wait does not")
	}
	img, err := resolve(cmd.Context(), c, n)
	if err != nil {
		return err
	}
	r.Image, r.Tag = img, n.tag()
	op, _, err := c.Submit(cmd.Context(), r)
	if errors.Is(err, service.ErrExists) {
		warnExists(cmd.ErrOrStderr(), n.name)
		return nil
	}
	if err != nil {
		if output.json() {
			err = errors.Join(writeJSON(cmd.OutOrStdout(), submitted{Status: service.Failed, Image: n.name, ErrorCode: converter.CodeOf(err), Message: err.Error()}), err)
		}
		return err
	}
	look := fmt.Sprintf("streamctl operation show -n %s --repository %s --id %s", n.registry, n.repository, op.ID)
	fmt.Fprintf(cmd.ErrOrStderr(), "The operation is in progress. Use '%s' to check the status.\n", look)
	if !wait.no {
		ctx, cancel := cmd.Context(), func() {}
		if wait.timeout > 0 {
			ctx, cancel = context.WithTimeout(ctx, wait.timeout)
		}
		defer cancel()
		f := follower{progress: newProgress(cmd.ErrOrStderr(), "converted")}
		var ended service.Operation
		ended, err = c.Follow(ctx, op.ID, f.see)
		f.progress.stop()
		switch {
		case err == nil:
			op = ended
		case ctx.Err() != nil && cmd.Context().Err() == nil:
			err = fmt.Errorf("the conversion goes on; it has not ended within %s: '%s' says how far it is", wait.timeout, look)
		case ctx.Err() != nil:
			fmt.Fprintf(cmd.ErrOrStderr(), "The conversion goes on. '%s' shows it, and 'streamctl operation cancel' with the same ends it.\n", look)
		}
	}
	if err == nil {
		err = failure(op)
	}
	if werr := printSubmitted(cmd, n, op, output); err == nil {
		err = werr
	}
	return err
}

// failure is the error of an operation that ended otherwise than it should.
func failure(op service.Operation) error {
	switch op.State {
	case service.Failed:
		if strings.HasPrefix(op.Message, string(op.ErrorCode)) {
			return errors.New(op.Message)
		}
		return fmt.Errorf("%s: %s", op.ErrorCode, op.Message)
	case service.Canceled:
		return fmt.Errorf("the conversion of %s was canceled%s", op.Image, by(op.CancelBy))
	}
	return nil
}

func by(who string) string {
	if who == "" {
		return ""
	}
	return " by " + who
}

func printSubmitted(cmd *cobra.Command, n named, op service.Operation, output outputFlag) error {
	for _, w := range op.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "streamctl: warning: %s\n", w)
	}
	if output.json() {
		return writeJSON(cmd.OutOrStdout(), submitted{op.ID, op.State, n.name, op.Artifacts, op.ErrorCode, op.Message})
	}
	t := newTable(cmd.OutOrStdout())
	fmt.Fprintf(t, "ID\tSTATUS\n%s\t%s\n", op.ID, op.State)
	if err := t.Flush(); err != nil {
		return err
	}
	return printArtifacts(cmd.OutOrStdout(), op.Artifacts)
}

func printArtifacts(w io.Writer, list []service.Artifact) error {
	for _, a := range list {
		if _, err := fmt.Fprintf(w, "%s %s\n", a.Platform, a.Digest); err != nil {
			return err
		}
	}
	return nil
}

// follower shows an operation while it goes on: a bar on a terminal, a line for what is new elsewhere.
type follower struct {
	progress *progress
	last     string
}

func (f *follower) see(op service.Operation) {
	p := op.Progress
	e := converter.Event{Kind: converter.LayerRead, Platform: p.Platform, Layer: max(p.Layer, 1) - 1, Layers: p.Layers, Digest: p.Digest, Read: p.Bytes, Total: p.Total}
	line := string(op.State) + "..."
	switch {
	case op.State.Ended():
		line = ""
	case op.State == service.NotStarted && op.Position > 0:
		line = fmt.Sprintf("%s, number %d in the queue...", op.State, op.Position)
	case op.State == service.Running && p.Layer > 0:
		line = fmt.Sprintf("%s, %s...", op.State, name(e))
	}
	f.progress.only(e, op.State == service.Running && p.Layer > 0)
	if line != f.last && line != "" {
		f.progress.say(line)
	}
	f.last = line
}
