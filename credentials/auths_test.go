package credentials

import (
	"slices"
	"testing"
)

// The cases are those of kubelet's own tests (pkg/credentialprovider, TestURLsMatch), in short.
func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		pattern, image string
		want           bool
	}{
		{"*.kubernetes.io", "prefix.kubernetes.io/x", true},
		{"prefix.*.io", "prefix.kubernetes.io/x", true},
		{"prefix.kubernetes.*", "prefix.kubernetes.io/x", true},
		{"*-good.kubernetes.io", "prefix-good.kubernetes.io/x", true},
		{"*.*.kubernetes.io", "prefix.blah.kubernetes.io/x", true},
		{"*kubernetes.io", "prefix.kubernetes.io/x", false},
		{"*.kubernetes.io", "kubernetes.io/x", false},
		{"kubernetes.io", "kubernetes.com/x", false},
		{"kubernetes.io/team", "kubernetes.io/team/x", true},
		{"kubernetes.io/other", "kubernetes.io/team/x", false},
		{"*.kubernetes.io/team", "a.kubernetes.io/team/x", true},
		{"kubernetes.io/*", "kubernetes.io/team/x", false}, // no globs in paths
		{"kubernetes.io:1111", "kubernetes.io:1111/x", true},
		{"kubernetes.io:1111", "kubernetes.io/x", false},
		{"kubernetes.io", "kubernetes.io:1111/x", false},
		{"*.kubernetes.io:1111", "a.kubernetes.io:1111/x", true},
		{"", "kubernetes.io/x", false},
		{"[", "kubernetes.io/x", false},
	} {
		if got := matches(tc.pattern, tc.image); got != tc.want {
			t.Errorf("%q and %q: got %v", tc.pattern, tc.image, got)
		}
	}
}

func TestAuthsOrder(t *testing.T) {
	a := auths{}
	for _, key := range []string{"*.example.com", "r.example.com", "https://r.example.com/v2/team", "r.example.com/v1/team/app", "r.example.com/teams"} {
		a.add(key, entry{Login: Login{key, "x"}})
	}
	got, err := a.lookup("r.example.com/team/app")
	want := []Login{{"r.example.com/v1/team/app", "x"}, {"https://r.example.com/v2/team", "x"}, {"r.example.com", "x"}, {"*.example.com", "x"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}
