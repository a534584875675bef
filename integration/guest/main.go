// Command guest is what runs inside the containers of the tests: a static program that needs nothing of its image.
//
//	guest pause         waits for a signal: a pod's pause container
//	guest sum DIR...    prints "SHA256 PATH" for each regular file below DIR, or "ERRNO PATH" if it cannot be read, and "done" at the end
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: guest pause | sum DIR...")
		os.Exit(2)
	}
	switch os.Args[1] {
	case "pause":
		c := make(chan os.Signal, 1)
		signal.Notify(c, os.Interrupt, syscall.SIGTERM)
		<-c
	case "sum":
		for _, dir := range os.Args[2:] {
			sum(dir)
		}
		fmt.Println("done")
	default:
		fmt.Fprintf(os.Stderr, "guest: unknown command %q\n", os.Args[1])
		os.Exit(2)
	}
}

func sum(dir string) {
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.Type().IsRegular() {
			return nil
		}
		var dgst string
		if err == nil {
			dgst, err = sumFile(path)
		}
		if err != nil {
			var errno syscall.Errno
			errors.As(err, &errno)
			dgst = fmt.Sprintf("errno=%d", errno)
		}
		fmt.Println(dgst, path)
		return nil
	})
}

func sumFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
