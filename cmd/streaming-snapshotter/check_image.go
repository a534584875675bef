package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// imageReport is what was found of an image.
type imageReport struct {
	Ref      string       `json:"ref"`
	Manifest string       `json:"manifest,omitempty"` // the platform manifest's digest
	Hosts    []hostReport `json:"hosts"`
	Artifact string       `json:"artifact,omitempty"` // the hex of its manifest's digest
	Layers   int          `json:"layers,omitempty"`
	Reason   reason.Code  `json:"reason,omitempty"` // it would not be streamed
	Error    string       `json:"error,omitempty"`
	Remedy   string       `json:"remedy,omitempty"`
	Policy   trust.Policy `json:"policy"`              // of the repository
	Signer   string       `json:"signer,omitempty"`    // of the artifact, if the policy is signed
	Issuer   string       `json:"issuer,omitempty"`    // of the signer's certificate
	Warnings []string     `json:"warnings,omitempty"`  // about the signature, which the trust policy only logs
	Unknown  string       `json:"unknown,omitempty"`   // the image itself could not be found
	LastPull *normalPull  `json:"last_pull,omitempty"` // that was not streamed, as the daemon remembers
}

// hostReport is what a host of the image's registry answers when it is asked for the image.
type hostReport struct {
	Host         string   `json:"host"`
	Capabilities string   `json:"capabilities"`
	Credentials  []string `json:"credentials,omitempty"` // the sources of those that it has let in; none: it asks for none
	Error        string   `json:"error,omitempty"`       // "": it has the image
}

// checkImage looks for the artifact of o.ref as a pull does, with files of its own in dir. cri has what came with pulls; nil without the proxy of CRI. refused has what is in
// quarantine; nil if that is not known.
func checkImage(ctx context.Context, c config, o checkOptions, dir string, cri *criproxy.Store, refused *ledger.Ledger) (_ *imageReport, err error) {
	r := &imageReport{Ref: o.ref, Hosts: []hostReport{}}
	repo, _, _, err := registryclient.ParseReference(o.ref)
	if err != nil {
		return nil, err
	}
	r.Policy = c.trust().Of(string(repo))
	matcher, err := platformMatcher(o.platform)
	if err != nil {
		return nil, err
	}
	logins := newSources(c, cri)
	defer func() { err = errors.Join(err, logins.close()) }()
	reg, err := newRegistry(c, logins)
	if err != nil {
		return nil, err
	}
	defer reg.Close()
	images, end, err := newSearch(c, reg, dir, refused)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := r.askHosts(ctx, reg, c.ResolveTimeout.D); err != nil {
		return nil, err
	}
	asked, cancel := context.WithTimeout(ctx, c.ResolveTimeout.D)
	defer cancel()
	manifest, err := resolve(asked, reg, mountOptions{ref: o.ref, platform: o.platform}, matcher)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		if !errors.Is(err, registryclient.ErrHosts) && asked.Err() == nil || errors.Is(err, registryclient.ErrNotFound) {
			r.Unknown = err.Error()
		} else {
			r.notStreamed(stream.WithReason(err))
		}
		return r, nil
	}
	r.Manifest = manifest.String()
	id, chainIDs, err := images.Find(ctx, o.ref, manifest)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		r.notStreamed(err)
		return r, nil
	}
	r.Artifact, r.Layers = id, len(chainIDs)
	t := images.Signature(id, repo)
	r.Signer, r.Issuer, r.Warnings = t.Signer, t.Issuer, t.Warnings
	return r, nil
}

// newSearch returns what looks for artifacts with files of its own in dir, and mounts nothing.
func newSearch(c config, reg *registryclient.Client, dir string, refused *ledger.Ledger) (images *stream.Store, end func() error, err error) {
	g, err := c.gate("")
	if err != nil {
		return nil, nil, err
	}
	root := filepath.Join(dir, "image")
	chunks, err := cache.Open(filepath.Join(root, "cache"), cache.Options{Index: stream.Indexes(root)})
	if err != nil {
		return nil, nil, err
	}
	images, err = stream.New(stream.Options{
		Root: root, Registry: reg, Cache: chunks, Allow: g.allow, Policy: g.policy, Timeout: c.ResolveTimeout.D, NoReadAhead: true, Trust: stream.Trust{Ledger: refused},
	})
	if err != nil {
		return nil, nil, errors.Join(err, chunks.Close())
	}
	return images, func() error {
		images.EndSearches()
		return chunks.Close()
	}, nil
}

