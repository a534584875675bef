package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/pflag"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestMain makes the test binary streamctl for the tests that need a process.
func TestMain(m *testing.M) {
	switch os.Getenv("STREAMCTL_TEST_MAIN") {
	case "run":
		main()
		return
	case "peak": // as main, but for signals, and prints the most memory it had
		code := run(context.Background(), os.Args[1:], io.Discard, io.Discard)
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			panic(err)
		}
		os.Stdout.Write(status)
		os.Exit(code)
	}
	os.Exit(alone(m))
}

// alone runs the tests without the defaults of whoever runs them.
func alone(m *testing.M) int {
	dir, err := os.MkdirTemp("", "config")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	os.Setenv("XDG_CONFIG_HOME", dir)
	os.Unsetenv(tokenEnv)
	for _, k := range allPreferences() {
		os.Unsetenv(k.env)
	}
	return m.Run()
}

// streamctl runs a command as main does, with a record of its own.
func streamctl(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, &out, &errs)
	return status, out.String(), errs.String()
}

func succeed(t *testing.T, args ...string) (stdout, stderr string) {
	t.Helper()
	status, stdout, stderr := streamctl(t, args...)
	if status != 0 {
		t.Fatalf("streamctl %q: status %d, %s", args, status, stderr)
	}
	return stdout, stderr
}

// putImage stores an image of two layers.
func putImage(t *testing.T, image, platform string) digest.Digest {
	t.Helper()
	return putImageOf(t, image, platform, "two")
}

// putImageOf is putImage with a second layer of its own.
func putImageOf(t *testing.T, image, platform, second string) digest.Digest {
	t.Helper()
	p, tag, err := converter.Open(image, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	put := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		if err := p.PutBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }); err != nil {
			t.Fatal(err)
		}
		return d
	}
	pf, err := converter.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	config := ocispec.Image{Platform: pf}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, name := range []string{"one", second} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		data := bytes.Repeat([]byte(name), 100_000)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		w.Write(data)
		w.Close()
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayer, b.Bytes()))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, m.Layers[len(m.Layers)-1].Digest)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m.Config = put(ocispec.MediaTypeImageConfig, raw)
	if raw, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := p.PutManifest(t.Context(), d, raw, tag); err != nil {
		t.Fatal(err)
	}
	return d.Digest
}

