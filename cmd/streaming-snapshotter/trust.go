package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
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
	return c.allowByTrust(repo)
}

// allowByTrust is the part of allow that is the trust policy's.
func (c *config) allowByTrust(repo registryclient.Repository) error {
	if c.trust().Of(string(repo)) == trust.Off {
		return reason.New(reason.PolicyOff, fmt.Errorf("`trust` in the configuration is off for %s", repo))
	}
	return nil
}

// gate is what is asked before an image is streamed.
type gate struct {
	allow  func(registryclient.Repository) error                          // says why not; nil lets everything in
	policy func(registryclient.Repository) (trust.Policy, trust.Verifier) // stream.Options.Policy; nil is trust.Open
}

// gate returns that of c. An error is one of the files in notation_dir: beside it the gate lets no signature pass, as long as it is there. Answers about revocation are kept in cacheDir, or in memory if
// that is "".
func (c *config) gate(cacheDir string) (g gate, err error) {
	g.allow = unlessPaused(c.Root, c.allow)
	g.policy, err = c.policy(cacheDir)
	return g, err
}

// policy returns stream.Options.Policy, also beside an error, see gate.
func (c *config) policy(cacheDir string) (func(registryclient.Repository) (trust.Policy, trust.Verifier), error) {
	r := c.trust()
	var v trust.Verifier
	var err error
	if r.Has(trust.Signed) {
		var checks *notary.Verifier
		checks, err = notary.NewVerifier(notary.Options{Dir: c.NotaryDir, PluginDir: c.NotaryPlugins, CacheDir: cacheDir, HTTP: registryclient.Guarded(), Log: slog.Default()})
		if err == nil {
			err = errors.Join(checks.Check(func(repo string) bool { return r.Of(repo) == trust.Signed })...)
		}
		if err != nil {
			err = fmt.Errorf("notation_dir = %q: %w", c.NotaryDir, err)
		}
		v = checks
	}
	return func(repo registryclient.Repository) (trust.Policy, trust.Verifier) { return r.Kept(string(repo)), v }, err
}

// keptTrust is what the configuration of the last start that was a success says about trust: in safe mode it holds where the configuration cannot be read.
type keptTrust struct {
	Default trust.Policy `json:"default"`
	Rules   []trustRule  `json:"rules"`
	Dir     string       `json:"notationDir"`
	Plugins string       `json:"notationPluginDir"`
}

// keptTrustName is its file, in the directory of the ledger.
const keptTrustName = "policy.json"

// keepTrust writes that of c down.
func (c *config) keepTrust() error {
	b, err := json.Marshal(keptTrust{c.TrustDefault, c.Trust, c.NotaryDir, c.NotaryPlugins})
	if err != nil {
		return err
	}
	dir := filepath.Join(c.Root, "trust")
	if old, err := os.ReadFile(filepath.Join(dir, keptTrustName)); err == nil && bytes.Equal(old, b) {
		return nil
	}
	return ledger.WriteFile(dir, keptTrustName, b)
}

// recallTrust puts it into c, if there is one.
func (c *config) recallTrust() error {
	b, err := os.ReadFile(filepath.Join(c.Root, "trust", keptTrustName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var k keptTrust
	if err == nil {
		err = json.Unmarshal(b, &k)
	}
	with := *c
	with.TrustDefault, with.Trust, with.NotaryDir, with.NotaryPlugins = k.Default, k.Rules, k.Dir, k.Plugins
	if err == nil {
		err = with.validateTrust()
	}
	if err == nil {
		*c = with
	}
	return err
}

// revocations is where the daemon keeps answers about revocation.
func revocations(root string) string { return filepath.Join(root, "trust", "revocation") }
