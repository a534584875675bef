package service

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestNewestTags: which tags' artifacts are kept, when it is certain.
func TestNewestTags(t *testing.T) {
	for name, c := range map[string]struct {
		listed  string
		missing map[string]time.Duration // for how long
		due     string
		unseen  string // was not looked at yet
		want    string // "?" is that nobody knows
	}{
		"all there":                         {listed: "abcd", want: "cd"},
		"the newest one is not listed":      {listed: "abc", missing: map[string]time.Duration{"d": time.Hour}, want: "bcd"},
		"an old one is not listed":          {listed: "bcd", missing: map[string]time.Duration{"a": time.Hour}, want: "cd"},
		"the newest is gone for long":       {listed: "abc", missing: map[string]time.Duration{"d": 2 * longMissing}, want: "bc"},
		"none is listed":                    {listed: "", missing: map[string]time.Duration{"a": time.Hour, "b": time.Hour, "c": time.Hour, "d": time.Hour}, want: "?"},
		"one is to be looked at":            {listed: "abcd", due: "b", want: "?"},
		"one was told of that is not there": {listed: "abc", due: "d", want: "bc"},
		"an old one was not looked at":      {listed: "abcd", unseen: "a", want: "cd"},
		"a new one was not looked at":       {listed: "abcd", unseen: "d", want: "?"},
	} {
		tags, listed := map[string]*seenTag{}, map[string]bool{}
		for i, tag := range []string{"a", "b", "c", "d"} {
			s := &seenTag{Tag: tag, State: stateDone, Digest: digest.FromString(tag), Pushed: now().Add(time.Duration(i) * time.Second)}
			if d := c.missing[tag]; d > 0 {
				s.Missing = now().Add(-d)
			}
			if strings.Contains(c.due, tag) {
				s.State = stateDue
			}
			if strings.Contains(c.unseen, tag) {
				s.Digest = ""
			}
			tags[tag], listed[tag] = s, strings.Contains(c.listed, tag)
		}
		newest, why := newestTags(tags, listed, 2)
		names := map[string]bool{}
		for _, s := range newest {
			names[s.Tag] = true
		}
		got := strings.Join(slices.Sorted(maps.Keys(names)), "")
		if why != "" {
			got = "?"
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
