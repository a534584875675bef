package main

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
)

// trustRule is a [[trust]] of the configuration.
type trustRule struct {
	Repositories patterns     `toml:"repositories" comment:"As in stream."`
	Policy       trust.Policy `toml:"policy" comment:"open, signed, proven or off."`
}

// minProofDeadline leaves a proof the time that it may take.
const minProofDeadline = time.Minute

// trust returns the rules of c.
func (c *config) trust() trust.Rules {
	r := trust.Rules{Default: c.TrustDefault}
	for _, rule := range c.Trust {
		r.List = append(r.List, trust.Rule{Repositories: rule.Repositories, Policy: rule.Policy})
	}
	return r
}

func (c *config) validateTrust() error {
	r := c.trust()
	if err := r.Validate(); err != nil {
		return err
	}
	if c.ProofDeadline.D < minProofDeadline {
		return fmt.Errorf("proof_deadline = %q: want %v or more", c.ProofDeadline.D, minProofDeadline)
	}
	return nil
}

// allow says why images of repo are not streamed, as a *reason.Error; nil if they may be.
func (c *config) allow(repo registryclient.Repository) error {
	if err := c.Stream.allow(repo); err != nil {
		return err
	}
	if c.trust().Of(string(repo)) == trust.Off {
		return reason.New(reason.PolicyOff, fmt.Errorf("`trust` in the configuration is off for %s", repo))
	}
	return nil
}

// gate is what is asked before an image is streamed.
type gate struct {
	allow  func(registryclient.Repository) error                          // says why not; nil lets everything in
	policy func(registryclient.Repository) (trust.Policy, trust.Verifier) // nil is trust.Open
}

// gate returns that of c. An error is one of the files in notation_dir. Answers about revocation are kept in cacheDir, or in memory if that is "".
func (c *config) gate(cacheDir string) (g gate, err error) {
	g.allow = unlessPaused(c.Root, c.allow)
	g.policy, err = c.policy(cacheDir)
	return g, err
}

// policy returns what says which policy a repository has.
func (c *config) policy(cacheDir string) (func(registryclient.Repository) (trust.Policy, trust.Verifier), error) {
	r := c.trust()
	var v trust.Verifier
	if r.Has(trust.Signed) {
		checks, err := notary.NewVerifier(notary.Options{Dir: c.NotaryDir, PluginDir: c.NotaryPlugins, CacheDir: cacheDir, HTTP: registryclient.Guarded(), Log: slog.Default()})
		if err == nil {
			err = errors.Join(checks.Check(func(repo string) bool { return r.Of(repo) == trust.Signed })...)
		}
		if err != nil {
			return nil, fmt.Errorf("notation_dir = %q: %w", c.NotaryDir, err)
		}
		v = checks
	}
	return func(repo registryclient.Repository) (trust.Policy, trust.Verifier) { return r.Of(string(repo)), v }, nil
}

// revocations is where the daemon keeps answers about revocation.
func revocations(root string) string { return filepath.Join(root, "trust", "revocation") }
