package trust_test

import (
	"errors"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

func rule(p trust.Policy, repositories ...string) trust.Rule {
	return trust.Rule{Repositories: repositories, Policy: p}
}

func TestOf(t *testing.T) {
	r := trust.Rules{Default: trust.Off, List: []trust.Rule{
		rule(trust.Proven, "ghcr.io/acme/vendored", "ghcr.io/acme/third/*"),
		rule(trust.Signed, "ghcr.io/acme/*"),
		rule(trust.Proven, "*/acme/*"),
	}}
	for repo, want := range map[string]trust.Policy{
		"ghcr.io/acme/vendored":       trust.Proven,
		"ghcr.io/acme/third/a/b":      trust.Proven,
		"ghcr.io/acme/app":            trust.Signed,
		"quay.io/acme/app":            trust.Proven,
		"ghcr.io/other/app":           trust.Off,
		"evil.example/ghcr.io/acme/x": trust.Off, // a wildcard of the host does not reach into the repository
	} {
		if got := r.Of(repo); got != want {
			t.Errorf("policy of %s is %s, want %s", repo, got, want)
		}
	}
}

// TestKept: what is there is held against the strictness of the node where its own repository is off.
func TestKept(t *testing.T) {
	const repo, other = "ghcr.io/acme/app", "ghcr.io/other/app"
	for name, c := range map[string]struct {
		rules       trust.Rules
		repo, other trust.Policy
	}{
		"nothing said":              {trust.Rules{Default: trust.Open}, trust.Open, trust.Open},
		"open, one off":             {trust.Rules{Default: trust.Open, List: []trust.Rule{rule(trust.Off, repo)}}, trust.Off, trust.Open},
		"signed, one off":           {trust.Rules{Default: trust.Signed, List: []trust.Rule{rule(trust.Off, repo)}}, trust.Signed, trust.Signed},
		"proven, one off":           {trust.Rules{Default: trust.Proven, List: []trust.Rule{rule(trust.Off, repo)}}, trust.Proven, trust.Proven},
		"one signed, the rest off":  {trust.Rules{Default: trust.Off, List: []trust.Rule{rule(trust.Signed, repo)}}, trust.Signed, trust.Signed},
		"one proven, others signed": {trust.Rules{Default: trust.Signed, List: []trust.Rule{rule(trust.Proven, repo), rule(trust.Off, other)}}, trust.Proven, trust.Signed},
	} {
		if got := c.rules.Kept(repo); got != c.repo {
			t.Errorf("%s: %s, want %s", name, got, c.repo)
		}
		if got := c.rules.Kept(other); got != c.other {
			t.Errorf("%s: the other is %s, want %s", name, got, c.other)
		}
	}
}

func TestValidate(t *testing.T) {
	const repo = "registry.example.com/team/*"
	for name, c := range map[string]struct {
		rules trust.Rules
		is    error
		rule  int // from 1; 0: no RuleError
		ok    bool
	}{
		"nothing said":                    {rules: trust.Rules{Default: trust.Open}, ok: true},
		"all open":                        {rules: trust.Rules{Default: trust.Open, List: []trust.Rule{rule(trust.Open, repo), rule(trust.Off, "a/b")}}, ok: true},
		"all signed or proven":            {rules: trust.Rules{Default: trust.Signed, List: []trust.Rule{rule(trust.Proven, repo)}}, ok: true},
		"signed, the rest off":            {rules: trust.Rules{Default: trust.Off, List: []trust.Rule{rule(trust.Signed, repo)}}, ok: true},
		"signed and an open default":      {rules: trust.Rules{Default: trust.Open, List: []trust.Rule{rule(trust.Signed, repo)}}, is: trust.ErrOpenBeside},
		"proven and an open default":      {rules: trust.Rules{Default: trust.Open, List: []trust.Rule{rule(trust.Proven, repo)}}, is: trust.ErrOpenBeside},
		"an open rule, signed by default": {rules: trust.Rules{Default: trust.Signed, List: []trust.Rule{rule(trust.Open, repo)}}, is: trust.ErrOpenBeside},
		"no such policy":                  {rules: trust.Rules{Default: trust.Off, List: []trust.Rule{rule(trust.Off, repo), rule("Signed", repo)}}, rule: 2},
		"no such default":                 {rules: trust.Rules{Default: ""}},
		"no repositories":                 {rules: trust.Rules{Default: trust.Off, List: []trust.Rule{rule(trust.Signed)}}, rule: 1},
		"no repository":                   {rules: trust.Rules{Default: trust.Off, List: []trust.Rule{rule(trust.Signed, "registry.example.com")}}, rule: 1},
	} {
		err := c.rules.Validate()
		if (err == nil) != c.ok || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
		if e := (*trust.RuleError)(nil); errors.As(err, &e) != (c.rule > 0) || e != nil && e.Rule+1 != c.rule {
			t.Errorf("%s: %v, want an error of rule %d", name, err, c.rule)
		}
	}
}

func TestStricter(t *testing.T) {
	order := []trust.Policy{trust.Open, trust.Signed, trust.Proven, trust.Off}
	for i, p := range order {
		for j, q := range order {
			if got := p.Stricter(q); got != (i > j) {
				t.Errorf("%s stricter than %s: %t", p, q, got)
			}
		}
	}
}
