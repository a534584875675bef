package console

import (
	"fmt"
	"strconv"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// timesView says how long the starts of a platform's image took: a row for each way in which nodes have read it, with a bar to the median and on to the 90th percentile, all
// on one axis. The numbers beside a bar are its text.
type timesView struct {
	Nodes   int
	Starts  int64
	Ready   bool     // the times are until a probe said that the pod is ready, and not until nothing more was read
	Now     *timesOf // how it is now; nil if no node has reported that
	Before  *timesOf // the one before, if there is one to compare with
	Less    string   // how much less the median is now, "" if it is not
	Rows    []timesOf
	Longest string // the end of the axis
}

// timesOf are the starts with one artifact and one profile.
type timesOf struct {
	service.StartsOfOne
	Kind        string // of the profile, for people
	Known       bool   // how long they took
	Median, P90 string
	MedianX     string // widths of the bars, in units of the drawing
	P90X        string
	Count       int // of starts whose time is known
	median      float64
}

// profileKinds are what profiles are called in the middle of a sentence.
var profileKinds = map[string]string{"recorded": "a recorded profile", "learned": "a learned profile", "static": "a static profile", "none": "no profile"}

// timesOfPlatform returns nil if nothing was reported.
func timesOfPlatform(p service.PlatformInfo) *timesView {
	if p.Starts == nil || len(p.Starts.Variants) == 0 {
		return nil
	}
	v := &timesView{Nodes: p.Starts.Nodes, Ready: true}
	for _, one := range p.Starts.Variants {
		v.Starts += one.Starts
		v.Ready = v.Ready && one.Ready.Count > 0
	}
	of := func(one service.StartsOfOne) service.StartTimes {
		if v.Ready {
			return one.Ready
		}
		return one.Reads
	}
	longest := 0.0
	for _, one := range p.Starts.Variants {
		longest = max(longest, of(one).P90)
	}
	v.Longest = inSeconds(longest)
	for _, one := range p.Starts.Variants {
		t := of(one)
		row := timesOf{StartsOfOne: one, Kind: profileKinds[one.Profile], Known: t.Count > 0 && longest > 0, Count: int(t.Count), Median: inSeconds(t.Median), P90: inSeconds(t.P90), median: t.Median}
		if row.Kind == "" {
			row.Kind = "another profile"
		}
		if row.Known {
			row.MedianX, row.P90X = units2(mapUnits*t.Median/longest), units2(mapUnits*t.P90/longest)
		}
		v.Rows = append(v.Rows, row)
	}
	for i := range v.Rows {
		switch row := &v.Rows[i]; {
		case !row.Known:
		case row.Current && v.Now == nil:
			v.Now = row
		case !row.Current && v.Before == nil:
			v.Before = row
		}
	}
	if v.Now != nil && v.Before != nil && v.Now.median < v.Before.median {
		v.Less = strconv.Itoa(int(100-100*v.Now.median/v.Before.median)) + " %"
	}
	return v
}

// inSeconds writes a time for people, short ones with two places.
func inSeconds(s float64) string {
	if s < 1 {
		return fmt.Sprintf("%.2f s", s)
	}
	return took(time.Duration(s * float64(time.Second)))
}
