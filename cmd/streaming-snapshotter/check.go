package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
)

// check prints what c makes of this machine. It changes nothing.
func check(c config, w io.Writer) (err error) {
	dir, err := os.MkdirTemp(existing(c.Root), "streaming-snapshotter-check-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := nodefs.New(nodefs.Options{Dir: filepath.Join(dir, "devices"), Mode: c.MountMode})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	mode, why := s.Mode()
	fmt.Fprintf(w, "mount mode: %s\n", mode)
	if why != "" {
		fmt.Fprintf(w, "not taken: %s\n", why)
	}
	fmt.Fprintf(w, "stream: %s\n", c.Stream)
	return nil
}

// existing returns path or the nearest directory above it that exists: what can be mounted depends on the file system there.
func existing(path string) string {
	for path != "/" {
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			break
		}
		path = filepath.Dir(path)
	}
	return path
}
