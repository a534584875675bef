package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// createResult is what create prints with -o json.
type createResult struct {
	Image     string              `json:"image"`
	Status    string              `json:"status"` // Succeeded or Failed, as in Azure's operations
	Artifacts []converter.Created `json:"artifacts"`
	ErrorCode converter.Code      `json:"errorCode,omitempty"`
	Message   string              `json:"message,omitempty"`
}

func newCreate() *cobra.Command {
	var (
		image   target
		conv    convertFlags
		output  outputFlag
		force   bool
		profile = profileFlag("static")
		wait    waitFlags
		key     signFlags
	)
	cmd := &cobra.Command{
		Use:   "create REF",
		Short: "Convert an image and attach its streaming artifact",
		Long: `Convert an image and attach its streaming artifact.

REF is an image of a registry (HOST/REPO:TAG or HOST/REPO@DIGEST) or of an OCI layout (oci:DIR:TAG). Of an index, every
Linux platform is converted. The image itself is not changed. An image that has its artifact already is left alone, but
for a signature that is asked for and not there.

With --server the conversion service converts it, and this command waits for the end.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, n, err := image.atService(cmd, args, append([]string{"jobs", "chunk-size", "temp-dir", "record", "profile"}, key.names()...)...)
			if err != nil {
				return err
			}
			if c != nil {
				return submit(cmd, c, n, service.Request{Platforms: image.platforms, Force: force}, wait, output)
			}
			if err := there(cmd, "no-wait", "wait-timeout"); err != nil {
				return err
			}
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			name, err := image.ref(args)
			if err != nil {
				return err
			}
			signer, err := key.signer(cmd, false)
			if err != nil {
				return err
			}
			progress := newProgress(cmd.ErrOrStderr(), "converted")
			o := converter.CreateOptions{Options: conv.options(), Platforms: platforms, Force: force, Static: profile == "static"}
			o.Progress, o.Signer = progress.report, signer
			done, err := converter.Create(cmd.Context(), p, ref, o)
			progress.stop()
			return printResult(cmd, output, name, done, err)
		},
	}
	image.add(cmd)
	conv.add(cmd)
	output.add(cmd)
	wait.add(cmd)
	key.add(cmd, "sign", "sign the artifacts with this key of notation's signingkeys.json; \"\" is its default")
	cmd.Flags().Var(&profile, "profile", "static: find out from the image's files what its start reads, and attach that; or none")
	cmd.Flags().BoolVar(&force, "force", false, "convert all layers again, attach the new artifact, then delete the one before")
	return cmd
}

// printResult prints what Create did, before its error as well, and returns that.
func printResult(cmd *cobra.Command, output outputFlag, image string, done []converter.Created, err error) error {
	res := createResult{Image: image, Status: "Succeeded", Artifacts: done}
	if res.Artifacts == nil {
		res.Artifacts = []converter.Created{}
	}
	warnCreated(cmd.ErrOrStderr(), res)
	if err != nil {
		res.Status, res.ErrorCode, res.Message = "Failed", converter.CodeOf(err), err.Error()
	}
	print := printCreated
	if output.json() {
		print = func(w io.Writer, res createResult) error { return writeJSON(w, res) }
	}
	if werr := print(cmd.OutOrStdout(), res); err == nil {
		err = werr
	}
	return err
}

// warnCreated says what was not done: once for an image that has all its artifacts.
func warnCreated(w io.Writer, res createResult) {
	exist := 0
	for _, c := range res.Artifacts {
		if c.Status == converter.StatusExists {
			exist++
		}
	}
	for _, c := range res.Artifacts {
		for _, warning := range c.Warnings {
			fmt.Fprintf(w, "streamctl: warning: %s\n", warning)
		}
		if c.Status != converter.StatusExists {
			continue
		}
		name := res.Image
		if exist < len(res.Artifacts) {
			name += " (" + c.Platform + ")"
		}
		warnExists(w, name)
		if exist == len(res.Artifacts) {
			return
		}
	}
}

// warnExists says it in Azure's words.
func warnExists(w io.Writer, image string) {
	fmt.Fprintf(w, "The streaming artifact for image '%s' already exists. Skipping request.\n", image)
}

func printCreated(w io.Writer, res createResult) error {
	for _, c := range res.Artifacts {
		if c.Status != converter.StatusCreated {
			printAttached(w, c)
			continue
		}
		fmt.Fprintf(w, "%s %s\n", c.Platform, c.Artifact.Digest)
		t := newTable(w)
		fmt.Fprintln(t, "LAYER\tSOURCE\tSIZE\tARTIFACT\tSIZE\tRATIO\tTAR\tCHUNKS\tTIME")
		var src, out, tar int64
		var chunks int
		for i, l := range c.Layers {
			took := seconds(time.Duration(l.Seconds * float64(time.Second)))
			if l.Reused {
				took = "before"
			}
			fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", i, short(l.Source), size(l.SourceSize), short(l.Digest), size(l.Size),
				ratio(l.Size, l.SourceSize), size(l.TarSize), l.Chunks, took)
			src, out, tar, chunks = src+l.SourceSize, out+l.Size, tar+l.TarSize, chunks+l.Chunks
		}
		fmt.Fprintf(t, "all\t\t%s\t\t%s\t%s\t%s\t%d\t%s\n", size(src), size(out), ratio(out, src), size(tar), chunks,
			seconds(time.Duration(c.Seconds*float64(time.Second))))
		if err := t.Flush(); err != nil {
			return err
		}
		printAttached(w, c)
	}
	return nil
}

// printAttached prints what is attached beside the artifact.
func printAttached(w io.Writer, c converter.Created) {
	if s := c.Signature; s != nil {
		printSigned(w, *s)
	}
	if p := c.Profile; p != nil {
		fmt.Fprintf(w, "%s %s: %s profile, %d chunks, %s\n", c.Platform, p.Digest, p.Source, p.Chunks, size(p.Size))
	}
}
