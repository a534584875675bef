package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
)

// terminal opens a pseudo terminal.
func terminal(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	if err := unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

// The status says of each image how much of it is here and how it is read, once, again and again, and on a terminal in one place.
func TestStatusOfImages(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	config := writeConfig(t, root, address)
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']\nbackground_bandwidth = '0'")
	p := serving(t, config, address)
	t.Cleanup(func() { // when the containers are unmounted
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
	})
	sn := connect(t, address)
	one, manifest := streamed(t, sn, reg.Host()+"/one:v1")
	streamed(t, sn, reg.Host()+"/two:v1")
	files, err := filepath.Glob(filepath.Join(one, "*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("got files %q, %v, want two", files, err)
	}
	if _, err := os.ReadFile(files[0]); err != nil {
		t.Fatal(err)
	}
	s := askStatus(t, config, func(s status) bool { return len(s.Images) == 2 && s.Images[0].Local > 0 })
	a, b := s.Images[0], s.Images[1]
	if a.Ref != reg.Host()+"/one:v1" || a.Manifest.String() != manifest || a.Layers != 2 || a.Through != 1 || a.Direct != 0 || a.Complete {
		t.Errorf("got %+v", a)
	}
	if a.Size < 20_000 || a.Local >= a.Size || a.Reads.Misses == 0 || a.Reads.MissedBytes < 10_000 || a.Reads.MissedBytes > a.Local {
		t.Errorf("of an image that was read by half: %+v", a)
	}
	if b.Ref != reg.Host()+"/two:v1" || b.Reads.Misses != 0 || b.Local > a.Local {
		t.Errorf("of an image that was not read: %+v", b)
	}

	only := func(ref string) status {
		out, err := statusCommand(config, "-o", "json", ref).Output()
		var s status
		if err == nil {
			err = json.Unmarshal(out, &s)
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, ref := range []string{a.Ref, string(a.Repository) + "@" + manifest, string(a.Repository)} {
		if s := only(ref); len(s.Images) != 1 || s.Images[0].ID != a.ID {
			t.Errorf("%s: got %+v", ref, s.Images)
		}
	}
	if s := only(reg.Host() + "/three"); len(s.Images) != 0 {
		t.Errorf("got %+v", s.Images)
	}

	watch(t, config, nil, func(out string) bool {
		return strings.Count(out, "\nIMAGE ") >= 2 && strings.Contains(out, "\nrates: ") && strings.Contains(out, a.Ref) && !strings.Contains(out, "\x1b")
	})
	watch(t, config, []string{"-o", "json"}, func(out string) bool {
		lines := strings.Split(out, "\n")
		return len(lines) > 2 && json.Unmarshal([]byte(lines[1]), new(status)) == nil
	})
	ours, theirs := terminal(t)
	c := statusCommand(config, "-w", "--interval", "50ms")
	c.Stdout = theirs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	untilSaid(t, ours, func(out string) bool {
		return strings.Count(out, "\x1b[H\x1b[2J") >= 2 && strings.Contains(out, "rates: ")
	})
	c.Process.Signal(os.Interrupt)
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	unix.Unmount(one, 0)
	s = askStatus(t, config, func(status) bool { return true })
	if len(s.Images) != 2 || s.Images[0].Size != a.Size {
		t.Errorf("after the unmount: %+v", s.Images)
	}
}

func statusCommand(config string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], append([]string{"status", "--config", config}, args...)...)
	c.Env = append(os.Environ(), asCommand+"=1")
	return c
}

// watch runs `status -w` until want is true of what it has printed.
func watch(t *testing.T, config string, args []string, want func(out string) bool) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := statusCommand(config, append(args, "-w", "--interval", "50ms")...)
	c.Stdout = w
	err = c.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	untilSaid(t, r, want)
	c.Process.Signal(os.Interrupt)
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}

// untilSaid reads f until want is true of it.
func untilSaid(t *testing.T, f *os.File, want func(out string) bool) {
	t.Helper()
	late := time.AfterFunc(30*time.Second, func() { f.Close() })
	defer late.Stop()
	var out bytes.Buffer
	p := make([]byte, 64<<10)
	for !want(strings.ReplaceAll(out.String(), "\r\n", "\n")) {
		n, err := f.Read(p)
		out.Write(p[:n])
		if err != nil {
			t.Fatalf("%v after\n%s", err, &out)
		}
	}
}

// What an image's author or a registry has written cannot clear root's terminal, nor make lines.
func TestStatusIsPrintable(t *testing.T) {
	const evil = "evil\x1b[2J\u009b2J\x7f\u202e\r\n\U000e0001name"
	s := status{
		SafeMode: evil, Paused: evil, MountMode: evil, NotTaken: evil, Stream: patterns{evil}, CacheError: evil, NotCaching: true, Problems: []string{evil},
		Hosts: []host{{Registry: evil, Host: "h", State: "away", Error: evil, Credentials: []string{evil}}}, Background: &stream.Background{Image: evil},
		NotStreamed: []normalPull{{Image: evil, Reason: evil, At: evil}},
		Images:      []imageStatus{{Ref: evil}, {ImageStatus: stream.ImageStatus{Repository: evil, Manifest: evil}}},
	}
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := newSocket(socket)
	if err != nil {
		t.Fatal(err)
	}
	daemon := http.Server{Handler: (&admin{ask: func(time.Duration) status { return s }}).private()}
	go daemon.Serve(l) // until Close
	defer daemon.Close()
	for _, asJSON := range []bool{false, true} {
		var b bytes.Buffer
		if err := showStatus(t.Context(), statusOptions{root: filepath.Dir(socket), json: asJSON}, &b); err != nil {
			t.Fatal(err)
		}
		if i := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }); i >= 0 || strings.Contains(b.String(), "\nname") || !strings.Contains(b.String(), `evil\u001b[2J\u009b2J\u007f\u202e\`) {
			t.Errorf("JSON %v: byte %d of\n%s", asJSON, i, &b)
		}
		if asJSON {
			var got status
			if err := json.Unmarshal(b.Bytes(), &got); err != nil || len(got.Images) != 2 || got.Images[0].Ref != evil {
				t.Errorf("got %+v, %v", got.Images, err)
			}
		}
	}
}
