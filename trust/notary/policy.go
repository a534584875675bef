package notary

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
)

// readPolicy reads trustpolicy.json as notation's own function does, which only knows the directory of the user that runs it: symlinks are refused.
func readPolicy(directory string) (*trustpolicy.Document, error) {
	path := filepath.Join(directory, dir.PathTrustPolicy)
	i, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("trust policy: %w", err)
	}
	if !i.Mode().IsRegular() {
		return nil, fmt.Errorf("trust policy: %s is no regular file: notation follows no symlinks, copy it", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("trust policy: %w", err)
	}
	d, err := decodePolicy(b)
	if err != nil {
		return nil, fmt.Errorf("trust policy %s: %w", path, err)
	}
	return d, nil
}

func decodePolicy(b []byte) (*trustpolicy.Document, error) {
	var d trustpolicy.Document
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, err
	}
	if err := d.Validate(); err != nil {
		return nil, err
	}
	return &d, nil
}

// enforces is nil if what passes the statement is authentic: notation-go's Verify is content with level skip, and with a chain to nowhere at level audit.
func enforces(s *trustpolicy.TrustPolicy) error {
	level, err := s.SignatureVerification.GetVerificationLevel()
	if err != nil {
		return fmt.Errorf("statement %q of the trust policy: %w", s.Name, err)
	}
	if a := level.Enforcement[trustpolicy.TypeAuthenticity]; a != trustpolicy.ActionEnforce || level.Enforcement[trustpolicy.TypeIntegrity] != trustpolicy.ActionEnforce {
		return fmt.Errorf("statement %q of the trust policy lets everybody sign: its level is %s, authenticity is %q; strict and permissive enforce it", s.Name, s.SignatureVerification.VerificationLevel, a)
	}
	return nil
}

func mayApply(s *trustpolicy.TrustPolicy, applies func(string) bool) bool {
	return slices.ContainsFunc(s.RegistryScopes, func(scope string) bool { return scope == "*" || applies(scope) })
}

func (t *trusted) checkStore(s *trustpolicy.TrustPolicy, name string) error {
	kind, store, _ := strings.Cut(name, ":")
	if _, err := t.store.GetCertificates(context.Background(), truststore.Type(kind), store); err != nil {
		return fmt.Errorf("statement %q of the trust policy: trust store %s: %w", s.Name, name, errors.Join(err, errors.Unwrap(err)))
	}
	return nil
}

// stamp changes with the trust policy and the trust store below directory: names, sizes, times and inodes.
func stamp(directory string) string {
	h := sha256.New()
	note := func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			var i fs.FileInfo
			if i, err = e.Info(); err == nil {
				inode := uint64(0)
				if s, ok := i.Sys().(*syscall.Stat_t); ok {
					inode = s.Ino
				}
				fmt.Fprintln(h, path, i.Mode(), i.Size(), i.ModTime().UnixNano(), inode)
			}
		}
		if err != nil {
			fmt.Fprintln(h, path, err) // what cannot be read now and can be later is a change
		}
		return nil
	}
	for _, name := range []string{dir.PathTrustPolicy, dir.TrustStoreDir} {
		filepath.WalkDir(filepath.Join(directory, name), note)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
