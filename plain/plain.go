// Package plain makes text that others have written safe to print: names of images, answers of registries and API servers, what programs say. A terminal obeys what it is sent, and
// a line break makes a line of its own in a log.
//
// The principle: what is bounded and escaped where it comes in needs no care where it goes out; and quotation marks stay what they are, because a log quotes once more.
package plain

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
)

// Text returns s with what cannot be printed, but for what is in also, as \uXXXX: so in JSON it stays the same text. Bytes that are no UTF-8 become U+FFFD.
func Text(s, also string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) || strings.ContainsRune(also, r) {
			b.WriteRune(r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, u)
		}
	}
	return b.String()
}

// Cut returns the beginning of s as Text does, in one line of at most max bytes; three dots say that there was more.
func Cut(s string, max int) string {
	if s = Text(strings.TrimSpace(s), ""); len(s) > max {
		s = strings.ToValidUTF8(s[:max], "") + "..."
	}
	return s
}
