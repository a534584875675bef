package service

import "testing"

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"app", "app", true}, {"app", "apps", false}, {"app", "team/app", false}, {"", "", true}, {"", "app", false},
		{"*", "app", true}, {"*", "team/app", true}, {"team/*", "team/app", true}, {"team/*", "team/a/b", true}, {"team/*", "team", false},
		{"team/*", "other/team/app", false}, {"*/app", "team/app", true}, {"*/app", "app", false}, {"*/app", "team/apps", false},
		{"a*b*c", "abc", true}, {"a*b*c", "a/b/c", true}, {"a*b*c", "acb", false}, {"a*a", "a", false}, {"a*a", "aa", true},
		{"a*bc*bc", "abc", false}, {"a*bc*bc", "abcbc", true}, {"**", "x", true}, {"a.c", "abc", false}, {"a?c", "abc", false},
	} {
		if got := Match(c.pattern, c.name); got != c.want {
			t.Errorf("Match(%q, %q) = %v, want %v", c.pattern, c.name, got, c.want)
		}
	}
}