// TestCommands goes through an artifact's life with every command.
func TestCommands(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	host := registrytest.Start(t, registrytest.Options{}).Host()
	image := host + "/team/app:v1"
	subject := putImage(t, image, "linux/amd64")

	stdout, stderr := succeed(t, "create", "-n", host, "-t", "team/app:v1", "-o", "json")
	var created createResult
	if err := json.Unmarshal([]byte(stdout), &created); err != nil {
		t.Fatalf("create -o json: %v\n%s", err, stdout)
	}
	if created.Status != "Succeeded" || created.Image != image || len(created.Artifacts) != 1 || len(created.Artifacts[0].Layers) != 2 {
		t.Errorf("created %+v", created)
	}
	if n := strings.Count(stderr, "converted"); n != 2 {
		t.Errorf("%d lines of progress, want 2:\n%s", n, stderr)
	}
	for _, output := range []string{"table", "json"} {
		stdout, stderr = succeed(t, "create", image, "-o", output)
		if want := "The streaming artifact for image '" + image + "' already exists. Skipping request.\n"; stderr != want {
			t.Errorf("create again says %q, want %q", stderr, want)
		}
		if (stdout == "") != (output == "table") {
			t.Errorf("create again prints %q", stdout)
		}
	}
	if stdout, _ = succeed(t, "create", "--force", image); !strings.Contains(stdout, "linux/amd64 "+created.Artifacts[0].Artifact.Digest.String()) {
		t.Errorf("create --force prints %s", stdout)
	}

	stdout, _ = succeed(t, "list-referrers", image, "-o", "json", "--artifact-type", artifact.ArtifactType)
	var list map[string][]map[string]any
	if err := json.Unmarshal([]byte(stdout), &list); err != nil {
		t.Fatalf("list-referrers -o json: %v\n%s", err, stdout)
	}
	if len(list["manifests"]) != 1 {
		t.Fatalf("list-referrers: %s", stdout)
	}
	for _, key := range []string{"annotations", "artifactType", "digest", "mediaType", "size", "subject"} {
		if list["manifests"][0][key] == nil {
			t.Errorf("list-referrers has no %s", key)
		}
	}
	if stdout, _ = succeed(t, "list-referrers", image, "--artifact-type", "text/plain", "-o", "json"); !strings.Contains(stdout, `"manifests": []`) {
		t.Errorf("list-referrers of another type: %s", stdout)
	}
	if stdout, _ = succeed(t, "inspect", image); !strings.Contains(stdout, subject.String()) || !strings.Contains(stdout, "RATIO") {
		t.Errorf("inspect: %s", stdout)
	}
	var inspected struct{ Artifacts []converter.Inspection }
	stdout, _ = succeed(t, "inspect", image, "-o", "json")
	if err := json.Unmarshal([]byte(stdout), &inspected); err != nil || len(inspected.Artifacts) != 1 || inspected.Artifacts[0].Subject != subject {
		t.Errorf("inspect -o json: %v\n%s", err, stdout)
	}
	if stdout, _ = succeed(t, "verify", image); !strings.Contains(stdout, subject.String()) {
		t.Errorf("verify: %s", stdout)
	}

	checkProfilePush(t, host, image, created.Artifacts[0].Artifact.Digest)

	dir := filepath.Join(t.TempDir(), "layout")
	succeed(t, "cp", image, "oci:"+dir+":v1")
	succeed(t, "verify", "oci:"+dir)

	// A byte of the last layer's blob.
	l := created.Artifacts[0].Layers[1]
	path := filepath.Join(dir, "blobs", "sha256", l.Digest.Encoded())
	blob, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	blob[10] ^= 1
	if err := os.WriteFile(path, blob, 0o644); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := streamctl(t, "verify", "oci:"+dir)
	if status != 1 || stdout != "" || !strings.Contains(stderr, "layer 1, "+l.Digest.String()) {
		t.Errorf("verify of a changed byte: status %d, %q, %q", status, stdout, stderr)
	}

	if stdout, _ = succeed(t, "delete", image); !strings.Contains(stdout, created.Artifacts[0].Artifact.Digest.String()) {
		t.Errorf("delete: %s", stdout)
	}
	if status, _, stderr = streamctl(t, "delete", image); status != 1 || !strings.Contains(stderr, "streamctl create") {
		t.Errorf("delete again: status %d, %s", status, stderr)
	}
	if stdout, _ = succeed(t, "version"); !strings.HasPrefix(stdout, "streamctl ") {
		t.Errorf("version: %s", stdout)
	}
}

