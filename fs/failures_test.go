package fs

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// However many reads fail, a minute has some lines, and the next line says how many there were besides.
func TestFailedReadsDoNotFillTheLog(t *testing.T) {
	var b bytes.Buffer
	l := slog.New(slog.NewTextHandler(&b, nil))
	var f LogLimit
	begin := time.Now()
	for i := range 1000 {
		f.Log(l, begin.Add(time.Duration(i)*time.Millisecond), slog.LevelError, "read", "offset", i)
	}
	if n := strings.Count(b.String(), "\n"); n != maxLines {
		t.Errorf("%d lines in the first second, want %d", n, maxLines)
	}
	b.Reset()
	for i := range 2 {
		f.Log(l, begin.Add(time.Hour), slog.LevelError, "read", "offset", i)
	}
	if s := b.String(); strings.Count(s, "\n") != 2 || strings.Count(s, "not_logged=990") != 1 {
		t.Errorf("an hour later: %s", s)
	}
}
