package service

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// TestCodes: an error is the same on the other side of a network.
func TestCodes(t *testing.T) {
	for _, err := range []error{ErrNotFound, ErrExists, ErrNotRunning, ErrInvalid, ErrUnavailable, converter.ErrDifferent} {
		if code := Code(fmt.Errorf("wrapped: %w", err)); !errors.Is(ErrorOf(code), err) {
			t.Errorf("%v is %s, which is %v", err, code, ErrorOf(code))
		}
	}
	for code, want := range map[string]error{
		"UNSUPPORTED_MEDIATYPE": nil, "RESOURCE_NOT_FOUND": ErrNotFound, "UNKNOWN_ERROR": nil,
	} {
		err := fmt.Errorf("image: %w", &converter.Error{Code: converter.Code(code), Err: errors.New("particulars")})
		if got := Code(err); got != code || ErrorOf(got) != want {
			t.Errorf("%s is %s, which is %v", code, got, ErrorOf(got))
		}
	}
	if got := Code(errors.New("anything")); got != "UNKNOWN_ERROR" {
		t.Errorf("anything is %s", got)
	}
}

func TestAzureOperation(t *testing.T) {
	op := Operation{ID: "id", Image: Image{"r.example.com", "team/app", digest.FromString("x")}, Progress: Progress{Percent: 8}, Position: 3, Message: "no space"}
	resource := "team/app@" + op.Digest.String()
	for state, details := range map[State]string{
		NotStarted: "queued for resource " + resource + ", at position 3", Running: "Conversion ongoing for resource " + resource, Succeeded: "succeeded",
		Failed: "failed for resource " + resource + ": no space", Canceled: "canceled",
	} {
		op.State = state
		a := op.Azure()
		if a.Name != "ArtifactStreamingConversion" || a.Resource != resource || a.Status != state || a.Progress != "8%" || !strings.Contains(a.Details, details) {
			t.Errorf("%s: %+v", state, a)
		}
	}
}
