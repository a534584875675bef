package main

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	beginMark = "<!-- make bench-startup writes from here -->"
	endMark   = "<!-- to here -->"
)

// write puts the report between its marks in docs/benchmarks.md, and the plots beside it.
func (r *results) write(docs string) error {
	name := filepath.Join(docs, "benchmarks.md")
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(old, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the marks %q and %q", name, beginMark, endMark)
	}
	var b bytes.Buffer
	b.Write(before)
	fmt.Fprintln(&b, beginMark)
	r.markdown(&b)
	b.WriteString(endMark)
	b.Write(after)
	for _, l := range r.Links {
		if err := os.WriteFile(filepath.Join(docs, plotName(l)), []byte(r.plot(l)), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(name, b.Bytes(), 0o644)
}

func plotName(l *link) string { return "startup-" + l.Name + ".svg" }

func (r *results) markdown(w io.Writer) {
	fmt.Fprintf(w, "%s UTC, %s; load average %.1f at the begin, %.1f at the end.", r.Date, r.Machine, r.Load[0], r.Load[1])
	for _, s := range r.Systems {
		if s.Missing != "" {
			fmt.Fprintf(w, " Not measured: %s (%s).", s.Name, s.Missing)
		}
	}
	fmt.Fprintf(w, "\n\n| system | |\n|---|---|\n")
	for _, s := range r.Systems {
		if s.Missing == "" {
			fmt.Fprintf(w, "| %s | %s |\n", s.Name, s.What)
		}
	}
	for _, f := range r.Failed {
		fmt.Fprintf(w, "\nFailed: %s\n", f)
	}
	r.summary(w)
	for _, l := range r.Links {
		fmt.Fprintf(w, "\n### %s\n\n![Time to ready over %s](%s)\n\n", l, l, plotName(l))
		r.table(w, l)
	}
	r.burstTable(w)
}

// burstTable has a row for each system, with and without the cache.
func (r *results) burstTable(w io.Writer) {
	if len(r.Bursts) == 0 {
		return
	}
	fmt.Fprintf(w, `
### %d nodes at once

%s, on %d nodes of this one machine in network namespaces, over links of %s each to a registry that gives 1 Gbit/s to all; or over %s to an nginx that keeps slices of 1 MiB
of the blobs, and has the same way to the registry, empty when all begin. The cores are the nodes', too: the times compare the rows with one another.

| | cache | p50, s | p99, s | bursts | requests to the registry | MB from it |
|---|---|---:|---:|---:|---:|---:|
`, burstNodes, r.Bursts[0].Image, burstNodes, links()[1], links()[0])
	for _, s := range r.measured() {
		for _, cached := range []bool{false, true} {
			var ready, requests, bytes []float64
			for _, b := range r.Bursts {
				if b.System == s && b.Cached == cached {
					ready = append(ready, b.Ready...)
					requests = append(requests, float64(b.Requests))
					bytes = append(bytes, float64(b.Bytes)/1e6)
				}
			}
			if len(ready) > 0 {
				cache := "none"
				if cached {
					cache = "nginx"
				}
				fmt.Fprintf(w, "| %s | %s | %.2f | %.2f | %d | %.0f | %.1f |\n", s, cache, percentile(ready, 50), percentile(ready, 99), len(requests), median(requests), median(bytes))
			}
		}
	}
}

// measured are the systems that were.
func (r *results) measured() (names []string) {
	for _, s := range r.Systems {
		if s.Missing == "" {
			names = append(names, s.Name)
		}
	}
	return names
}

// summary is what the systems come to.
func (r *results) summary(w io.Writer) {
	fmt.Fprintf(w, "\nTime to ready: how many times faster than overlayfs, geometric mean over %s; in brackets the least over the images, and the time as a multiple of the floor.\n\n| |", strings.Join(r.Images, ", "))
	for _, l := range r.Links {
		fmt.Fprintf(w, " %s |", l)
	}
	fmt.Fprintf(w, "\n|---|%s\n", strings.Repeat("---:|", len(r.Links)))
	for _, s := range r.measured() {
		fmt.Fprintf(w, "| %s |", s)
		for _, l := range r.Links {
			least, floors := math.Inf(1), []float64{}
			for _, image := range r.Images {
				least = min(least, r.speedup(l.Name, image, s))
				floors = append(floors, median(r.of(l.Name, image, s, ready))/r.floor(l, image))
			}
			fmt.Fprintf(w, " %s (%s; %s floors) |", number(r.meanSpeedup(l.Name, s), 1), number(least, 1), number(geometricMean(floors), 2))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "| floor |")
	for _, l := range r.Links {
		var fs []float64
		for _, image := range r.Images {
			fs = append(fs, median(r.of(l.Name, image, "overlayfs", ready))/r.floor(l, image))
		}
		fmt.Fprintf(w, " %s |", number(geometricMean(fs), 1))
	}
	fmt.Fprintln(w)
}

// column is a column of the tables of a link.
type column struct {
	title  string
	digits int
	figure func(sample) (float64, bool)
}

func columns() []column {
	of := always
	return []column{
		{"pull, s", 2, pulled},
		{"MB", 1, of(func(s sample) float64 { return float64(s.Bytes) / 1e6 })},
		{"requests", 0, of(func(s sample) float64 { return float64(s.Requests) })},
		{"after the start", 0, of(func(s sample) float64 { return float64(s.AfterStart) })},
		{"misses", 0, func(s sample) (float64, bool) { return float64(s.Misses), s.Misses >= 0 }},
		{"CPU, s", 2, of(func(s sample) float64 { return s.Containerd + s.Snapshotter })},
		{"of registry and link", 2, func(s sample) (float64, bool) { return s.Serving, s.Serving > 0 }},
		{"memory, MiB", 0, func(s sample) (float64, bool) { return float64(s.Memory) / (1 << 20), s.Memory > 0 }},
		{"peak", 0, func(s sample) (float64, bool) { return float64(s.Peak) / (1 << 20), s.Peak > 0 }},
		{"read everything, s", 1, everything},
		{"complete, s", 0, completed},
	}
}

// table has a row for each image and system.
func (r *results) table(w io.Writer, l *link) {
	fmt.Fprint(w, "| | | ready, s | least to most | overlayfs / it | it / floor |")
	cs := columns()
	for _, c := range cs {
		fmt.Fprintf(w, " %s |", c.title)
	}
	fmt.Fprintf(w, "\n|---|---|%s\n", strings.Repeat("---:|", 4+len(cs)))
	for _, image := range r.Images {
		for _, s := range r.measured() {
			fs := r.of(l.Name, image, s, ready)
			if len(fs) == 0 {
				continue
			}
			fmt.Fprintf(w, "| %s | %s | %s | %s to %s | %s | %s |", image, s, number(median(fs), 2), number(slices.Min(fs), 2), number(slices.Max(fs), 2),
				number(r.speedup(l.Name, image, s), 1), number(median(fs)/r.floor(l, image), 2))
			for _, c := range cs {
				fmt.Fprintf(w, " %s |", number(median(r.of(l.Name, image, s, c.figure)), c.digits))
			}
			fmt.Fprintln(w)
		}
		if f := r.floor(l, image); !math.IsNaN(f) {
			fmt.Fprintf(w, "| %s | floor | %s | | | |  | %.1f |%s\n", image, number(f, 2), float64(r.Needed[image])/1e6, strings.Repeat(" |", len(cs)-2))
			if h := median(r.of(l.Name, image, "overlayfs", here)); !math.IsNaN(h) {
				fmt.Fprintf(w, "| %s | here | %s | | | %s |%s\n", image, number(h, 2), number(h/f, 2), strings.Repeat(" |", len(cs)))
			}
		}
	}
}

// number is empty for what was not measured.
func number(f float64, digits int) string {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return ""
	}
	return fmt.Sprintf("%.*f", digits, f)
}
