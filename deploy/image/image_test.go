package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const program = "streaming-snapshotter"

// TestWrite: the layout is one valid index of two platforms, made again it is the same, and its programs run, the other machine's below qemu.
func TestWrite(t *testing.T) {
	archs := []string{"amd64", "arm64"}
	dir := filepath.Join(t.TempDir(), "layout")
	digest, err := write(t.Context(), program, dir, archs) // with what is compiled already: make lint does both
	if err != nil {
		t.Fatal(err)
	}
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 || m.Manifests[0].Digest != digest || !m.Manifests[0].MediaType.IsIndex() {
		t.Fatalf("index.json has %+v, want index %s", m.Manifests, digest)
	}
	index, err := top.ImageIndex(digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	if m, err = index.IndexManifest(); err != nil || len(m.Manifests) != len(archs) {
		t.Fatalf("%+v, %v", m, err)
	}
	for i, d := range m.Manifests {
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		binary := extract(t, img)
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		settings := map[string]string{}
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
		if d.Platform == nil || d.Platform.Architecture != archs[i] || c.Architecture != archs[i] || settings["GOARCH"] != archs[i] || settings["CGO_ENABLED"] != "0" {
			t.Errorf("%s: descriptor %v, config %s, program %v", archs[i], d.Platform, c.Architecture, settings)
		}
		if len(c.Config.Entrypoint) != 1 || c.Config.Entrypoint[0] != "/"+path+program {
			t.Errorf("entrypoint %q", c.Config.Entrypoint)
		}
		command := []string{binary, "version"}
		if archs[i] != runtime.GOARCH {
			qemu, err := exec.LookPath("qemu-" + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[archs[i]])
			if err != nil {
				t.Skip(err)
			}
			command = append([]string{qemu}, command...)
		}
		out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
		if want := "streaming-snapshotter " + c.Config.Labels["org.opencontainers.image.version"] + "\n"; err != nil || string(out) != want {
			t.Errorf("version prints %q, %v, want %q", out, err, want)
		}
		again, err := image(binary, program, archs[i])
		if err != nil {
			t.Fatal(err)
		}
		if is, err := again.Digest(); err != nil || is != d.Digest {
			t.Errorf("made again it is %s, %v, not %s", is, err, d.Digest)
		}
	}
}

// extract returns a file with the program, which is all there is in the image beside its directories.
func extract(t *testing.T, img v1.Image) string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var names []string
	var text bytes.Buffer
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if names = append(names, h.Name); h.Typeflag == tar.TypeReg {
			if _, err := io.Copy(&text, in); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := strings.Join(names, " "); got != "usr/ usr/local/ usr/local/bin/ "+path+program {
		t.Errorf("the image has %s", got)
	}
	binary := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(binary, text.Bytes(), 0o755); err != nil {
		t.Fatal(err)
	}
	return binary
}
