package snapshot

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// signedImage is an image of signedNode with a signature by id, as JWS.
func (s *signedNode) signedImage(id *trusttest.Identity) (img testImage, top string) {
	s.t.Helper()
	img = s.push("app", threeLayers(s.t)...).converted(s.testNode)
	d := s.artifacts(img)[0]
	s.putSignature("app", d, id.Sign(s.t, target(d), "jws"), true)
	return img, s.prepareAll(img, 0, "")
}

// wantStart tries to make a container, in both ways, and to go on with one that was made; want is nil if it may be.
func (n *testNode) wantStart(when, top string, want error) {
	n.t.Helper()
	ctx := testContext()
	key := "container " + when
	for what, f := range map[string]func() error{
		"Prepare": func() error { _, err := n.sn.Prepare(ctx, key, top); return err },
		"View":    func() error { _, err := n.sn.View(ctx, key+" view", top); return err },
	} {
		if err := f(); !errors.Is(err, want) || want == nil && err != nil {
			n.t.Errorf("%s: %s: got %v, want %v", when, what, err, want)
		}
	}
}

// TestWithdrawn: where an image is mounted already, nothing new begins on it once its signer is not trusted any more; what runs goes on. Nobody is asked for that.
func TestWithdrawn(t *testing.T) {
	s := newSignedNode(t)
	img, top := s.signedImage(s.signer)
	id := s.artifacts(img)[0].Digest.Encoded()
	root := s.container("runs", top)
	mounted := s.mounts.Targets(id)
	if len(mounted) != 1 {
		t.Fatalf("mounted at %q", mounted)
	}
	s.reg.Reset()
	s.wantStart("trusted", top, nil)
	trusttest.WritePolicy(t, s.dir, trusttest.Statement{Name: "again"})
	s.wantStart("by other files", top, nil)
	trusttest.WriteStore(t, s.dir, "default", trusttest.NewCA(t, "new", nil).Root)
	s.wantStart("withdrawn", top, trust.ErrUntrusted)
	if _, err := s.sn.Mounts(testContext(), "runs"); !errors.Is(err, trust.ErrUntrusted) {
		t.Errorf("a container is started again: %v", err)
	}
	if _, err := s.sn.Prepare(testContext(), "1/1/extract-1 sha256:0", top); err != nil {
		t.Errorf("a layer of a pull on it: %v", err)
	}
	if now := s.mounts.Targets(id); !slices.Equal(now, mounted) {
		t.Errorf("mounted at %q", now)
	}
	if n, _ := s.reg.Count(func(registrytest.Request) bool { return true }); n > 0 {
		t.Errorf("%d requests", n)
	}
	wantFiles(t, root, threeLayersMerged)
	trusttest.WriteStore(t, s.dir, "default", s.ca.Root)
	s.wantStart("trusted again", top, nil)
}

// TestStricterPolicy: files that ask for more than they did hold for the next pull, also where a container was made of the image in between, which asks only who has signed it.
func TestStricterPolicy(t *testing.T) {
	s := newSignedNode(t)
	trusttest.WritePolicy(t, s.dir, trusttest.Statement{Name: "all", Level: "permissive"})
	img := s.push("app", threeLayers(t)...).converted(s.testNode)
	d := s.artifacts(img)[0]
	s.putSignature("app", d, s.signer.SignOver(t, target(d)), true)
	top := s.prepareAll(img, 0, "")
	trusttest.WritePolicy(t, s.dir, trusttest.Statement{Name: "all"})
	for _, when := range []string{"stricter", "stricter, restarted"} {
		s.wantStart(when, top, nil)
		if err := s.images.Usable(d.Digest.Encoded()); !errors.Is(err, trust.ErrMissing) {
			t.Errorf("%s: a pull of the same layers goes on without a search: %v", when, err)
		}
		if _, err := s.find(img); reason.Of(err) != reason.SignatureExpired {
			t.Errorf("%s: a pull: %v", when, err)
		}
		s.restart()
	}
}

// TestTightened: an image that a weaker policy has let in starts no new container by the policy of today, until its artifact is signed and a pull has seen that. Where its own repository is off
// that is the policy of the others, whose base layers it may stand for.
func TestTightened(t *testing.T) {
	for _, own := range []trust.Policy{trust.Signed, trust.Off} {
		t.Run(string(own), func(t *testing.T) {
			s := newSignedNode(t)
			_, v := s.policy("")
			s.policy = nil
			s.restart()
			img := s.push("app", threeLayers(t)...).converted(s.testNode)
			top := s.prepareAll(img, 0, "")
			s.wantStart("open", top, nil)
			rules := trust.Rules{Default: trust.Signed, List: []trust.Rule{{Repositories: []string{s.reg.Host() + "/app"}, Policy: own}}}
			s.policy = func(repo registryclient.Repository) (trust.Policy, trust.Verifier) {
				return rules.Kept(string(repo)), v
			}
			s.restart()
			s.wantStart("tightened", top, trust.ErrMissing)
			d := s.artifacts(img)[0]
			s.putSignature("app", d, s.signer.Sign(t, target(d), "jws"), true)
			if _, err := s.find(img); err != nil {
				t.Fatal(err)
			}
			s.wantStart("signed", top, nil)
		})
	}
}

