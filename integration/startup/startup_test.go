package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

func TestMain(m *testing.M) {
	node.Isolate()
	os.Exit(m.Run())
}

func TestStatistics(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want float64
	}{
		{"median of an odd number", median([]float64{3, 1, 2}), 2},
		{"median of an even number", median([]float64{4, 1, 2, 3}), 2.5},
		{"geometric mean", geometricMean([]float64{2, 8}), 4},
		{"50th percentile", percentile([]float64{4, 3, 2, 1}, 50), 2},
		{"99th percentile of few", percentile([]float64{1, 2, 3}, 99), 3},
	} {
		if math.Abs(c.got-c.want) > 1e-9 {
			t.Errorf("%s is %v, want %v", c.name, c.got, c.want)
		}
	}
	if !math.IsNaN(median(nil)) || !math.IsNaN(geometricMean(nil)) || !math.IsNaN(percentile(nil, 50)) {
		t.Error("of nothing there is a figure")
	}
}

// twoSystems is what a run of two images with two systems finds, one of which fails with an image.
func twoSystems() *results {
	l := &link{Name: "far", Link: lagproxy.Link{RTT: 100 * time.Millisecond, Bandwidth: 1e6}}
	return &results{
		Links: []*link{l}, Images: []string{"a", "b"}, Needed: map[string]int64{"a": 1e6, "b": 1e6},
		Systems: []described{{"overlayfs", "theirs", ""}, {"none", "ours", ""}, {"later", "<ours>", "not there yet"}},
		Samples: []sample{
			{Link: "far", Image: "a", System: "overlayfs", Ready: 20, Pull: 19, Warm: 0.7, Here: 1, Misses: -1},
			{Link: "far", Image: "a", System: "none", Ready: 4, Pull: 1, Misses: 7},
			{Link: "far", Image: "a", System: "none", Ready: 6, Pull: 1, Misses: 9},
			{Link: "far", Image: "b", System: "overlayfs", Ready: 10, Pull: 9, Warm: 0.7, Misses: -1},
			{Link: "far", Image: "b", System: "none", Ready: 10, Pull: 1, Misses: 7},
		},
		Failed: []string{"none of b: it was late"},
	}
}

func TestReport(t *testing.T) {
	r := twoSystems()
	if got, want := r.floor(r.Links[0], "a"), 1+0.3+0.7; math.Abs(got-want) > 1e-9 {
		t.Errorf("the floor is %v s, want %v", got, want)
	}
	docs := t.TempDir()
	name := filepath.Join(docs, "benchmarks.md")
	if err := os.WriteFile(name, []byte("before\n"+beginMark+"\nold\n"+endMark+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time over the first
		if err := r.write(docs); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	if !strings.HasPrefix(text, "before\n"+beginMark+"\n") || !strings.HasSuffix(text, endMark+"\nafter\n") || strings.Contains(text, "old") {
		t.Errorf("what is around the marks is not what it was:\n%s", text)
	}
	for _, want := range []string{
		"later (not there yet)", "none of b: it was late",
		"| none | 2.0 (1.0; 3.54 floors) |", // 4 and 1 times faster; 2.5 and 5 floors
		"| a | here | 1.00 | | | 0.50 |",
		"| a | none | 5.00 | 4.00 to 6.00 | 4.0 | 2.50 | 1.00 |", // misses: 8
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	f, err := os.Open(filepath.Join(docs, "startup-far.svg"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for d := xml.NewDecoder(f); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
	}
}

// TestGoOn: what a file has is measured no second time, and a file of other images is refused.
func TestGoOn(t *testing.T) {
	name := filepath.Join(t.TempDir(), "startup.json")
	old := twoSystems()
	old.Date, old.Machine = "then", "this one"
	if err := old.save(name); err != nil {
		t.Fatal(err)
	}
	near := &link{Name: "near"}
	r := &results{Date: "now", Machine: "this one", Links: []*link{near, old.Links[0]}, Images: []string{"a", "b"}, Systems: old.Systems}
	if err := r.goOn(name); err != nil {
		t.Fatal(err)
	}
	if r.Date != "then and now" || r.Machine != "this one" || r.Needed["b"] != 1e6 || len(r.Failed) != 1 {
		t.Errorf("got %+v", r)
	}
	if far, none := r.rounds(old.Links[0], "a"), r.rounds(near, "a"); far != 2 || none != 0 {
		t.Errorf("got %d rounds over the link of the file and %d over the other, want 2 and 0", far, none)
	}
	r.Images = []string{"a"}
	if err := r.goOn(name); err == nil {
		t.Error("a file of other images is gone on with")
	}
}

// TestMeasure is `make bench-startup` in small: the smallest image once, over the fastest link, ours beside overlayfs, and until it is complete. `make build` has built what it runs.
func TestMeasure(t *testing.T) {
	o := options{images: "debian-base", links: "1ms", systems: "overlayfs,none,static", n: 1, everything: true, out: filepath.Join(t.TempDir(), "out.json")}
	r := &results{}
	if err := run(t.Context(), o, r); err != nil {
		t.Fatal(err)
	}
	if len(r.Samples) != 3 || len(r.Failed) > 0 {
		t.Fatalf("%d samples, failed: %q", len(r.Samples), r.Failed)
	}
	for _, s := range r.Samples {
		if s.Pull <= 0 || s.Ready <= s.Pull || s.Everything <= 0 && s.System != "static" || s.Requests == 0 || s.Bytes == 0 || s.Containerd <= 0 {
			t.Errorf("%+v lacks something", s)
		}
	}
	theirs, ours := r.Samples[0], r.Samples[1]
	if theirs.AfterPull != 0 || theirs.Warm <= 0 || theirs.Here <= 0 || theirs.Bytes < 40e6 {
		t.Errorf("overlayfs: %+v", theirs)
	}
	if c := r.Samples[2].Complete; c <= r.Samples[2].Ready {
		t.Errorf("the image was complete after %v s, and ready after %v", c, r.Samples[2].Ready)
	}
	if ours.AfterStart == 0 || ours.Misses <= 0 || ours.Memory == 0 || ours.Bytes > theirs.Bytes/2 || ours.Bytes < r.Needed["debian-base"] {
		t.Errorf("ours, which needs %d bytes: %+v", r.Needed["debian-base"], ours)
	}
}
