// Package access says who asks the conversion service and what they may: bearer tokens and OpenID Connect, roles for repositories, the
// console's sessions, and the audit log.
//
// The principle: it fails closed. A request is somebody's, by something that was checked, or it is nobody's, who may nothing; a
// configuration that would let in more than it says is an error. Nothing that a visitor sends makes it keep state: sessions and logins
// on their way are in sealed cookies, and what is counted for each address has a bound.
//
// What it does not do: it decides no single request. Package rest and the console know which repository a request is about, and ask
// Identity.May; package webhook authenticates its senders itself.
package access

import (
	"context"
	"fmt"
	"slices"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// Role is what one may do with a repository. Each includes those before it, but for Reporter, which Owner alone includes.
type Role int

const (
	None     Role = iota
	Reader        // see images, operations, settings
	Writer        // convert, cancel, verify
	Owner         // switch auto-conversion, delete artifacts
	Reporter      // report starts of images, and nothing else: what all nodes of a fleet have is no secret for long
)

var roles = []string{None: "none", Reader: "reader", Writer: "writer", Owner: "owner", Reporter: "reporter"}

func (r Role) String() string {
	if r < 0 || int(r) >= len(roles) {
		return fmt.Sprintf("Role(%d)", int(r))
	}
	return roles[r]
}

// ParseRole is the opposite of String. None is no role that one can be given.
func ParseRole(s string) (Role, error) {
	if i := slices.Index(roles, s); i > 0 {
		return Role(i), nil
	}
	return None, fmt.Errorf("role %q: must be reader, writer, owner or reporter", s)
}

func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r *Role) UnmarshalText(b []byte) (err error) {
	*r, err = ParseRole(string(b))
	return err
}

// Grant gives a role for repositories.
type Grant struct {
	Role       Role
	Registry   string // its host; "" or "*" is every registry
	Repository string // a pattern of service.Match; "" is every repository
}

func (g Grant) in(r Role, registry string) bool {
	includes := g.Role >= r && g.Role != Reporter
	if r == Reporter {
		includes = g.Role == Reporter || g.Role == Owner
	}
	return r > None && includes && (g.Registry == "" || g.Registry == "*" || g.Registry == registry)
}

func (g Grant) check() error {
	if g.Role <= None || g.Role > Reporter {
		return fmt.Errorf("role %v: must be reader, writer, owner or reporter", g.Role)
	}
	return nil
}

// Kinds of identities: how it is known who asks.
const (
	KindToken    = "token"    // a bearer token of the configuration
	KindOIDC     = "oidc"     // a token of the OpenID Connect issuer
	KindLoopback = "loopback" // nothing: whoever reaches a loopback address of a service without authentication
	KindWebhook  = "webhook"  // a registry
)

// Identity is who asks. It is not changed once it is in a context.
type Identity struct {
	Name    string // for people; of an OIDC identity it may be one that its owner chose
	Kind    string
	Subject string // the claim sub of an OIDC identity
	Grants  []Grant
}

// May says whether the identity has the role for a repository. The repository may be a pattern: then for all repositories that it
// matches. That is the same question, because a pattern's star can only be matched by a star of the grant's pattern.
func (id *Identity) May(r Role, registry, repository string) bool {
	return slices.ContainsFunc(id.Grants, func(g Grant) bool {
		return g.in(r, registry) && (g.Repository == "" || service.Match(g.Repository, repository))
	})
}

// MaySome says whether the identity has the role for some repository of the registry, or of any registry when it is "".
func (id *Identity) MaySome(r Role, registry string) bool {
	return slices.ContainsFunc(id.Grants, func(g Grant) bool {
		return g.in(r, registry) || registry == "" && g.in(r, g.Registry)
	})
}

type contextKey int

const (
	identityKey contextKey = iota
	requestKey
)

var nobody = &Identity{}

// With returns a context of what the identity asks.
func With(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey, id)
}

// From returns who asks: never nil, but nobody, who may nothing, where it was not found out.
func From(ctx context.Context) *Identity {
	if id, ok := ctx.Value(identityKey).(*Identity); ok && id != nil {
		return id
	}
	return nobody
}
