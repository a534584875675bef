package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The log of `supervise --log` is what both write, and stays below its limit while they do.
func TestSuperviseLog(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "log")
	early := []byte("what was there")
	if err := os.WriteFile(name, early, 0o600); err != nil {
		t.Fatal(err)
	}
	grow := func() {
		if err := os.Truncate(name, maxLog+1); err != nil {
			t.Fatal(err)
		}
	}
	grow()
	config := writeConfig(t, filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"))
	if err := os.WriteFile(filepath.Join(dir, "root"), nil, 0o600); err != nil { // the daemon says so, again and again
		t.Fatal(err)
	}
	p := start(t, "supervise", "--log", name, "--", "serve", "--config", config)
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				text, _ := os.ReadFile(name)
				t.Fatalf("%s: not within 30 s\n%.1000s", what, text)
			}
		}
	}
	turned := func(first []byte) {
		t.Helper()
		until("a log that is turned", func() bool {
			old, err := os.ReadFile(name + ".1")
			fi, err2 := os.Stat(name)
			return err == nil && err2 == nil && len(old) > maxLog && bytes.HasPrefix(old, first) && fi.Size() < maxLog
		})
	}
	turned(early)
	var text []byte
	until("the supervisor's lines, and the daemon's", func() bool {
		text, _ = os.ReadFile(name)
		return bytes.Contains(text, []byte("is run again")) && bytes.Contains(text, []byte(filepath.Join(dir, "root")))
	})
	grow()
	turned(text)
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Log(err) // the daemon's, if it was running
	}
	if p.stderr.Len() > 0 {
		t.Errorf("on standard error: %s", &p.stderr)
	}
	p.wantNothingLeft()
}

// What others do to the log and its directory: where they rotate it, the supervisor and the daemon that runs write to the new file; where they have put a link, nothing is written.
func TestSuperviseLogOfOthers(t *testing.T) {
	dir := t.TempDir()
	name, other := filepath.Join(dir, "log"), filepath.Join(dir, "other")
	if err := errors.Join(os.WriteFile(other, []byte("kept"), 0o600), os.Symlink(other, name)); err != nil {
		t.Fatal(err)
	}
	config := writeConfig(t, filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"))
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "root", "devices"), unix.MNT_DETACH) })
	args := []string{"supervise", "--log", name, "--", "serve", "--config", config}
	start(t, args...).wantFailure("too many levels of symbolic links")
	if err := errors.Join(os.Remove(name), os.Symlink(other, name+".1")); err != nil {
		t.Fatal(err)
	}
	p := start(t, args...)
	waitForSocket(t, filepath.Join(dir, "s.sock"))
	daemon := p.child(0) // the one that serves
	if err := errors.Join(os.Truncate(name, maxLog+1), os.Rename(name, name+".2")); err != nil {
		t.Fatal(err)
	}
	for _, fd := range []string{fmt.Sprintf("/proc/%d/fd/1", p.Process.Pid), fmt.Sprintf("/proc/%d/fd/2", p.Process.Pid), fmt.Sprintf("/proc/%d/fd/1", daemon), fmt.Sprintf("/proc/%d/fd/2", daemon)} {
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if at, err := os.Readlink(fd); err == nil && at == name {
				break
			} else if time.Now().After(deadline) {
				text, _ := os.ReadFile(name + ".2")
				t.Fatalf("%s is %s, %v; the log:\n%s", fd, at, err, bytes.TrimLeft(text, "\x00"))
			}
		}
	}
	if err := os.Truncate(name, maxLog+1); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if text, err := os.ReadFile(name); err == nil && bytes.Contains(text, []byte("the log grows")) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("nothing is said of a link: %v", err)
		}
	}
	p.signal(unix.SIGTERM)
	if err := p.wait(); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(other); err != nil || string(text) != "kept" {
		t.Errorf("what the links are to has %d bytes, %v", len(text), err)
	}
	p.wantUnmounted(filepath.Join(dir, "root"))
}
