package install

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
)

const diffContext = 3 // lines

// secret matches the lines of containerd's configuration that have one: what is printed is a pod's log.
var secret = regexp.MustCompile(`(?i)^(\s*["']?(?:password|auth|identitytoken|token)["']?\s*=\s*).*`)

// printChange prints what becomes of a file: as a unified diff of one hunk where both are text, without secrets.
func printChange(w io.Writer, was, is file) {
	switch {
	case is.Absent:
		fmt.Fprintf(w, "remove %s\n", is.Path)
	case is.Link != "":
		fmt.Fprintf(w, "link %s -> %s\n", is.Path, is.Link)
	default:
		fmt.Fprintf(w, "write %s (mode %04o, %d bytes)\n", is.Path, is.Mode, len(is.data))
	}
	if bytes.IndexByte(was.data, 0) >= 0 || bytes.IndexByte(is.data, 0) >= 0 || was.Digest == is.Digest {
		return
	}
	name := func(f file) string {
		if f.Digest == "" {
			return "/dev/null"
		}
		return f.Path
	}
	fmt.Fprintf(w, "--- %s\n+++ %s\n", name(was), name(is))
	old, now := lines(was.data), lines(is.data)
	same := 0
	for same < min(len(old), len(now)) && old[same] == now[same] {
		same++
	}
	tail := 0
	for tail < min(len(old), len(now))-same && old[len(old)-1-tail] == now[len(now)-1-tail] {
		tail++
	}
	from, after := max(0, same-diffContext), max(0, tail-diffContext)
	n, m := len(old)-after-from, len(now)-after-from
	fmt.Fprintf(w, "@@ -%s +%s @@\n", span(from, n), span(from, m))
	each := func(mark string, lines []string) {
		for _, l := range lines {
			fmt.Fprintf(w, "%s%s\n", mark, secret.ReplaceAllString(l, "$1..."))
		}
	}
	each(" ", old[from:same])
	each("-", old[same:len(old)-tail])
	each("+", now[same:len(now)-tail])
	each(" ", old[len(old)-tail:len(old)-after])
}

func span(from, n int) string {
	if n > 0 {
		from++
	}
	return fmt.Sprintf("%d,%d", from, n)
}

// lines are without their ends; a last one without an end says so, as diff does.
func lines(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	text, ended := strings.CutSuffix(string(b), "\n")
	if !ended {
		text += "\n\\ No newline at end of file"
	}
	list := strings.Split(text, "\n")
	if !ended {
		list[len(list)-2] += "\n" + list[len(list)-1]
		list = list[:len(list)-1]
	}
	return list
}
