package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
)

func newOperation() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "operation",
		Short: "Conversions of the service",
		Args:  exactly(0),
		RunE:  func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newOperationShow(), newOperationCancel(), newOperationList())
	return cmd
}

// operationFlags name an operation as Azure's command line does: --repository and --id, or the last one of an image.
type operationFlags struct {
	serviceFlags
	hostFlags
	image, repository, id string
}

func (f *operationFlags) add(cmd *cobra.Command) {
	f.hostFlags.add(cmd, "the image or repository")
	cmd.Flags().StringVarP(&f.image, "image", "t", "", "the last operation of this image: REPO:TAG or REPO@DIGEST")
	cmd.Flags().StringVar(&f.repository, "repository", "", "repository of the operation that --id names")
	cmd.Flags().StringVar(&f.id, "id", "", "the operation, as create prints it")
	f.serviceFlags.add(cmd)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) > 1, len(args) == 1 && (f.image != "" || f.id != "" || f.name != ""), len(args) == 0 && (f.image == "") == (f.id == ""), f.repository != "" && f.id == "":
			return usage("Usage error: You need to provide either --repository MyRepo --id MyId | --image MyImage")
		}
		return nil
	}
}

// find returns the operation.
func (f *operationFlags) find(cmd *cobra.Command, c *client.Client, args []string) (op service.Operation, image string, err error) {
	ctx := cmd.Context()
	if f.id != "" {
		op, err = c.Operation(ctx, f.id)
		if err == nil && f.repository != "" && op.Repository != f.repository {
			err = fmt.Errorf("operation %s is of repository %s, not of %s: %w", f.id, op.Repository, f.repository, service.ErrNotFound)
		}
		return op, op.Image.String(), err
	}
	i := imageFlags{hostFlags: f.hostFlags, image: f.image}
	n, err := i.named(args)
	if err != nil {
		return op, "", err
	}
	img, err := resolve(ctx, c, n)
	if err != nil {
		return op, n.name, err
	}
	op, err = c.Last(ctx, img)
	if errors.Is(err, service.ErrNotFound) {
		err = azure("No operation found for image '%s'", n.name)
	}
	return op, n.name, err
}

func newOperationShow() *cobra.Command {
	var (
		which  operationFlags
		output outputFlag
	)
	cmd := &cobra.Command{
		Use:   "show [REF]",
		Short: "Show how far a conversion of the service is, or how it ended",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := which.need(cmd)
			if err != nil {
				return err
			}
			op, _, err := which.find(cmd, c, args)
			if err != nil {
				return err
			}
			return printOperation(cmd.OutOrStdout(), op, output)
		},
	}
	which.add(cmd)
	output.add(cmd)
	return cmd
}

func newOperationCancel() *cobra.Command {
	var (
		which  operationFlags
		output outputFlag
		no     bool
	)
	cmd := &cobra.Command{
		Use:   "cancel [REF]",
		Short: "Cancel a conversion of the service: nothing of it stays attached",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := which.need(cmd)
			if err != nil {
				return err
			}
			op, image, err := which.find(cmd, c, args)
			if err != nil {
				return err
			}
			ended := op.State.Ended()
			if !ended {
				op, err = c.Cancel(cmd.Context(), op.ID, "")
				ended = errors.Is(err, service.ErrNotRunning)
			}
			if ended {
				return azure("The image '%s' does not have any ongoing operation. Operation ID: %s", image, op.ID)
			}
			if err == nil && !no {
				op, err = c.Follow(cmd.Context(), op.ID, nil)
			}
			if err != nil {
				return err
			}
			return printOperation(cmd.OutOrStdout(), op, output)
		},
	}
	which.add(cmd)
	output.add(cmd)
	cmd.Flags().BoolVar(&no, "no-wait", false, "do not wait until it has ended")
	return cmd
}

func newOperationList() *cobra.Command {
	var (
		remote     serviceFlags
		host       hostFlags
		repository string
		image      string
		states     []string
		limit      int
		output     outputFlag
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List conversions of the service, the newest first",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := remote.need(cmd)
			if err != nil {
				return err
			}
			f := service.Filter{Repository: repository, Limit: limit}
			if f.States, err = parseStates(states); err != nil {
				return err
			}
			if host.name != "" || host.suffix != "" || repository != "" || image != "" {
				if f.Registry, err = host.host(); err != nil {
					return err
				}
			}
			if image != "" {
				if err := ofImage(cmd.Context(), c, &f, image); err != nil {
					return err
				}
			}
			list, err := c.Operations(cmd.Context(), f)
			if err != nil {
				return err
			}
			return printOperations(cmd.OutOrStdout(), list, output)
		},
	}
	host.add(cmd, "the operations (without -n, --repository and --image: of all)")
	cmd.Flags().StringVar(&repository, "repository", "", "only those of this repository")
	cmd.Flags().StringVarP(&image, "image", "t", "", "only those of this image: REPO:TAG or REPO@DIGEST")
	cmd.Flags().StringArrayVar(&states, "state", nil, "only those in this state: "+strings.Join(stateNames(), ", ")+" (repeatable)")
	cmd.Flags().IntVar(&limit, "limit", 100, "how many at most")
	remote.add(cmd)
	output.add(cmd)
	return cmd
}

