package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
)

// TestServiceReadme runs README's words about the conversion service as they stand: Debian's docker-registry tells `streamctl serve` of an image that skopeo copies into
// it, and without another command its artifact is there, and a node streams it. The node reports how long the start took, and the console shows it.
func TestServiceReadme(t *testing.T) {
	dir := tempDir(t)
	g, err := guest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := ociimage.Small(tempDir(t), g, 40)
	if err != nil {
		t.Fatal(err)
	}
	p, err := layout.Write(filepath.Join(dir, "image"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	readme(t, dir, "streamctl serve --config serve.toml", "IMAGE=oci:"+filepath.Join(dir, "image"))

	const ref = "127.0.0.1:5055/team/app:v1"
	run(t, "streamctl", "verify", ref)
	if out := run(t, "streamctl", "show", "--starts", "--server", readmeService, ref); !strings.Contains(out, "No node has reported a start") {
		t.Errorf("before there is a node the service shows\n%s", out)
	}
	n := startNode(t, node.Options{Stream: []string{"127.0.0.1:5055/*"}, Config: "report = 'http://127.0.0.1:8480'\n"})
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	out, err := n.Run(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkSums(t, out, 40)
	var status struct {
		Streamed int `json:"streamed_images"`
	}
	if err := json.Unmarshal([]byte(run(t, "streaming-snapshotter", "status", "--config", n.ConfigFile(), "-o", "json")), &status); err != nil || status.Streamed != 1 {
		t.Errorf("the node has streamed %d images, %v", status.Streamed, err)
	}

	if _, err := n.Crictl(t.Context(), "rmi", ref); err != nil { // then the start is over
		t.Fatal(err)
	}
	var info struct {
		Platforms []struct{ Starts *shownStarts }
	}
	eventually(t, "the node reports the start", func() bool {
		out := run(t, "streamctl", "show", "-o", "json", "--server", readmeService, ref)
		if err := json.Unmarshal([]byte(out), &info); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return info.Platforms[0].Starts != nil
	})
	got := info.Platforms[0].Starts
	if got.Nodes != 1 || len(got.Variants) != 1 {
		t.Fatalf("reported was %+v", got)
	}
	// The image's static profile was fetched beside the pull; bytes are those of the files that were read, and times are no more than all of it took.
	if v := got.Variants[0]; !v.Current || v.Profile != "static" || v.Starts != 1 || v.Reads.Count != 1 || v.Reads.Median <= 0 || v.Ready.Count != 0 || v.Bytes <= 0 || v.MissedBytes > v.Bytes {
		t.Errorf("reported was %+v", v)
	}
	if out := run(t, "streamctl", "show", "--starts", "--server", readmeService, ref); !strings.Contains(out, "linux/amd64  yes  static") {
		t.Errorf("streamctl show --starts prints\n%s", out)
	}
	resp, err := http.Get(readmeService + "/registries/127.0.0.1:5055/team/app/-/image/v1/start")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if page, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(page), "Half of the starts take") || !strings.Contains(string(page), "With a static profile, now: half of the starts within") {
		t.Errorf("the console shows, %v\n%s", err, page)
	}
}

// readmeService is README's.
const readmeService = "http://127.0.0.1:8480"

// shownStarts are what of a platform's is looked at.
type shownStarts struct {
	Nodes    int
	Variants []struct {
		Profile      string
		Current      bool
		Starts       int
		Reads, Ready struct {
			Count  int
			Median float64
		}
		Bytes, MissedBytes int64
	}
}

// readme runs the block of README in which a line has words, in dir, by a shell that ends at the first failure. What it leaves running ends with the test.
func readme(t *testing.T, dir, words string, env ...string) {
	t.Helper()
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var block []string
	for _, part := range strings.Split(string(b), "\n\n") {
		if strings.HasPrefix(part, "    ") && strings.Contains(part, words) {
			for line := range strings.Lines(part) {
				block = append(block, strings.TrimPrefix(line, "    "))
			}
		}
	}
	if block == nil {
		t.Fatalf("README.md has no block with %q", words)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	log, err := os.Create(filepath.Join(dir, "log")) // a pipe would be waited for as long as somebody has it
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	c := exec.CommandContext(ctx, "sh", "-eu", "-c", strings.Join(block, ""))
	c.Dir, c.Env = dir, append(os.Environ(), env...)
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	group := -c.Process.Pid
	c.Cancel = func() error { return syscall.Kill(group, syscall.SIGTERM) }
	t.Cleanup(func() {
		syscall.Kill(group, syscall.SIGTERM)
		for deadline := time.Now().Add(20 * time.Second); !errors.Is(syscall.Kill(group, 0), syscall.ESRCH); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Error("what README starts does not end")
				syscall.Kill(group, syscall.SIGKILL)
				break
			}
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("README's words:\n%s", b)
		}
	})
	if err := c.Wait(); err != nil {
		t.Fatalf("README's words: %v", err)
	}
}
