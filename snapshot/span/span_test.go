package span

import (
	"context"
	"testing"
)

// Without a trace, nothing is made.
func TestNothing(t *testing.T) {
	ctx := context.Background()
	if got := testing.AllocsPerRun(100, func() {
		in, end := Start(ctx, "search")
		Set(in, "image", "r.example/a")
		end(context.Canceled)
		if in != ctx {
			t.Error("another context")
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}
