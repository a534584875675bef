package registryclient

import (
	"context"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// HostAnswer is what one host of a registry answers.
type HostAnswer struct {
	HostStatus
	Capabilities string // that hosts.toml gives it: "pull resolve"
	Err          error  // nil: it has the manifest
}

// AskEach asks each host of ref's registry once for the manifest that ref names, also those that another operation would not get to, in the order in which they
// would be asked. The error is one of ref or of hosts.toml.
func (c *Client) AskEach(ctx context.Context, ref string) ([]HostAnswer, error) {
	repo, tag, dgst, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	need, object := canResolve, tag
	if dgst != "" {
		need, object = canPull, dgst.String()
	}
	k, err := c.newCall(ctx, repo, need)
	if err != nil {
		return nil, err
	}
	defer k.end()
	var list []HostAnswer
	for _, h := range k.asked {
		k.allow(c.o.Stall)
		_, b, err := k.read(h.host, question{path: "manifests/" + object, accept: manifestTypes}, maxManifest)
		if err == nil && dgst != "" && dgst.Algorithm().FromBytes(b) != dgst {
			err = refusedAs(ErrMismatch, "content has digest %s", dgst.Algorithm().FromBytes(b))
		}
		h.mu.Lock()
		s := h.status()
		h.mu.Unlock()
		s.Accepted = h.auth.sources()
		list = append(list, HostAnswer{s, capabilities(h.Capabilities), err})
	}
	return list, nil
}

// capabilities names what a host may be asked.
func capabilities(has docker.HostCapabilities) string {
	var names []string
	for _, c := range []struct {
		is   docker.HostCapabilities
		name string
	}{{canPull, "pull"}, {canResolve, "resolve"}, {canReferrers, "referrers"}} {
		if has.Has(c.is) {
			names = append(names, c.name)
		}
	}
	return strings.Join(names, " ")
}
