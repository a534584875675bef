package trust

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Policy is what must be true of an artifact before a node streams it.
type Policy string

const (
	// Open: nothing. The layers are proven in the background, which finds out what was tampered with and does not prevent it.
	Open Policy = "open"
	// Signed: a valid signature of a trusted identity. Then the layers are proven as well.
	Signed Policy = "signed"
	// Proven: all of its layers are fetched and proven before the image is mounted.
	Proven Policy = "proven"
	// Off: nothing is streamed.
	Off Policy = "off"
)

// policies, from the one that demands least.
var policies = [...]Policy{Open, Signed, Proven, Off}

// rank is the place of p in policies; -1 if p is none.
func (p Policy) rank() int {
	for i, q := range policies {
		if p == q {
			return i
		}
	}
	return -1
}

// Stricter reports whether p demands more than q.
func (p Policy) Stricter(q Policy) bool { return p.rank() > q.rank() }

// Rule says which policy holds for some repositories.
type Rule struct {
	Repositories []string // patterns, see Match
	Policy       Policy
}

// Rules are those of a node.
type Rules struct {
	List    []Rule // the first that matches counts
	Default Policy // of what none matches
}

// Of returns the policy for repo, as in "registry.example.com/team/app".
func (r Rules) Of(repo string) Policy {
	for _, rule := range r.List {
		for _, p := range rule.Repositories {
			if Match(p, repo) {
				return rule.Policy
			}
		}
	}
	return r.Default
}

// Kept returns the policy against which images of repo are held that are on the node already. Off is no policy for these: they are there, and stand by chain ID for
// layers of everybody's images. In its place is what the node asks of others at least: Signed or Proven, if a rule says one of them.
func (r Rules) Kept(repo string) Policy {
	policy := r.Of(repo)
	if policy != Off {
		return policy
	}
	for _, p := range []Policy{Signed, Proven} {
		if r.Has(p) {
			return p
		}
	}
	return Off
}

// Has reports whether p may hold for a repository.
func (r Rules) Has(p Policy) bool {
	for _, rule := range r.List {
		if rule.Policy == p {
			return true
		}
	}
	return r.Default == p
}

// Patterns lists those for which p holds. What the default holds for has none.
func (r Rules) Patterns(p Policy) (list []string) {
	for _, rule := range r.List {
		if rule.Policy == p {
			list = append(list, rule.Repositories...)
		}
	}
	return list
}

// ErrOpenBeside: some repositories are open, others are signed or proven. Snapshots are shared by chain ID between all images of a node, so what the
// former let in serves the latter. Which patterns overlap is not asked: two repositories that share no name may share layers.
var ErrOpenBeside = errors.New(`"open" beside "signed" or "proven": snapshots are shared by chain ID between all images of a node, so what "open" lets in serves images of the other repositories, too. ` +
	`Give every repository "signed", "proven" or "off", and say trust_default`)

// Validate says what is wrong with r: a *RuleError for a rule, or ErrOpenBeside.
func (r Rules) Validate() error {
	for i, rule := range r.List {
		if rule.Policy.rank() < 0 {
			return &RuleError{i, fmt.Errorf("policy = %q: want open, signed, proven or off", rule.Policy)}
		}
		if len(rule.Repositories) == 0 {
			return &RuleError{i, errors.New("it has no repositories")}
		}
		for _, p := range rule.Repositories {
			if err := ValidPattern(p); err != nil {
				return &RuleError{i, fmt.Errorf("repositories: %w", err)}
			}
		}
	}
	if r.Default.rank() < 0 {
		return fmt.Errorf("trust_default = %q: want open, signed, proven or off", r.Default)
	}
	if r.Has(Open) && (r.Has(Signed) || r.Has(Proven)) {
		return ErrOpenBeside
	}
	return nil
}

// RuleError is of a rule.
type RuleError struct {
	Rule int // from 0
	Err  error
}

func (e *RuleError) Error() string { return fmt.Sprintf("trust rule %d: %v", e.Rule+1, e.Err) }
func (e *RuleError) Unwrap() error { return e.Err }

// ValidPattern says why p is no pattern of repositories.
func ValidPattern(p string) error {
	host, repo, ok := strings.Cut(p, "/")
	_, err := path.Match(p, "")
	if !ok || host == "" || repo == "" || err != nil || strings.Contains(p, "://") || strings.HasSuffix(p, "/") {
		return fmt.Errorf("%q is not of the form HOST/REPOSITORY, as in \"registry.example.com/team/*\"", p)
	}
	return nil
}

// Match reports whether repo, in the form HOST/REPOSITORY, is one of those that pattern means. Each part between slashes is a glob as of path.Match, which never
// matches a slash, so that a wildcard in the host's part cannot reach into the repository's; a last part of * stands for everything below.
func Match(pattern, repo string) bool {
	globs, parts := strings.Split(pattern, "/"), strings.Split(repo, "/")
	for i, g := range globs {
		if i == len(parts) {
			return false
		}
		if g == "*" && i > 0 && i == len(globs)-1 {
			return true
		}
		if ok, err := path.Match(g, parts[i]); err != nil || !ok {
			return false
		}
	}
	return len(globs) == len(parts)
}