// checkProfilePush makes a profile of two records of nodes.
func checkProfilePush(t *testing.T, host, image string, dgst digest.Digest) {
	t.Helper()
	resp, err := http.Get("http://" + host + "/v2/team/app/manifests/" + dgst.String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	a, b := m.Layers[0].IndexDigest, m.Layers[1].IndexDigest
	args := []string{"profile", "push", image}
	for i, p := range []artifact.Profile{
		{Layers: []digest.Digest{a, b}, Chunks: []artifact.HotChunk{{Layer: 1}, {Layer: 0}}},
		{Layers: []digest.Digest{b}, Chunks: []artifact.HotChunk{{}}},
	} {
		j, err := json.Marshal(&p)
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, filepath.Join(t.TempDir(), string(rune('0'+i))))
		if err := os.WriteFile(args[len(args)-1], j, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if stdout, _ := succeed(t, args...); !strings.Contains(stdout, ": 2 chunks, ") || !strings.Contains(stdout, " of 2 records") {
		t.Errorf("profile push prints %s", stdout)
	}
	stdout, _ := succeed(t, append(args, "--source", "recorded", "-o", "json")...)
	var got converter.Profile
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got.Source != artifact.ProfileRecorded || got.Chunks != 2 || got.Created == nil {
		t.Errorf("profile push -o json: %+v, %v", got, err)
	}
	for want, args := range map[string][]string{
		"an image and files":    {"profile", "push", image},
		"want learned or":       append(args, "--source", "static"),
		"unexpected end of":     {"profile", "push", image, os.DevNull},
		"has all of the profil": {"profile", "push", image, otherRecord(t)},
	} {
		if status, _, stderr := streamctl(t, args...); status == 0 || !strings.Contains(stderr, want) {
			t.Errorf("streamctl %q: status %d, %q, want %q", args, status, stderr, want)
		}
	}
}

// otherRecord is a record of some other image.
func otherRecord(t *testing.T) string {
	t.Helper()
	j, err := json.Marshal(&artifact.Profile{Layers: []digest.Digest{digest.FromString("x")}, Chunks: []artifact.HotChunk{{}}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(path, j, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestFailure: a program learns from -o json what a person learns from standard error.
func TestFailure(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	image := "oci:" + filepath.Join(t.TempDir(), "layout") + ":v1"
	putImage(t, image, "windows/amd64")
	status, stdout, stderr := streamctl(t, "create", image, "-o", "json")
	var res createResult
	if err := json.Unmarshal([]byte(stdout), &res); err != nil {
		t.Fatalf("%v\n%s", err, stdout)
	}
	if status != 1 || res.Status != "Failed" || res.ErrorCode != converter.UnsupportedPlatform {
		t.Errorf("status %d, %+v", status, res)
	}
	if !strings.HasPrefix(stderr, "streamctl: UNSUPPORTED_PLATFORM: Conversion isn't currently supported for image platform.") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("standard error: %q", stderr)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"show"}, {"show", "a", "--repository", "b"}, {"show", "host.example/a", "--starts"}, {"show", "-n", "host.example", "--repository", "b", "--starts"}, {"update", "--repository", "a"}, {"update", "--repository", "a", "--enable-streaming", "maybe"},
		{"update", "-n", "host.example", "--repository", "a", "--enable-streaming", "true"}, {"show", "-n", "host.example", "--repository", "a"},
		{"operation", "show", "--id", "a"}, {"operation", "list"}, {"operation", "cancel", "-n", "host.example", "-t", "a:b"},
		{"operation", "show"}, {"operation", "show", "--repository", "a"}, {"operation", "show", "--id", "a", "-t", "b"},
		{"create", "host.example/a", "--no-wait"}, {"create", "host.example/a", "--wait-timeout", "1m"}, {"create", "oci:a", "--server", "http://host.example"},
		{"create", "host.example/a", "--server", "host.example"}, {"create", "host.example/a", "--server", "http://127.0.0.1:1", "--jobs", "3"},
		{"create", "host.example/a", "--server", "http://127.0.0.1:1", "-u", "a", "-p", "b"}, {"create", "host.example/a", "-u", "a"},
		{"create", "-n", "myregistry.azurecr.io", "--suffix", "tenant", "-t", "a"}, {"list-referrers", "-r", "host.example", "-n", "a", "-t", "b"},
		{"import"}, {"import", "--source", "host.example/a"}, {"import", "-n", "host.example", "--source", "oci:a"},
		{"import", "-n", "host.example", "--source", "oci:a", "-t", "b@" + digest.FromString("").String()}, {"configure"}, {"configure", "--server", "host.example"},
		{"operation", "list", "--server", "http://127.0.0.1:1", "--state", "Done"}, {"creat", "x"}, {"create"}, {"create", "a", "b"}, {"create", "--no-such-flag", "a"}, {"create", "-n", "host.example"},
		{"create", "-t", "app:v1"}, {"create", "-n", "host.example", "-t", "a:b", "c"}, {"create", "-n", "myregistry", "-t", "app:v1"},
		{"create", "Not A Name"}, {"create", "oci:"}, {"create", "oci:dir:"}, {"create", "a", "-o", "yaml"}, {"create", "a", "--chunk-size", "1GiB"},
		{"create", "a", "--chunk-size", "9999999999GiB"}, {"create", "a", "--chunk-size", "1"}, {"create", "a", "--jobs", "0"},
		{"create", "a", "--platform", "linux"}, {"create", "a", "--platform", "linux//v8"}, {"cp", "a"}, {"cp", "oci:a", "oci:b@" + digest.FromString("").String()},
		{"version", "x"}, {"verify", "a", "--force"},
	} {
		status, stdout, stderr := streamctl(t, args...)
		if status != 2 || stdout != "" || !strings.HasPrefix(stderr, "streamctl: ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("streamctl %q: status %d, %q, %q", args, status, stdout, stderr)
		}
	}
	if stdout, _ := succeed(t); !strings.Contains(stdout, "create") {
		t.Errorf("streamctl alone prints %s", stdout)
	}
}

// TestSignals: streamctl ends at once when it is told to, attaches nothing, and leaves no file, even if it is killed.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			r := registrytest.Start(t, registrytest.Options{})
			image := r.Host() + "/app:v1"
			putImage(t, image, "linux/amd64")
			stalled := lastLayer(t, image).String()
			r.Inject(func(q *http.Request) bool {
				return q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, stalled)
			}, -1, registrytest.Stall(100_000))
			temp := t.TempDir()
			cmd := exec.Command(os.Args[0], "create", image, "--temp-dir", temp, "--record", t.TempDir())
			cmd.Env = append(os.Environ(), "STREAMCTL_TEST_MAIN=run")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			exited := make(chan error, 1)
			go func() { exited <- cmd.Wait() }()
			deadline := time.After(20 * time.Second)
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for reading := false; !reading; {
				select {
				case <-deadline:
					cmd.Process.Kill()
					t.Fatalf("never read the layer: %v", <-exited)
				case <-tick.C:
					n, bytes := r.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, stalled) && q.Method == "GET" })
					reading = n > 0 && bytes >= 100_000
				}
			}
			cmd.Process.Signal(sig)
			select {
			case <-exited:
			case <-deadline:
				cmd.Process.Kill()
				t.Fatalf("did not end: %v", <-exited)
			}
			if sig != syscall.SIGKILL && (cmd.ProcessState.ExitCode() != 1 || !strings.Contains(stderr.String(), "streamctl: interrupted\n")) {
				t.Errorf("%v, %s", cmd.ProcessState, stderr.String())
			}
			if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
				t.Errorf("left %v, %v", left, err)
			}
			if out, _ := succeed(t, "list-referrers", image, "-o", "json"); !strings.Contains(out, `"manifests": []`) {
				t.Errorf("attached: %s", out)
			}
		})
	}
}

