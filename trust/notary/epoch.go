package notary

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/verifier/truststore"
)

const (
	// maxHashed bytes of a file and maxHashedFiles files are compared by what is in them, others by their status.
	maxHashed      = 1 << 20
	maxHashedFiles = 1000
	// racy is how young a change is whose successor may have the same times: file systems count them in ticks of some milliseconds, some in seconds.
	racy = 2 * time.Second
)

// epochs turns what is in the files of the trust policy and the trust store into a text. What is in them counts, and neither when nor how often it was written. They are read again
// when their status is another; that alone is looked at otherwise.
type epochs struct {
	mu     sync.Mutex
	status string // of the files when they were read last; "" if one had changed just before
	epoch  string
}

// of returns the epoch of the files below directory.
func (e *epochs) of(directory string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	status, newest := statusOf(directory) // before: what changes meanwhile is read again
	if e.status == "" || e.status != status {
		e.status, e.epoch = status, contentOf(directory)
		if time.Since(newest) < racy {
			e.status = ""
		}
	}
	return e.epoch
}

// statusOf is another text when a file may have been changed, and the time of the last change.
func statusOf(directory string) (status string, newest time.Time) {
	h := sha256.New()
	look(directory, func(name string, i fs.FileInfo, err error) {
		at := noteStatus(h, name, i, err)
		if at.After(newest) {
			newest = at
		}
	})
	return hex.EncodeToString(h.Sum(nil)), newest
}

// noteStatus writes the status of a file, and returns when that changed last.
func noteStatus(h hash.Hash, name string, i fs.FileInfo, err error) time.Time {
	if err != nil {
		fmt.Fprintf(h, "%q %v\n", name, err)
		return time.Time{}
	}
	at, inode := i.ModTime(), uint64(0)
	if s, ok := i.Sys().(*syscall.Stat_t); ok { // ctime: nobody sets it back
		at, inode = time.Unix(s.Ctim.Unix()), s.Ino
	}
	fmt.Fprintf(h, "%q %v %d %d %d %d\n", name, i.Mode(), i.Size(), i.ModTime().UnixNano(), at.UnixNano(), inode)
	return at
}

// contentOf changes with what is in the files.
func contentOf(directory string) string {
	h := sha256.New()
	n := 0
	look(directory, func(name string, i fs.FileInfo, err error) {
		n++
		switch path := filepath.Join(directory, name); {
		case err != nil:
			fmt.Fprintf(h, "%q absent %t\n", name, errors.Is(err, fs.ErrNotExist))
		case i.Mode().IsRegular() && i.Size() <= maxHashed && n <= maxHashedFiles:
			fmt.Fprintf(h, "%q %s\n", name, hashOf(path))
		case i.IsDir():
			fmt.Fprintf(h, "%q directory\n", name)
		default:
			noteStatus(h, name, i, nil) // notation follows no symlink here
		}
	})
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// hashOf is the digest of a file, or that it cannot be read.
func hashOf(path string) string {
	h := sha256.New()
	f, err := os.Open(path)
	if err == nil {
		defer f.Close()
		_, err = io.Copy(h, io.LimitReader(f, maxHashed+1))
	}
	if err != nil {
		return "unreadable"
	}
	return hex.EncodeToString(h.Sum(nil))
}

// look calls see for the trust policy and for the trust stores with what is in them, in order. As with notation the directories above a store may be symlinks; the others are
// seen as what they are. An error is in the place of what could not be looked at.
func look(directory string, see func(name string, i fs.FileInfo, err error)) {
	one := func(name string) (isDir bool) {
		i, err := os.Lstat(filepath.Join(directory, name))
		see(name, i, err)
		return err == nil && i.IsDir()
	}
	list := func(name string) []fs.DirEntry {
		entries, err := os.ReadDir(filepath.Join(directory, name))
		if err != nil {
			see(name, nil, err)
		}
		return entries
	}
	one(dir.PathTrustPolicy)
	for _, kind := range truststore.Types {
		for _, store := range list(dir.X509TrustStoreDir(string(kind))) {
			name := dir.X509TrustStoreDir(string(kind), store.Name())
			if one(name) {
				for _, file := range list(name) {
					one(filepath.Join(name, file.Name()))
				}
			}
		}
	}
}
