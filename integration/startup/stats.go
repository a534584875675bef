package main

import (
	"math"
	"slices"
	"time"
)

// results are what a run of the benchmark has found, and all that the report is made of.
type results struct {
	Date    string // UTC
	Machine string
	Load    [2]float64 // load average at the begin and the end
	Links   []*link
	Systems []described
	Images  []string
	Samples []sample
	Needed  map[string]int64 // by image: bytes of the chunks that a container touches until it is ready
	Bursts  []burst
	Failed  []string
}

// described is a system and, if it was left out, why.
type described struct{ Name, What, Missing string }

// of returns a figure of all samples of a system.
func (r *results) of(link, image, system string, figure func(sample) (float64, bool)) (fs []float64) {
	for _, s := range r.Samples {
		if s.Link == link && s.Image == image && s.System == system {
			if f, ok := figure(s); ok {
				fs = append(fs, f)
			}
		}
	}
	return fs
}

// always is a figure that every sample has.
func always(f func(sample) float64) func(sample) (float64, bool) {
	return func(s sample) (float64, bool) { return f(s), true }
}

func ready(s sample) (float64, bool)  { return s.Ready, true }
func pulled(s sample) (float64, bool) { return s.Pull, true }

// warm is the time from create to ready of a container whose image is unpacked and in memory.
func warm(s sample) (float64, bool) { return s.Warm, s.Warm > 0 }

// here is the time from a pull to ready of a container whose image is all on the node.
func here(s sample) (float64, bool) { return s.Here, s.Here > 0 }

func completed(s sample) (float64, bool)  { return s.Complete, s.Complete > 0 }
func everything(s sample) (float64, bool) { return s.Everything, s.Everything > 0 }

// median of no values is NaN.
func median(fs []float64) float64 {
	if len(fs) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(fs))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// percentile is the least value that p percent of them do not exceed.
func percentile(fs []float64, p int) float64 {
	if len(fs) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(fs))
	return s[max(0, (len(s)*p+99)/100-1)]
}

// geometricMean is NaN if any value is.
func geometricMean(fs []float64) float64 {
	if len(fs) == 0 {
		return math.NaN()
	}
	sum := 0.0
	for _, f := range fs {
		sum += math.Log(f)
	}
	return math.Exp(sum / float64(len(fs)))
}

// floor is the least time in which image can be ready over l: the chunks that it touches at the link's bandwidth, three round trips, and the time it takes on
// a warm local copy. NaN if that was not measured.
func (r *results) floor(l *link, image string) float64 {
	needed, ok := r.Needed[image]
	if !ok {
		return math.NaN()
	}
	transfer := float64(needed) / float64(l.Bandwidth)
	return transfer + 3*l.RTT.Seconds() + median(r.of(l.Name, image, "overlayfs", warm))
}

// speedup is how many times faster than overlayfs a system is ready with an image.
func (r *results) speedup(link, image, system string) float64 {
	return median(r.of(link, image, "overlayfs", ready)) / median(r.of(link, image, system, ready))
}

// meanSpeedup is the geometric mean over the images.
func (r *results) meanSpeedup(link, system string) float64 {
	var fs []float64
	for _, image := range r.Images {
		fs = append(fs, r.speedup(link, image, system))
	}
	return geometricMean(fs)
}

func today() string { return time.Now().UTC().Format("2006-01-02 15:04") }
