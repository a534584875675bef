package main

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/install"
)

const (
	// maxLog is how large, in bytes, a log gets before its content becomes that of a second file, in the place of what that had.
	maxLog = 16 << 20
	// logEvery is how often that is looked at. What is written meanwhile comes on top.
	logEvery = 5 * time.Second
	// logEnv says to a daemon which file its supervisor keeps as the log.
	logEnv = "STREAMING_SNAPSHOTTER_LOG"
)

// keepLog has this process, and those that it starts from then on, write to the end of the file name, until stop. Where others rename or remove it, as logrotate does, it is made again. If turn is
// true it is kept from growing.
func keepLog(name string, turn bool) (stop func(), err error) {
	if err := takeLog(name); err != nil {
		return nil, err
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(logEvery)
		defer tick.Stop()
		for failed := false; ; {
			err := takeLog(name)
			if err == nil && turn {
				err = turnLog(name, maxLog)
			}
			if err != nil && !failed {
				slog.Warn("the log grows", "file", name, "error", err)
			}
			failed = err != nil
			select {
			case <-end:
				return
			case <-tick.C:
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}, nil
}

// takeLog makes the file name the standard output and error of this process, if it is not.
func takeLog(name string) error {
	f, err := install.OpenLog(name)
	if err != nil {
		return err
	}
	defer f.Close()
	is, err := f.Stat()
	for _, out := range []*os.File{os.Stdout, os.Stderr} {
		was, statErr := out.Stat()
		if err == nil && (statErr != nil || !os.SameFile(was, is)) {
			err = unix.Dup3(int(f.Fd()), int(out.Fd()), 0)
		}
	}
	return err
}

// turnLog copies the content of the file name to name.1 and empties it, if it is larger than most bytes. The file itself stays: who writes has it open, and at its end.
func turnLog(name string, most int64) error {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() <= most {
		return err
	}
	to, err := install.OpenLog(name + ".1")
	if err != nil {
		return err
	}
	err = to.Truncate(0)
	if err == nil {
		_, err = io.Copy(to, f)
	}
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return f.Truncate(0) // a line that was written after the copy's end is lost
}
