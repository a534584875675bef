package starts

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

var at = time.Date(2026, 11, 30, 9, 0, 0, 0, time.UTC)

func start(profile string, reads float64) Start {
	return Start{
		Manifest: digest.FromString("manifest"), Artifact: digest.FromString("artifact"), Profile: profile, Pull: 0.25, Wait: 1, Reads: reads,
		Bytes: 1 << 20, Missed: 1 << 18, Misses: 2,
	}
}

// What cannot be meant is refused, by the name of what is wrong.
func TestCheck(t *testing.T) {
	node := strings.Repeat("0f", 16)
	ok := Report{Node: node, Starts: []Start{start("static", 1.5)}}
	if err := ok.Check(); err != nil {
		t.Fatal(err)
	}
	wait := ok
	wait.Starts = []Start{start(None, 0)}
	wait.Starts[0].Ready, wait.Starts[0].Wait = 3, 1e6 // an image may wait for days
	if err := wait.Check(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Report){
		"node":                    func(r *Report) { r.Node = "worker-1.example.com" },
		"0 starts":                func(r *Report) { r.Starts = nil },
		"65 starts":               func(r *Report) { r.Starts = slices.Repeat(r.Starts, MaxStarts+1) },
		"manifest":                func(r *Report) { r.Starts[0].Manifest = "sha256:1" },
		"artifact":                func(r *Report) { r.Starts[0].Artifact = "" },
		"profileDigest":           func(r *Report) { r.Starts[0].Fetched = "x" },
		"profile \"best\"":        func(r *Report) { r.Starts[0].Profile = "best" },
		"pull is":                 func(r *Report) { r.Starts[0].Pull = -1 },
		"wait is":                 func(r *Report) { r.Starts[0].Wait = -1 },
		"reads is":                func(r *Report) { r.Starts[0].Reads = 1e9 },
		"ready is":                func(r *Report) { r.Starts[0].Ready = math.NaN() },
		"neither reads nor ready": func(r *Report) { r.Starts[0].Reads = 0 },
		"missedBytes":             func(r *Report) { r.Starts[0].Missed = math.MaxInt64 },
		"misses":                  func(r *Report) { r.Starts[0].Misses = -1 },
	} {
		r := Report{Node: node, Starts: []Start{start("static", 1.5)}}
		change(&r)
		if err := r.Check(); !errors.Is(err, ErrReport) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v", want, err)
		}
	}
}

// A quantile of the histogram is the one of the times, to what an entry is wide.
func TestQuantile(t *testing.T) {
	if q := (Histogram)(nil).Quantile(0.5); q != 0 {
		t.Errorf("of nothing it is %v", q)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		var h Histogram
		var times []float64
		for range 1 + r.IntN(400) {
			s := math.Exp(r.Float64()*8 - 2) // 0.14 s to 400 s
			h.add(s)
			times = append(times, s)
		}
		slices.Sort(times)
		if h.Count() != int64(len(times)) {
			t.Fatalf("%d times, want %d", h.Count(), len(times))
		}
		for _, q := range []float64{0.5, 0.9, 1} {
			want := times[max(0, int(math.Ceil(q*float64(len(times))))-1)]
			if got := h.Quantile(q); got < want/growth || got > want*growth {
				t.Errorf("quantile %v of %d times is %v, want about %v", q, len(times), got, want)
			}
		}
		n := int64(0)
		for _, b := range h.Buckets() {
			if b.Count == 0 || b.UpTo <= b.Over {
				t.Errorf("bucket %+v", b)
			}
			n += b.Count
		}
		if n != h.Count() {
			t.Errorf("the buckets have %d of %d", n, h.Count())
		}
	}
	var h Histogram
	h.add(MaxTime.Seconds())
	h.add(2 * MaxTime.Seconds())
	if bound(buckets-1) < MaxTime.Seconds() || len(h) > buckets {
		t.Errorf("the longest time has no entry: %v", h)
	}
}

// Starts that have the artifact and the profile in common add up, the last reported first, and a flood of forged ones makes no large summary.
func TestAdd(t *testing.T) {
	var s Summary
	for i := range 4 {
		s.Add(fmt.Sprint("node", i), start("static", 4), at)
	}
	st := start("recorded", 1)
	st.Ready = 2
	s.Add("node0", st, at.Add(time.Minute))
	if len(s.Variants) != 2 || s.Variants[0].Profile != "recorded" || s.Variants[0].Starts != 1 || s.Variants[1].Starts != 4 || s.NodeCount() != 4 {
		t.Fatalf("got %+v, %d nodes", s, s.NodeCount())
	}
	v := s.Variants[1]
	if m := v.Reads.Quantile(0.5); m < 4.25/growth || m > 4.25*growth || v.Ready.Count() != 0 || v.Missed != 4<<18 || v.Misses != 8 || v.Bytes != 4<<20 || !v.First.Equal(at) {
		t.Errorf("got %+v, median %v", v, m)
	}
	if n := s.Variants[0].Ready.Count(); n != 1 {
		t.Errorf("%d starts are ready by a probe, want 1", n)
	}

	forged := start("learned", MaxTime.Seconds())
	forged.Bytes, forged.Missed, forged.Misses = maxBytes, maxBytes, maxMisses
	for i := range 3000 {
		forged.Artifact = digest.FromString(fmt.Sprint(i))
		s.Add(fmt.Sprint("forged", i), forged, at.Add(time.Hour))
	}
	if n := s.NodeCount(); n < 2800 || n > 3200 {
		t.Errorf("%d nodes, want about 3000", n)
	}
	forged.Artifact = digest.FromString("artifact")
	v = Variant{Starts: maxWeight, Weight: maxWeight, Bytes: maxWeight * maxBytes, Missed: maxWeight * maxBytes, Reads: Histogram{0, maxWeight}}
	v.add(forged, at)
	if v.Starts != maxWeight+1 || v.Weight != maxWeight/2+1 || v.Bytes/v.Weight != maxBytes || v.Missed/v.Weight != maxBytes || v.Reads.Count() != v.Weight {
		t.Errorf("after a million: %+v", v)
	}
	b, err := json.Marshal(s)
	if err != nil || len(b) > 32<<10 || len(s.Variants) != maxVariants {
		t.Errorf("%d bytes of %d variants, %v", len(b), len(s.Variants), err)
	}
}

// A report of the most that one may have fits the bound on its bytes.
func TestMaxBody(t *testing.T) {
	st := Start{
		Manifest: digest.FromString("m"), Artifact: digest.FromString("a"), Profile: "recorded", Fetched: digest.FromString("p"),
		Pull: 1234.567891, Wait: 123456.789123, Reads: 1234.567891, Ready: 1234.567891, Bytes: maxBytes, Missed: maxBytes, Misses: maxMisses,
	}
	r := Report{Node: strings.Repeat("0f", 16), Starts: slices.Repeat([]Start{st}, MaxStarts)}
	b, err := json.Marshal(r)
	if err != nil || r.Check() != nil || len(b) > MaxBody {
		t.Errorf("%d bytes, %v, %v", len(b), err, r.Check())
	}
}
