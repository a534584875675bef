// Command guest is what runs inside the containers of the tests: a static program that needs nothing of its image.
//
//	guest pause         waits for a signal: a pod's pause container
//	guest sum DIR...    prints "SHA256 PATH" for each regular file below DIR, or "ERRNO PATH" if it cannot be read, and "done" at the end
//	guest map FILE      reads the file through a memory map: page faults; and prints "done"
//	guest direct FILE   reads the file past the page cache (O_DIRECT), and prints "done"
//	guest watch DIR     does that for ever, and prints "pass SHA256" after each round: the sum of what sum would have printed; and what could not be read
//	guest every DIR PROGRAM ARGS...
//	                    runs the program for ever, and prints "pass OUTPUT" after each success; and how it failed, with its output
//
// The files below DIR are dropped from the page cache first, so that what is compared is read from below.
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: guest pause | sum DIR... | map FILE | direct FILE | watch DIR | every DIR PROGRAM ARGS...")
		os.Exit(2)
	}
	switch os.Args[1] {
	case "pause":
		c := make(chan os.Signal, 1)
		signal.Notify(c, os.Interrupt, syscall.SIGTERM)
		<-c
	case "sum":
		for _, dir := range os.Args[2:] {
			sum(os.Stdout, dir)
		}
		fmt.Println("done")
	case "map", "direct":
		read := mapFile
		if os.Args[1] == "direct" {
			read = readDirect
		}
		if err := read(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("done")
	case "watch":
		for {
			watch(os.Args[2])
		}
	case "every":
		for {
			every(os.Args[2], os.Args[3:])
		}
	default:
		fmt.Fprintf(os.Stderr, "guest: unknown command %q\n", os.Args[1])
		os.Exit(2)
	}
}

func watch(dir string) {
	h := sha256.New()
	for _, l := range sum(h, dir) {
		fmt.Println(l)
	}
	fmt.Printf("pass %x\n", h.Sum(nil))
}

func every(dir string, args []string) {
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if f, err := os.Open(path); err == nil {
				forget(f)
				f.Close()
			}
		}
		return nil
	})
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		fmt.Printf("%s: %v: %s\n", args[0], err, text)
		return
	}
	fmt.Println("pass", text)
}

// sum writes a line for each file to w, and returns those of files that cannot be read.
func sum(w io.Writer, dir string) (failed []string) {
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
			failed = append(failed, dgst+" "+path)
		}
		fmt.Fprintln(w, dgst, path)
		return nil
	})
	return failed
}

// forget drops f from the page cache; overlayfs passes this on to the file below.
func forget(f *os.File) { unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

func mapFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	sha256.Sum256(b)
	return nil
}

func readDirect(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := unix.Mmap(-1, 0, 128<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // aligned
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	for {
		if n, err := f.Read(b); n == 0 {
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}

func sumFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	forget(f)
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
