package registryclient

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// FuzzHeaders: what a host says in headers and in the body of an error is read without a panic, and within its bounds.
func FuzzHeaders(f *testing.F) {
	f.Add("bytes 0-9/10", "120", `{"errors":[{"code":"DENIED","message":"no"}]}`)
	f.Add("bytes 5-4/*", "Wed, 21 Oct 2026 07:28:00 GMT", "{")
	f.Add("bytes 0-18446744073709551615/*", "-1", "")
	f.Fuzz(func(t *testing.T, contentRange, retryAfter, body string) {
		first, last, err := parseContentRange(contentRange)
		if err == nil && (first < 0 || last < first) {
			t.Errorf("%q is %d-%d", contentRange, first, last)
		}
		if err == nil {
			if a, b, err := parseContentRange(fmt.Sprintf("bytes %d-%d/*", first, last)); err != nil || a != first || b != last {
				t.Errorf("%q is %d-%d, which is %d-%d, %v", contentRange, first, last, a, b, err)
			}
		}
		if d := parseRetryAfter(retryAfter, time.Now()); d < 0 {
			t.Errorf("Retry-After %q is %v", retryAfter, d)
		}
		resp := &http.Response{StatusCode: 403, Header: http.Header{"Retry-After": {retryAfter}}, Body: io.NopCloser(strings.NewReader(body))}
		e := newStatusError(resp, "h", "u", time.Minute)
		if len(e.Message) > maxErrorMessage+3 || strings.ContainsAny(e.Message, "\n\x00\x1b") {
			t.Errorf("message %q of %q", e.Message, body)
		}
	})
}
