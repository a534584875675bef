package plain

import (
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"secrets \"a\" is forbidden: C:\\x": "secrets \"a\" is forbidden: C:\\x",
		"a\x1b[2J\u009b\x7f\u202e\r\n":      `a\u001b[2J\u009b\u007f\u202e\u000d\u000a`,
		"\U000e0001ü\xff":                   `\udb40\udc01ü` + "\ufffd",
	} {
		if got := Text(in, ""); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := Text("a\nb\r", "\n"); got != "a\nb\\u000d" {
		t.Errorf("got %q", got)
	}
}

func FuzzCut(f *testing.F) {
	f.Add(" a\nb ", 3)
	f.Add("üüü\x1b", 5)
	f.Fuzz(func(t *testing.T, s string, max int) {
		max &= 0xff
		got := Cut(s, max)
		if len(got) > max+3 || !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Errorf("%q cut to %d: %q", s, max, got)
		}
	})
}
