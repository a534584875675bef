package integration_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// TestVersion: what `make build` makes of a clone says which commit that is, and whether it was changed, whatever the user's GOFLAGS are.
func TestVersion(t *testing.T) {
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	clone := filepath.Join(tempDir(t), "clone")
	run(t, "git", "clone", "--quiet", root, clone)
	commit := run(t, "git", "-C", clone, "rev-parse", "--short=12", "HEAD")
	t.Setenv("GOFLAGS", "-buildvcs=false")
	run(t, "make", "-C", clone, "-o", ".build/tools", "build") // but for the tools
	for _, program := range []string{"streamctl", "streaming-snapshotter"} {
		if out := run(t, filepath.Join(clone, ".build/bin", program), "version"); !strings.HasSuffix(out, "-"+commit) {
			t.Errorf("%s version prints %q, want the commit %s at its end", program, out, commit)
		}
	}
}
