package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// dump returns the configuration in effect as containerd's program would have it if files were in their places. In a mount namespace of its own they are,
// on overlays of the directories that are there: nobody else sees them, and paths mean what they mean on the host.
func (in *installer) dump(ctx context.Context, files []file) ([]byte, error) {
	type result struct {
		dump []byte
		err  error
	}
	scratch, err := os.MkdirTemp(scratchDir, scratchName)
	if err != nil {
		return nil, err
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		b, err := in.dumpHere(ctx, files, scratch)
		done <- result{b, err}
	}()
	r := <-done
	return r.dump, errors.Join(r.err, os.Remove(scratch)) // what is mounted on it is in the namespace
}

const scratchDir, scratchName = "/run", "streaming-snapshotter-install-"

// removeScratch removes what killed ones have left: empty directories.
func removeScratch() {
	left, _ := filepath.Glob(filepath.Join(scratchDir, scratchName+"*")) // the pattern is well
	for _, dir := range left {
		_ = unix.Rmdir(dir)
	}
}

func (in *installer) dumpHere(ctx context.Context, files []file, scratch string) ([]byte, error) {
	if len(files) > 0 {
		if err := pretend(files, scratch); err != nil {
			return nil, fmt.Errorf("show containerd's program the new configuration: %w", err)
		}
	}
	return Dump(ctx, in.c.Program, in.c.Config)
}

// Dump returns what a containerd's program makes of its configuration file, which need not be there, with what it imports.
func Dump(ctx context.Context, program, config string) ([]byte, error) {
	b, err := dump(ctx, program, config)
	if err == nil {
		return b, nil
	}
	if _, missing := os.Stat(config); errors.Is(missing, fs.ErrNotExist) { // containerd 1.7 starts so, and does not print what that comes to
		return dump(ctx, program, os.DevNull)
	}
	return nil, err
}

func dump(ctx context.Context, program, config string) ([]byte, error) {
	c := exec.CommandContext(ctx, program, "--config", config, "config", "dump")
	var said bytes.Buffer
	c.Stderr = &said
	b, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, strings.TrimSpace(said.String()))
	}
	return b, nil
}

// pretend puts files into their places for this thread alone.
func pretend(files []file, scratch string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, ""); err != nil {
		return err
	}
	var dirs []string
	for _, f := range files {
		dir := filepath.Dir(f.Path)
		for dir != "/" {
			if _, err := os.Stat(dir); err == nil {
				break
			}
			dir = filepath.Dir(dir)
		}
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	slices.Sort(dirs) // a directory before those in it
	for i, dir := range dirs {
		upper, work := fmt.Sprintf("%s/upper%d", scratch, i), fmt.Sprintf("%s/work%d", scratch, i)
		if err := os.Mkdir(upper, 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(work, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("overlay on %s: %w", dir, err)
		}
	}
	for _, f := range files {
		if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
			return err
		}
		if err := os.Remove(f.Path); err != nil && !os.IsNotExist(err) {
			return err
		}
		if !f.Absent {
			if err := os.WriteFile(f.Path, f.data, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
