package notary_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/signature"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestEpoch: what is in the files counts, and what notation does not read does not; times and inodes do not, and a change that hides in them does.
func TestEpoch(t *testing.T) {
	ca, next := trusttest.NewCA(t, "authority", nil), trusttest.NewCA(t, "next", nil)
	dir := trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})
	real := t.TempDir() // the trust store is elsewhere: notation follows the symlink
	store := filepath.Join(dir, "truststore")
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	check(os.Rename(store, filepath.Join(real, "truststore")))
	check(os.Symlink(filepath.Join(real, "truststore"), store))
	v := verifier(t, notary.Options{Dir: dir})
	policy, crt := filepath.Join(dir, "trustpolicy.json"), filepath.Join(real, "truststore", "x509", "ca", "default", "ca.crt")
	was := v.Epoch()
	wantAs := func(same bool, when string) {
		t.Helper()
		if now := v.Epoch(); (now == was) != same {
			t.Errorf("%s: the epoch was %s and is %s", when, was, now)
		} else {
			was = now
		}
	}
	wantAs(true, "at once")
	trusttest.WritePolicy(t, dir, trusttest.Statement{Name: "all"})
	trusttest.WriteStore(t, dir, "default", ca.Root)
	wantAs(true, "installed again")
	old := time.Now().Add(-time.Hour)
	check(os.Chtimes(policy, old, old))
	check(os.Chtimes(crt, old, old))
	wantAs(true, "touched")
	check(os.WriteFile(filepath.Join(dir, "signingkeys.json"), []byte("{}"), 0o644))
	wantAs(true, "a key to sign with")

	pem, err := os.ReadFile(crt)
	check(err)
	pem[len(pem)/2] ^= 1
	check(os.WriteFile(crt, pem, 0o644)) // in place
	check(os.Chtimes(crt, old, old))
	wantAs(false, "a byte, size and time are the same")
	trusttest.WriteStore(t, dir, "default", next.Root)
	wantAs(false, "another certificate, behind a symlink")
	trusttest.WriteStore(t, dir, "more", ca.Root)
	wantAs(false, "one more store")
	check(os.Remove(filepath.Join(real, "truststore", "x509", "ca", "more", "ca.crt")))
	wantAs(false, "an empty store")
	check(os.Remove(filepath.Join(real, "truststore", "x509", "ca", "more")))
	wantAs(false, "no store")
	check(os.Remove(policy))
	wantAs(false, "no policy")
}

// TestTrusts: who was trusted once is, whatever the time is, what was revoked and who answers, until the files say otherwise. What they do not say is unchecked.
func TestTrusts(t *testing.T) {
	server := trusttest.NewServer(t)
	ca := trusttest.NewCA(t, "authority", server)
	build, gone := ca.Issue(t, "build", trusttest.Leaf{}), ca.Issue(t, "build", trusttest.Leaf{})
	server.Revoke(gone)
	server.Set(trusttest.Down)
	day := 24 * time.Hour
	ended := ca.Issue(t, "build", trusttest.Leaf{NotBefore: time.Now().Add(-10 * day), NotAfter: time.Now().Add(-day)})
	stranger := trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{})
	named := trusttest.Statement{Name: "all", Identities: []string{"x509.subject:" + trusttest.Subject("build")}}
	stamped := trusttest.Statement{Name: "all", Stores: []string{"ca:default", "tsa:stamps"}}
	good := build.Sign(t, target("x"), "jws")
	for name, c := range map[string]struct {
		e      trust.Envelope
		policy trusttest.Statement
		broken string // trustpolicy.json, in the place of policy
		root   *trusttest.CA
		want   error
	}{
		"JWS":                        {e: good, policy: named},
		"COSE":                       {e: build.Sign(t, target("x"), "cose"), policy: named},
		"permissive":                 {e: good, policy: trusttest.Statement{Name: "all", Level: "permissive"}},
		"a timestamp is asked for":   {e: good, policy: stamped},
		"it is over":                 {e: sign(t, build, target("x"), request{signed: time.Now().Add(-2 * time.Hour), expires: time.Now().Add(-time.Hour)}), policy: named},
		"its certificate is over":    {e: sign(t, ended, target("x"), request{signed: time.Now().Add(-2 * day)}), policy: named},
		"it is revoked":              {e: gone.Sign(t, target("x"), "jws"), policy: named},
		"of another":                 {e: build.Sign(t, target("y"), "jws"), policy: named, want: trust.ErrInvalid},
		"of a stranger":              {e: stranger.Sign(t, target("x"), "jws"), policy: named, want: trust.ErrUntrusted},
		"another authority":          {e: good, policy: named, root: trusttest.NewCA(t, "next", nil), want: trust.ErrUntrusted},
		"another identity":           {e: ca.Issue(t, "other", trusttest.Leaf{}).Sign(t, target("x"), "jws"), policy: named, want: trust.ErrIdentity},
		"an authority's scheme":      {e: sign(t, build, target("x"), request{scheme: signature.SigningSchemeX509SigningAuthority}), policy: named, want: trust.ErrUntrusted},
		"half a file":                {e: good, broken: "{", want: trust.ErrUnchecked},
		"for other repositories":     {e: good, policy: trusttest.Statement{Name: "others", Scopes: []string{"r.example/others"}}, want: trust.ErrUnchecked},
		"everybody":                  {e: good, policy: trusttest.Statement{Name: "all", Level: "audit"}, want: trust.ErrUnchecked},
		"a store that is not there":  {e: good, policy: trusttest.Statement{Name: "all", Stores: []string{"ca:missing"}}, want: trust.ErrUnchecked},
		"a plugin that is not there": {e: sign(t, build, target("x"), request{attributes: plugged("absent")}), policy: named, want: trust.ErrUnchecked},
	} {
		dir := trusttest.NewDir(t, ca, c.policy)
		if c.root != nil {
			trusttest.WriteStore(t, dir, "default", c.root.Root)
		}
		if c.broken != "" {
			if err := os.WriteFile(filepath.Join(dir, "trustpolicy.json"), []byte(c.broken), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		v, newErr := notary.NewVerifier(notary.Options{Dir: dir})
		if (newErr != nil) != (c.broken != "") {
			t.Errorf("%s: %v", name, newErr)
		}
		err := v.Trusts(t.Context(), target("x"), c.e)
		if !errors.Is(err, c.want) || c.want == nil && err != nil || c.want != nil && classes(err) != 1 {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if asked := server.Requests(); len(asked) > 0 {
		t.Errorf("asked for %q", asked)
	}
}