// askImage is checkImage by the daemon, if one answers: it has what came with pulls through the proxy of CRI, and its own environment.
func (r *checkReport) askImage(ctx context.Context, c config, o checkOptions, dir string) (image *imageReport, err error) {
	err = errors.New("no daemon")
	if r.Daemon != "" {
		err = askDaemon(ctx, c.Root, "/check?"+url.Values{"ref": {o.ref}, "platform": {o.platform}}.Encode(), &image)
	}
	if err != nil {
		image, err = checkImage(ctx, c, o, dir, nil, nil)
	}
	if err == nil && image.Manifest != "" {
		image.askLast(ctx, c.Root)
	}
	return image, err
}

// check returns what answers askImage.
func (n *node) check(c config) func(ctx context.Context, ref, platform string) (*imageReport, error) {
	return func(ctx context.Context, ref, platform string) (image *imageReport, err error) {
		dir, remove, err := checkDir(c.Root)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, remove()) }()
		return checkImage(ctx, c, checkOptions{ref: ref, platform: platform}, dir, n.cri, n.ledger)
	}
}

// notStreamed notes why.
func (r *imageReport) notStreamed(err error) {
	r.Reason, r.Error = reason.Of(err), err.Error()
	r.Remedy = r.Reason.Remedy()
}

// askLast asks the daemon whose files are in root for the last pull that was not streamed.
func (r *imageReport) askLast(ctx context.Context, root string) {
	s, err := askStatusOf(ctx, root)
	if err != nil {
		return // a trap says so
	}
	for _, p := range slices.Backward(s.NotStreamed) {
		if p.Image == r.Ref || p.Manifest == r.Manifest {
			r.LastPull = &p
			return
		}
	}
}

// askHosts asks each host for the image, at most for patience.
func (r *imageReport) askHosts(ctx context.Context, reg *registryclient.Client, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answers, err := reg.AskEach(ctx, r.Ref)
	for _, a := range answers {
		h := hostReport{Host: a.Host, Capabilities: a.Capabilities, Credentials: a.Accepted}
		if a.Err != nil {
			h.Error = a.Err.Error()
		}
		r.Hosts = append(r.Hosts, h)
	}
	return err
}

func (r *imageReport) print(w io.Writer) {
	say(w, "image: %s\n", r.Ref)
	for _, h := range r.Hosts {
		answer := h.Error
		if answer == "" {
			answer = "has it"
		}
		say(w, "  host %s (%s): %s", h.Host, h.Capabilities, answer)
		if len(h.Credentials) > 0 {
			say(w, "; credentials: %s", strings.Join(h.Credentials, ", "))
		}
		fmt.Fprintln(w)
	}
	if r.Manifest != "" {
		say(w, "  manifest: %s\n", r.Manifest)
	}
	say(w, "  policy: %s\n", r.Policy)
	if p := r.LastPull; p != nil {
		say(w, "  last pull, not streamed: %s, %s: %s\n", p.At, p.Reason, p.Error)
	}
	switch {
	case r.Unknown != "":
		say(w, "UNKNOWN: the image cannot be found: %s\n", r.Unknown)
	case r.Reason != "":
		say(w, "NOT STREAMED %s: %s\n  what to do: %s\n", r.Reason, r.Error, r.Remedy)
	default:
		say(w, "STREAMED: artifact sha256:%s, %d layers\n", r.Artifact, r.Layers)
		if r.Signer != "" {
			say(w, "  signed by %s, whose certificate is of %s\n", r.Signer, r.Issuer)
		}
		if r.Policy == trust.Proven {
			say(w, "  before it is used, all of it is fetched and proven, unless it was\n")
		}
		for _, text := range r.Warnings {
			say(w, "  the signature: %s\n", text)
		}
	}
}
