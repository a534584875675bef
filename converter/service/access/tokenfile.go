package access

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
)

// tokenFile is a file with a token, read again when it changes: a token is renewed by replacing the file, and taken away by removing it.
type tokenFile struct {
	name string
	of   string // whose token it is, for the log
	log  *slog.Logger

	mu    sync.Mutex
	read  os.FileInfo // the file that was read, nil if there is none
	known [sha256.Size]byte
	err   error
}

// sum returns the hash of the token.
func (f *tokenFile) sum() ([sha256.Size]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// Before it is read: what changes in between is seen the next time.
	st, err := os.Stat(f.name)
	switch {
	case err != nil:
		f.read, st = nil, nil
	case Unchanged(st, f.read):
		return f.known, f.err
	default:
		f.known, err = readToken(f.name)
	}
	if err != nil && f.err == nil {
		f.log.Warn("a token is not valid any more: its file cannot be used", "token", f.of, "error", err)
	}
	f.read, f.err = st, err
	return f.known, err
}

func readToken(file string) (sum [sha256.Size]byte, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return sum, err
	}
	token := strings.TrimSpace(string(b))
	if len(token) < minToken || len(token) > maxToken {
		return sum, fmt.Errorf("%s has %d characters: a token has %d to %d", file, len(token), minToken, maxToken)
	}
	return sha256.Sum256([]byte(token)), nil
}

// Unchanged says that a file is the one that was read before, and has not been written since; before may be nil, for none.
func Unchanged(now, before os.FileInfo) bool {
	return before != nil && os.SameFile(now, before) && now.ModTime().Equal(before.ModTime()) && now.Size() == before.Size()
}