func lastLayer(t *testing.T, image string) digest.Digest {
	t.Helper()
	p, ref, err := converter.Open(image, converter.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, raw, err := p.Manifest(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m.Layers[len(m.Layers)-1].Digest
}

// TestDocumented: docs/cli.md has every command with every flag.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, s := range strings.Split(string(doc), "\n### ") {
		title, body, _ := strings.Cut(s, "\n")
		sections[strings.Trim(title, "`")] = body
	}
	commands := newRoot().Commands()
	for i := 0; i < len(commands); i++ {
		cmd := commands[i]
		commands = append(commands, cmd.Commands()...)
		if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" || cmd.HasSubCommands() {
			continue
		}
		section, ok := sections[cmd.Parent().CommandPath()+" "+cmd.Use]
		if !ok {
			t.Errorf("docs/cli.md has no section `%s %s`", cmd.Parent().CommandPath(), cmd.Use)
			continue
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !strings.Contains(section, "`--"+f.Name) {
				t.Errorf("docs/cli.md, `streamctl %s`: no --%s", cmd.Use, f.Name)
			}
		})
	}
}

// What a user mistypes is answered in words of the command line, not of a library.
func TestWrongCalls(t *testing.T) {
	cases := []struct {
		args   string
		status int
		want   string
	}{
		{"--bogus", 2, "streamctl: unknown flag: --bogus (see streamctl help)\n"},
		{"create --bogus", 2, "streamctl: create: unknown flag: --bogus (see streamctl help)\n"},
		{"inspect http://r.example/a:b", 2, "streamctl: image name \"http://r.example/a:b\": want HOST/REPO:TAG, without a scheme (see streamctl help)\n"},
	}
	for _, c := range cases {
		var out, errs strings.Builder
		if got := run(t.Context(), strings.Fields(c.args), &out, &errs); got != c.status || errs.String() != c.want || out.Len() > 0 {
			t.Errorf("%s: status %d, %q and %q; want %d, \"\" and %q", c.args, got, out.String(), errs.String(), c.status, c.want)
		}
	}
	for _, arg := range []string{"version", "--version"} {
		var out strings.Builder
		if run(t.Context(), []string{arg}, &out, &out) != 0 || out.String() != "streamctl "+version()+"\n" {
			t.Errorf("%s prints %q", arg, out.String())
		}
	}
}
