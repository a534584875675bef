package install

import (
	"slices"
	"strings"
)

// maxMerged bounds the lines of a file whose changes are told apart: that takes their square.
const maxMerged = 4000

// hunk is a change of lines [from, to) to others.
type hunk struct {
	from, to int
	lines    []string
}

// takeBack returns is, which others have made of installed, without what installed has changed in was; false if both have changed the same lines.
func takeBack(was, installed, is []byte) ([]byte, bool) {
	base := strings.SplitAfter(string(installed), "\n")
	back, ok := hunks(base, strings.SplitAfter(string(was), "\n"))
	theirs, ok2 := hunks(base, strings.SplitAfter(string(is), "\n"))
	if !ok || !ok2 {
		return nil, false
	}
	all := append(back, theirs...)
	slices.SortStableFunc(all, func(a, b hunk) int {
		if a.from != b.from {
			return a.from - b.from
		}
		return a.to - b.to
	})
	var merged strings.Builder
	at, last := 0, hunk{from: -1}
	for _, h := range all {
		if h.from == last.from && h.to == last.to {
			if slices.Equal(h.lines, last.lines) {
				continue // they have taken it back themselves
			}
			return nil, false
		}
		if h.from < at {
			return nil, false
		}
		merged.WriteString(strings.Join(base[at:h.from], ""))
		merged.WriteString(strings.Join(h.lines, ""))
		at, last = h.to, h
	}
	merged.WriteString(strings.Join(base[at:], ""))
	return []byte(merged.String()), true
}

// renew makes before, which an uninstall is to put back of a file of containerd's, was, if others have written that anew since an earlier install and nothing of ours is left in it. Where something
// of both is in it, and the next install has kept theirs, installed goes on to have what the earlier one has written, so that an uninstall asks.
func (s *store) renew(before *file, was file, installed map[string]file) error {
	at := slices.IndexFunc(s.Installed, func(f file) bool { return f.Path == was.Path })
	if at < 0 || was.same(s.Installed[at]) || was.same(*before) {
		return nil
	}
	if was.Absent || was.Link != "" {
		*before = was
		return nil
	}
	old, err := s.load(s.Installed[at])
	if err != nil {
		return nil // an older release has kept none
	}
	first, err := s.load(*before)
	if err != nil {
		return err
	}
	if was, err = s.load(was); err != nil {
		return err
	}
	now, err := s.load(installed[was.Path])
	switch {
	case err != nil:
		return err
	case !hasOf(was.data, old.data, first.data):
		*before = was
	case hasOf(now.data, was.data, old.data):
		installed[was.Path] = old
	}
	return nil
}

// hasOf reports whether text has a line of from that is not in but.
func hasOf(text, from, but []byte) bool {
	lines := func(b []byte) map[string]bool {
		set := map[string]bool{}
		for line := range strings.Lines(string(b)) {
			set[strings.TrimSpace(line)] = true
		}
		return set
	}
	is, not := lines(text), lines(but)
	for line := range lines(from) {
		if line != "" && is[line] && !not[line] {
			return true
		}
	}
	return false
}

// hunks are the changes that make b of a, in order, by their longest common subsequence; false if they are too long.
func hunks(a, b []string) (list []hunk, ok bool) {
	if len(a) > maxMerged || len(b) > maxMerged {
		return nil, false
	}
	common := make([][]int32, len(a)+1) // of a[i:] and b[j:]
	for i := range common {
		common[i] = make([]int32, len(b)+1)
	}
	for i, x := range slices.Backward(a) {
		for j, y := range slices.Backward(b) {
			if x == y {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	for i, j := 0, 0; i < len(a) || j < len(b); {
		h := hunk{from: i}
		first := j
		for (i < len(a) || j < len(b)) && !(i < len(a) && j < len(b) && a[i] == b[j]) {
			if j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1] {
				i++
			} else {
				j++
			}
		}
		if h.to, h.lines = i, b[first:j]; h.to > h.from || len(h.lines) > 0 {
			list = append(list, h)
		}
		for i < len(a) && j < len(b) && a[i] == b[j] {
			i, j = i+1, j+1
		}
	}
	return list, true
}