// ofImage makes f choose the operations of an image of f's registry.
func ofImage(ctx context.Context, c *client.Client, f *service.Filter, image string) error {
	n := named{name: f.Registry + "/" + image}
	var err error
	if n.registry, n.repository, n.ref, err = splitImage(n.name); err != nil {
		return err
	}
	img, err := resolve(ctx, c, n)
	f.Repository, f.Digest = img.Repository, img.Digest
	return err
}

func allStates() []service.State {
	return []service.State{service.NotStarted, service.Running, service.Succeeded, service.Failed, service.Canceled}
}

func stateNames() (names []string) {
	for _, s := range allStates() {
		names = append(names, string(s))
	}
	return names
}

func parseStates(names []string) (states []service.State, err error) {
	for _, name := range names {
		i := slices.IndexFunc(allStates(), func(s service.State) bool { return strings.EqualFold(string(s), name) })
		if i < 0 {
			return nil, usage("--state %s: want one of %s", name, strings.Join(stateNames(), ", "))
		}
		states = append(states, allStates()[i])
	}
	return states, nil
}

// operationResult is an operation as Azure's command prints it, and what only ours has.
type operationResult struct {
	service.AzureOperation
	Registry string             `json:"registry"`
	Tag      string             `json:"tag,omitempty"`
	By       string             `json:"requestedBy"`
	Asked    time.Time          `json:"requestTime"`
	Position int                `json:"position,omitempty"`
	Attempt  int                `json:"attempt"`
	Done     service.Progress   `json:"progressDetails"`
	Produced []service.Artifact `json:"artifacts,omitempty"`
	Warnings []string           `json:"warnings,omitempty"`
}

func resultOf(op service.Operation) operationResult {
	return operationResult{op.Azure(), op.Registry, op.Tag, op.By, op.Asked, op.Position, op.Attempt, op.Progress, op.Artifacts, op.Warnings}
}

func printOperation(w io.Writer, op service.Operation, output outputFlag) error {
	r := resultOf(op)
	if output.json() {
		return writeJSON(w, r)
	}
	t := newTable(w)
	row := func(key, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", key, value)
		}
	}
	row("id", op.ID)
	row("image", op.Image.String())
	row("tag", op.Tag)
	row("status", string(op.State))
	row("progress", progressOf(op))
	row("details", r.Details)
	row("requested", op.Asked.Format(time.RFC3339)+by(op.By))
	row("started", when(op.Start))
	row("ended", when(op.End))
	row("error", string(op.ErrorCode))
	row("message", op.Message)
	for _, warning := range op.Warnings {
		row("warning", warning)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return printArtifacts(w, op.Artifacts)
}

// progressOf says how far an operation is, in a line.
func progressOf(op service.Operation) string {
	p := op.Progress
	switch {
	case op.State == service.NotStarted && op.Position > 0:
		return fmt.Sprintf("number %d in the queue", op.Position)
	case p.Total == 0:
		return fmt.Sprintf("%d%%", p.Percent)
	case op.State == service.Running && p.Layer > 0:
		return fmt.Sprintf("%d%%, %s of %s, %s layer %d of %d", p.Percent, size(p.Bytes), size(p.Total), p.Platform, p.Layer, p.Layers)
	}
	return fmt.Sprintf("%d%%, %s of %s", p.Percent, size(p.Bytes), size(p.Total))
}

func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339)
}

func printOperations(w io.Writer, list []service.Operation, output outputFlag) error {
	if output.json() {
		results := []operationResult{}
		for _, op := range list {
			results = append(results, resultOf(op))
		}
		return writeJSON(w, map[string]any{"operations": results})
	}
	t := newTable(w)
	fmt.Fprintln(t, "ID\tSTATUS\tPROGRESS\tREQUESTED\tBY\tIMAGE")
	for _, op := range list {
		image := op.Registry + "/" + op.Repository + "@" + short(op.Digest)
		if op.Tag != "" {
			image = op.Registry + "/" + op.Repository + ":" + op.Tag
		}
		fmt.Fprintf(t, "%s\t%s\t%d%%\t%s\t%s\t%s\n", op.ID, op.State, op.Progress.Percent, op.Asked.Format(time.RFC3339), op.By, image)
	}
	return t.Flush()
}
