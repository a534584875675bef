package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

type statusOptions struct {
	root     string
	ref      string // the images to show; "" for all
	json     bool
	watch    bool
	interval time.Duration
}

func newStatusCommand(configFile *string) *cobra.Command {
	var o statusOptions
	var output string
	cmd := &cobra.Command{
		Use:   "status [REF]",
		Short: "Ask the daemon how it is: images, cache, registry hosts, pulls that were not streamed, the last problems",
		Long: `Asks the daemon how it is. With REF only the images of its repository are shown, and of those the one that REF names if it was pulled by
that name since the daemon's start, or by that digest. With -w again and again until interrupted: on a terminal in the same place, with rates; elsewhere
one after the other, as JSON one object in a line.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.json, err = isJSON(output); err != nil {
				return err
			}
			if o.interval <= 0 {
				return fmt.Errorf("--interval %v: want more than nothing", o.interval)
			}
			c := configured(*configFile)
			if len(args) > 0 {
				if _, _, _, err := registryclient.ParseReference(args[0]); err != nil {
					return err
				}
				o.ref = args[0]
			}
			o.root = c.Root
			return showStatus(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().BoolVarP(&o.watch, "watch", "w", false, "again and again, until interrupted")
	cmd.Flags().DurationVar(&o.interval, "interval", 2*time.Second, "with --watch, how often")
	return cmd
}

// isJSON reads the value of --output.
func isJSON(output string) (bool, error) {
	if output != "text" && output != "json" {
		return false, fmt.Errorf("--output %s: want text or json", output)
	}
	return output == "json", nil
}

// showStatus prints the status once, or until ctx ends.
func showStatus(ctx context.Context, o statusOptions, w io.Writer) error {
	f, isFile := w.(*os.File)
	live := o.watch && !o.json && isFile && term.IsTerminal(int(f.Fd()))
	var before *status
	var asked time.Time
	for {
		s, err := askStatusOf(ctx, o.root)
		if o.watch && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		now := time.Now()
		s.Images = ofRef(s.Images, o.ref)
		var b bytes.Buffer
		switch {
		case o.json:
			err = sayJSON(&b, s, !o.watch)
		default:
			if live {
				b.WriteString("\x1b[H\x1b[2J") // home, and an empty screen
			}
			s.print(&b)
			if before != nil {
				s.printRates(&b, *before, now.Sub(asked))
			}
			if o.watch && !live {
				fmt.Fprintf(&b, "at: %s\n\n", now.UTC().Format(time.RFC3339))
			}
		}
		if err == nil {
			_, err = w.Write(b.Bytes())
		}
		if err != nil || !o.watch {
			return err
		}
		before, asked = &s, now
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(o.interval):
		}
	}
}

// ofRef returns the images that ref names, of those of its repository if none is known by that name; all for "".
func ofRef(images []imageStatus, ref string) []imageStatus {
	repo, _, dgst, err := registryclient.ParseReference(ref)
	if ref == "" || err != nil {
		return images
	}
	named, others := []imageStatus{}, []imageStatus{}
	for _, i := range images {
		switch {
		case i.Repository != repo || dgst != "" && i.Manifest != dgst && i.Ref != ref:
		case i.Ref == ref || i.Manifest == dgst:
			named = append(named, i)
		default:
			others = append(others, i)
		}
	}
	if len(named) > 0 {
		return named
	}
	return others
}

// say prints as fmt.Fprintf does, and of what is no number only what can be printed: names and errors come from images' authors and from registries, and a terminal obeys what it is sent.
func say(w io.Writer, format string, args ...any) {
	for i, a := range args {
		switch a.(type) {
		case int, int64, float64:
		default:
			args[i] = plain.Text(fmt.Sprint(a), "")
		}
	}
	fmt.Fprintf(w, format, args...)
}

// sayJSON prints v as JSON, of several lines if indent is true, in which the same is escaped.
func sayJSON(w io.Writer, v any, indent bool) error {
	var b strings.Builder
	e := json.NewEncoder(&b)
	if indent {
		e.SetIndent("", "  ")
	}
	err := e.Encode(v)
	if err == nil {
		_, err = io.WriteString(w, plain.Text(b.String(), "\n"))
	}
	return err
}

func (s status) print(w io.Writer) {
	say(w, "version: %s, since %s\n", s.Version, s.Since)
	if s.SafeMode != "" {
		say(w, "SAFE MODE, nothing new is streamed: %s\n", s.SafeMode)
	}
	if s.Paused != "" {
		say(w, "PAUSED since %s, nothing new is streamed until `streaming-snapshotter resume`\n", s.Paused)
	}
	say(w, "mount mode: %s\n", s.MountMode)
	if s.NotTaken != "" {
		say(w, "not taken: %s\n", s.NotTaken)
	}
	say(w, "images: %d streamed, %d of them mounted, at %d places\nstream: %s\ncache: %s\nreads: %s\n", s.StreamedCount, s.MountedCount, s.Mounts, s.Stream, s.cache(), s.reads())
	for _, h := range s.Hosts {
		say(w, "host: %s\n", h)
	}
	if b := s.Background; b != nil {
		say(w, "in the background: %s, %s of %s\n", b.Image, bytesText(b.Done), bytesText(b.Total))
	}
	if p := s.Proofs; p != (stream.ProofStatus{}) {
		say(w, "proofs: %d layers are proven, %d wait, %d of them for longer than proof_deadline; in quarantine: %d\n", p.Proven, p.Waiting, p.Overdue, p.Quarantined)
	}
	s.printImages(w)
	if len(s.NotStreamed) > 0 {
		fmt.Fprintln(w)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NOT STREAMED\tREASON\tWHEN")
		for _, p := range s.NotStreamed {
			say(t, "%s\t%s\t%s\n", cmp.Or(p.Image, "(unknown)"), p.Reason, p.At)
		}
		t.Flush()
		fmt.Fprintln(w)
	}
	for _, p := range s.Problems {
		say(w, "problem: %s\n", p)
	}
}

// printImages prints a table: how much of each image is here, what its containers waited for, and where it is mounted.
func (s status) printImages(w io.Writer) {
	if len(s.Images) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tLOCAL\tSIZE\t%\tON DEMAND\tHITS\tMOUNTS\tDIRECT\tPROVEN")
	for _, i := range s.Images {
		part := 100.0
		if i.Size > 0 {
			part = 100 * float64(i.Local) / float64(i.Size)
		}
		say(t, "%s\t%s\t%s\t%.0f\t%s\t%s\t%d\t%d\t%s\n", i.name(), bytesText(i.Local), bytesText(i.Size), part,
			bytesText(i.Reads.MissedBytes), ratio(i.Reads.Hits, i.Reads.Misses), i.Through+i.Direct, i.Direct, i.proof())
	}
	t.Flush()
	fmt.Fprintln(w)
}

// name is what the image was pulled by, or its repository with the beginning of the manifest's digest.
func (i imageStatus) name() string {
	return cmp.Or(i.Ref, string(i.Repository)+"@"+short(i.Manifest.String()))
}

// proof says how far the image is proven.
func (i imageStatus) proof() string {
	if i.Quarantine != "" {
		return "QUARANTINED"
	}
	return fmt.Sprintf("%d/%d", i.Proven, i.Layers)
}

// short is the beginning of a digest.
func short(digest string) string { return digest[:min(len(digest), len("sha256:")+12)] }

// ratio prints how many of all were hits.
func ratio(hits, others int64) string {
	if hits+others == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(hits)/float64(hits+others))
}

// reads says in one line what reads have found.
func (s status) reads() string {
	c := s.Cache
	text := fmt.Sprintf("%s of the chunks were here, %d were waited for, %d waiting now; %s in %d requests", ratio(c.Hits, c.Waits), c.Waits, c.Waiting, bytesText(s.Registry.Bytes), s.Registry.Requests)
	if s.FailedReads > 0 {
		text += fmt.Sprintf("; FAILED: %d", s.FailedReads)
	}
	return text
}

// printRates prints what has happened since before.
func (s status) printRates(w io.Writer, before status, in time.Duration) {
	if s.Since != before.Since {
		return // another daemon's counts
	}
	per := func(n int64) float64 { return float64(n) / in.Seconds() }
	say(w, "rates: %s/s and %.1f requests/s from registries, %.1f chunks/s on demand, %.1f chunks/s from disk\n", bytesText(int64(per(s.Registry.Bytes-before.Registry.Bytes))),
		per(s.Registry.Requests-before.Registry.Requests), per(s.Cache.Misses-before.Cache.Misses), per(s.Cache.Hits-before.Cache.Hits))
}

// bytesText prints bytes as people read them.
func bytesText(n int64) string {
	f, unit := float64(n), "B"
	for _, u := range []string{"kB", "MB", "GB", "TB"} {
		if f < 999.95 {
			break
		}
		f, unit = f/1000, u
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + unit
}

// cache says in one line how the chunk cache is.
func (s status) cache() string {
	text := bytesText(s.CacheBytes)
	if s.CacheLimit > 0 {
		text += " of " + bytesText(s.CacheLimit)
	}
	if n := s.Cache.DamagedChunks; n > 0 {
		text += fmt.Sprintf(", chunks found damaged on disk and fetched again: %d", n)
	}
	switch {
	case s.NotCaching:
		text += ", NOT CACHING: " + s.CacheError
	case s.CacheError != "":
		text += ", the disk has failed before: " + s.CacheError
	}
	return text
}