// TestMistakes: files with a mistake in them, a server that is away and a registry that is away change nothing for what was trusted before, also after a restart of the machine, which takes the
// mounts; pulls are normal ones.
func TestMistakes(t *testing.T) {
	for name, mistake := range map[string]func(s *signedNode){
		"half a file": func(s *signedNode) {
			if err := os.WriteFile(filepath.Join(s.dir, "trustpolicy.json"), []byte("{"), 0o644); err != nil {
				t.Fatal(err)
			}
		},
		"a store that is not there": func(s *signedNode) {
			trusttest.WritePolicy(s.t, s.dir, trusttest.Statement{Name: "all", Stores: []string{"ca:defualt"}})
		},
		"no statement": func(s *signedNode) {
			trusttest.WritePolicy(s.t, s.dir, trusttest.Statement{Name: "others", Scopes: []string{"r.example/others"}})
		},
		"nobody says what is revoked": func(s *signedNode) {
			s.ca.Server.Set(trusttest.Down)
			trusttest.WritePolicy(s.t, s.dir, trusttest.Statement{Name: "again"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSignedNode(t)
			s.ca = trusttest.NewCA(t, "revoking", trusttest.NewServer(t))
			trusttest.WriteStore(t, s.dir, "default", s.ca.Root)
			img, top := s.signedImage(s.ca.Issue(t, "build", trusttest.Leaf{}))
			s.stop()
			mistake(s)
			v, _ := notary.NewVerifier(notary.Options{Dir: s.dir}) // without what was kept of answers
			s.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, v }
			s.start()
			if _, err := s.find(img); reason.Of(err) != reason.SignatureUnchecked {
				t.Errorf("a pull: %v", err)
			}
			s.reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))
			s.wantStart("after a restart", top, nil)
			s.wantStart("mounted", top, nil)
		})
	}
}

// TestWithdrawnInOneRepository: an image that was let in by signatures in two repositories starts as long as one of them counts. If one's signer is not trusted any more it does not, though the files say nothing of
// the other.
func TestWithdrawnInOneRepository(t *testing.T) {
	s := newSignedNode(t)
	img, top := s.signedImage(s.signer)
	d := s.artifacts(img)[0]
	other := img
	other.ref = strings.Replace(img.ref, "/app", "/copy", 1)
	s.copyTo("copy", img, d)
	s.putSignature("copy", d, s.signer.Sign(t, target(d), "jws"), true)
	if _, err := s.find(other); err != nil {
		t.Fatal(err)
	}
	of := func(repo string, identities ...string) trusttest.Statement {
		return trusttest.Statement{Name: repo, Scopes: []string{s.reg.Host() + "/" + repo}, Identities: identities}
	}
	nobody := "x509.subject:" + trusttest.Subject("nobody")
	trusttest.WritePolicy(t, s.dir, of("app", nobody), of("copy"))
	s.wantStart("trusted in one", top, nil)
	for gone, left := range map[string]string{"app": "copy", "copy": "app"} {
		trusttest.WritePolicy(t, s.dir, of(gone))
		s.wantStart("nothing is said of "+left, top, nil)
		trusttest.WritePolicy(t, s.dir, of(gone, nobody))
		s.wantStart("withdrawn in "+gone, top, trust.ErrIdentity)
	}
	trusttest.WritePolicy(t, s.dir, of("others"))
	s.wantStart("nothing is said of either", top, nil)
}

// TestRevokedLater: a verdict that has run out is asked for again, and a certificate that was revoked meanwhile ends it, over restarts, until the image is proven.
func TestRevokedLater(t *testing.T) {
	s := newSignedNode(t)
	ca := trusttest.NewCA(t, "revoking", trusttest.NewServer(t))
	trusttest.WriteStore(t, s.dir, "default", ca.Root)
	id := ca.Issue(t, "build", trusttest.Leaf{})
	img, top := s.signedImage(id)
	s.wantStart("signed", top, nil)
	later := func() { // the same node, when all answers have run out
		t.Helper()
		s.stop()
		files, err := filepath.Glob(filepath.Join(s.root, "images", "*", "trust.json"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%q, %v", files, err)
		}
		var list []map[string]any
		b, err := os.ReadFile(files[0])
		if err == nil {
			err = json.Unmarshal(b, &list)
		}
		if err == nil {
			list[0]["verdict"].(map[string]any)["Until"] = time.Now().Add(-time.Minute)
			b, err = json.Marshal(list)
		}
		if err == nil {
			err = os.WriteFile(files[0], b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		v, err := notary.NewVerifier(notary.Options{Dir: s.dir})
		if err != nil {
			t.Fatal(err)
		}
		s.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, v }
		s.start()
	}
	until := func(what string, want func() bool) {
		t.Helper()
		timeout := time.After(time.Minute)
		for tick := time.Tick(10 * time.Millisecond); !want(); {
			select {
			case <-tick:
			case <-timeout:
				t.Fatalf("never %s; log:\n%s", what, s.log.b.String())
			}
		}
	}
	standing := func() bool {
		return time.Now().Before(s.images.Signature(s.artifacts(img)[0].Digest.Encoded(), registryclient.Repository(s.reg.Host()+"/app")).Until)
	}
	later()
	until("asked again", standing)
	s.wantStart("asked again", top, nil)

	ca.Server.Set(trusttest.Down)
	later()
	s.wantStart("nobody answers", top, nil)
	ca.Server.Set(trusttest.None)
	ca.Server.Revoke(id)
	later()
	until("revoked", func() bool { return s.images.Usable(s.artifacts(img)[0].Digest.Encoded()) != nil })
	s.wantStart("revoked", top, trust.ErrRevoked)
	if _, err := s.find(img); reason.Of(err) != reason.SignatureRevoked {
		t.Errorf("a pull: %v", err)
	}
	s.restart()
	s.wantStart("revoked, restarted", top, trust.ErrRevoked)
	s.deadline = time.Hour
	s.restart()
	s.wantStart("proven", top, nil)
}
