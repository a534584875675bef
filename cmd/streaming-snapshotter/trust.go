package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
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
	if r.Has(trust.Signed) || r.Has(trust.Proven) {
		return errors.New(`this release knows no policy but "open" and "off" yet`)
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
