package main

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxLog is how large, in bytes, a log gets before its content becomes that of a second file, in the place of what that had.
	maxLog = 16 << 20
	// logEvery is how often that is looked at. What is written meanwhile comes on top.
	logEvery = 5 * time.Second
)

// keepLog has this process, and those that it starts from then on, write to the end of the file name, which it keeps from growing until stop.
func keepLog(name string) (stop func(), err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := errors.Join(unix.Dup3(int(f.Fd()), unix.Stdout, 0), unix.Dup3(int(f.Fd()), unix.Stderr, 0)); err != nil {
		return nil, err
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(logEvery)
		defer tick.Stop()
		for failed := false; ; {
			err := turnLog(name, maxLog)
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

// turnLog copies the content of the file name to name.1 and empties it, if it is larger than most bytes. The file itself stays: who writes has it open, and at its end.
func turnLog(name string, most int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() <= most {
		return err
	}
	to, err := os.OpenFile(name+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, f)
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return f.Truncate(0) // a line that was written after the copy's end is lost
}
