package notary

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

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

// signersAlone is d with one question left: who has signed. Not when, which timestamps prove, and not what was revoked since. Statements that enforce nothing stay as they
// are, for their own refusal.
func signersAlone(d *trustpolicy.Document) *trustpolicy.Document {
	alone := *d
	alone.TrustPolicies = slices.Clone(d.TrustPolicies)
	for i := range alone.TrustPolicies {
		s := &alone.TrustPolicies[i]
		if enforces(s) != nil {
			continue
		}
		s.SignatureVerification = trustpolicy.SignatureVerification{VerificationLevel: trustpolicy.LevelStrict.Name, Override: map[trustpolicy.ValidationType]trustpolicy.ValidationAction{
			trustpolicy.TypeExpiry: trustpolicy.ActionLog, trustpolicy.TypeAuthenticTimestamp: trustpolicy.ActionLog, trustpolicy.TypeRevocation: trustpolicy.ActionSkip,
		}}
		isTSA := func(name string) bool { return strings.HasPrefix(name, string(truststore.TypeTSA)+":") }
		if stores := slices.DeleteFunc(slices.Clone(s.TrustStores), isTSA); len(stores) > 0 {
			s.TrustStores = stores
		}
	}
	return &alone
}
