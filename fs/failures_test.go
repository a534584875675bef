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
	var f failures
	begin := time.Now()
	for i := range 1000 {
		f.log(l, begin.Add(time.Duration(i)*time.Millisecond), "offset", i)
	}
	if n := strings.Count(b.String(), "\n"); n != maxFailures {
		t.Errorf("%d lines in the first second, want %d", n, maxFailures)
	}
	b.Reset()
	for i := range 2 {
		f.log(l, begin.Add(time.Hour), "offset", i)
	}
	if s := b.String(); strings.Count(s, "\n") != 2 || strings.Count(s, "not_logged=990") != 1 {
		t.Errorf("an hour later: %s", s)
	}
}
