package criproxy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// The file is the header and what AES-256-GCM makes of a JSON list of entries, a random nonce of 12 bytes first; the header is authenticated with it. It is written as a whole, and
// replaced by a rename, at each change. It is not synced: after a power loss there is no key for it.
//
// The key is 32 random bytes in a file of its own, which nobody but root may read.

const (
	header  = "streaming-snapshotter credentials 1\n" // the number is the layout's
	keySize = 32
)

// load reads the file. What cannot be used is removed, and comes again with the next pulls.
func (s *Store) load() (kept []*entry, err error) {
	if s.o.Key != "" {
		if kept, err = s.read(); err == nil {
			return kept, nil
		}
	}
	if errors.Is(err, errOtherBoot) {
		err = nil // as it must be
	}
	if err != nil {
		err = fmt.Errorf("credentials of earlier pulls are lost, and images that are read with them have to be pulled again: %w", err)
	}
	if removeErr := os.Remove(s.o.File); removeErr != nil && !errors.Is(removeErr, os.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}
	return nil, err
}

var errOtherBoot = errors.New("of before the machine's start")

func (s *Store) read() ([]*entry, error) {
	if err := makeKeyDir(s.o.Key); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(s.o.File)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	key, err := readKey(s.o.Key)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errOtherBoot
	}
	if err != nil {
		return nil, err
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	if len(b) < len(header) || string(b[:len(header)]) != header {
		return nil, fmt.Errorf("%s is damaged, or another release's", s.o.File)
	}
	text, err := aead.Open(nil, nil, b[len(header):], []byte(header))
	if err != nil {
		return nil, fmt.Errorf("%s is damaged, or not of the key in %s", s.o.File, s.o.Key)
	}
	var kept []*entry
	if err := json.Unmarshal(text, &kept); err != nil || slices.Contains(kept, nil) {
		return nil, fmt.Errorf("%s is damaged", s.o.File)
	}
	return kept, nil
}

// save writes the file as things are now.
func (s *Store) save() {
	if s.o.Key == "" {
		return
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	kept := slices.Clone(s.kept) // entries do not change
	s.mu.Unlock()
	err := s.write(kept)
	if failed := err != nil; failed != s.failed {
		if s.failed = failed; failed {
			err = fmt.Errorf("credentials are not kept over a restart of the daemon: %w", err)
		}
		s.tell(err)
	}
}

func (s *Store) write(kept []*entry) (err error) {
	if len(kept) == 0 {
		if err := os.Remove(s.o.File); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	// Whatever fails, what is there must not be taken for what is kept: it may have what was dropped.
	defer func() {
		if err != nil {
			os.Remove(s.o.File)
		}
	}()
	key, err := readKey(s.o.Key)
	if err != nil {
		if key, err = makeKey(s.o.Key); err != nil {
			return err
		}
	}
	aead, err := newAEAD(key)
	if err != nil {
		return err
	}
	text, err := json.Marshal(kept)
	if err != nil {
		return err
	}
	return replace(s.o.File, aead.Seal([]byte(header), nil, text, []byte(header)))
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// readKey reads a key that nobody else may have made or read.
func readKey(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("key %s: want a file that nobody but its owner, user %d, may read: remove it, and another one is made", name, os.Geteuid())
	}
	key := make([]byte, keySize+1)
	if n, _ := f.ReadAt(key, 0); n != keySize {
		return nil, fmt.Errorf("key %s: want %d bytes: remove it, and another one is made", name, keySize)
	}
	return key[:keySize], nil
}

// makeKey makes a new key, in the place of one that is of no use.
func makeKey(name string) ([]byte, error) {
	if err := makeKeyDir(name); err != nil {
		return nil, err
	}
	key := make([]byte, keySize)
	rand.Read(key) // does not fail
	return key, replace(name, key)
}

// makeKeyDir makes the directory of the key at name, which a reboot must take away.
func makeKeyDir(name string) error {
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%s is not on a tmpfs, and a key there would outlive the machine's start: set `cri_credentials_key` to a place below /run", dir)
	}
	return nil
}

// replace makes name a file of b, whole or not at all if the process dies.
func replace(name string, b []byte) error {
	tmp := name + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, name)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}
