package attack

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/attack/forge"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// lies are artifacts in which tar, index and chunk digests are right for each other, and not for the image: nobody can tell them from an honest one before the
// whole tar is hashed.
var lies = map[string]func(f *forge.Artifact){
	"another tar": func(f *forge.Artifact) {
		f.Encode(1, forge.Tar(f, forge.File("bin/", "", 0o755), forge.File("bin/run", "evil", 0o755)))
		f.Claim(1)
	},
	"a setuid program more": func(f *forge.Artifact) {
		f.Encode(1, forge.Tar(f, forge.File("bin/", "", 0o755), forge.File("bin/run", forge.Noise(20000), 0o755), forge.File("etc/", "", 0o755), forge.File("etc/app", forge.Noise(9000), 0o600), forge.File("bin/su", "evil", 0o4755)))
		f.Claim(1)
	},
	"a file less": func(f *forge.Artifact) {
		f.Encode(1, forge.Tar(f, forge.File("bin/", "", 0o755), forge.File("bin/run", forge.Noise(20000), 0o755), forge.File("etc/", "", 0o755)))
		f.Claim(1)
	},
	"another mode": func(f *forge.Artifact) {
		f.Encode(1, forge.Tar(f, forge.File("bin/", "", 0o755), forge.File("bin/run", forge.Noise(20000), 0o4755), forge.File("etc/", "", 0o755), forge.File("etc/app", forge.Noise(9000), 0o600)))
		f.Claim(1)
	},
	"one chunk in another's place": func(f *forge.Artifact) {
		f.Table(1, func(e [][]byte) { copy(e[2][forge.OffDigest:], e[3][forge.OffDigest:]) })
	},
}

// TestLies: open takes a lie until its proof, which puts it into quarantine: reads fail from then on, over restarts, and pulls are normal, or of the next artifact. Proven
// finds it before the first read, and signed does not take it, unless a trusted identity has signed it: then it is as with open.
func TestLies(t *testing.T) {
	a := newAuthority(t, nil)
	row := rowOf(t, rowLies)
	for name, change := range lies {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			v := image(t, reg, "app")
			f := forge.Honest(t, v)
			change(f)
			f.M.Created = time.Now()
			lie := f.Put(reg)
			strict := newNode(t, a.signed)
			refused(t, strict, row, v, "unsigned")
			sign(t, reg, v, lie, a.stranger)
			refused(t, strict, row, v, "signed by the attacker")
			sign(t, reg, v, lie, a.builder)

			strict = newNode(t, proven)
			_, why, err := strict.pull(v)
			row.holds(t, trust.Proven, "alone", why, err)
			if _, bad := strict.ledger.Count(); bad != 1 || why != reason.Tampered {
				t.Errorf("proven: %s, and %d are in quarantine", why, bad)
			}
			nodes := map[string]*node{"open": newNode(t, nil), "signed by a trusted key": newNode(t, a.signed)}
			for policy, n := range nodes {
				id, why, err := n.pull(v)
				if row.holds(t, trust.Open, policy, why, err); err != nil {
					t.Fatal(policy)
				}
				if wrong, failed := n.read(id, v); len(wrong) == 0 && failed == nil {
					t.Errorf("%s: before the proof all is as it should be: it is no lie", policy)
				}
				if err := n.images.Prove(t.Context(), id, func(int64) {}); !errors.Is(err, stream.ErrQuarantined) {
					t.Fatalf("%s: the proof says %v", policy, err)
				}
				if _, failed := n.read(id, v); !errors.Is(failed, stream.ErrQuarantined) {
					t.Errorf("%s: a read after that: %v", policy, failed)
				}
				if _, why, err := n.pull(v); why != reason.Tampered {
					t.Errorf("%s: a pull after that: %s, %v", policy, why, err)
				}
			}

			good := forge.Honest(t, v).Put(reg)
			sign(t, reg, v, good, a.builder)
			nodes["proven"], nodes["proven, for the first time"] = strict, newNode(t, proven)
			for policy, n := range nodes {
				id, why, err := n.pullOther(v)
				if err != nil || id != good.Digest.Encoded() {
					t.Fatalf("%s: in front of an honest one: got %s, %s, %v", policy, id, why, err)
				}
				if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
					t.Errorf("%s: wrong bytes at %q, error %v", policy, wrong, failed)
				}
			}
		})
	}
}

// TestNewerLies: where artifacts must be signed, one that lies, in front of one that is signed, costs a look: nothing of its data is asked for.
func TestNewerLies(t *testing.T) {
	a := newAuthority(t, nil)
	for name, change := range lies {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			v := image(t, reg, "app")
			good := forge.Honest(t, v).Put(reg)
			sign(t, reg, v, good, a.builder)
			f := forge.Honest(t, v)
			change(f)
			f.M.Created = time.Now()
			lie := f.Put(reg)
			sign(t, reg, v, lie, a.stranger)
			forge.Sign(t, reg, v.Name, lie, a.builder.Sign(t, forge.Target(good), "jws")) // that of the honest one
			n := newNode(t, a.signed)
			id, why, err := n.pull(v)
			if err != nil || id != good.Digest.Encoded() {
				t.Fatalf("got %s, %s, %v", id, why, err)
			}
			if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
				t.Errorf("wrong bytes at %q, error %v", wrong, failed)
			}
			if seen, _ := reg.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, lie.Digest.String()) }); seen == 0 {
				t.Error("the lie is not looked at")
			}
			if read := f.DataRequests(reg, 1); read != 0 {
				t.Errorf("%d requests for the lie's data", read)
			}
		})
	}
}

// TestReplayed: an older artifact that somebody puts back is one like others: its layers have to be the image's, and where a signature is asked for, that has to be good
// today. One of an older image is that image's, whatever lists and manifests say.
func TestReplayed(t *testing.T) {
	server := trusttest.NewServer(t)
	a := newAuthority(t, server)
	gone := a.Issue(t, "build", trusttest.Leaf{})
	server.Revoke(gone)
	row := rowOf(t, rowReplayed)
	policies := map[trust.Policy]policyOf{trust.Open: nil, trust.Signed: a.signed, trust.Proven: proven}
	reg := registrytest.Start(t, registrytest.Options{})

	for name, c := range map[string]struct {
		sign func(v *forge.Image, d ocispec.Descriptor) // nil does not
		want reason.Code                                // under signed; "" is taken
	}{
		"signed":   {func(v *forge.Image, d ocispec.Descriptor) { sign(t, reg, v, d, a.builder) }, ""},
		"unsigned": {nil, reason.SignatureMissing},
		"revoked":  {func(v *forge.Image, d ocispec.Descriptor) { sign(t, reg, v, d, gone) }, reason.SignatureRevoked},
		"run out": {func(v *forge.Image, d ocispec.Descriptor) {
			forge.Sign(t, reg, v.Name, d, a.builder.SignOver(t, forge.Target(d)))
		}, reason.SignatureExpired},
	} {
		v := image(t, reg, strings.ReplaceAll(name, " ", "-"))
		old := forge.Honest(t, v).Put(reg)
		if c.sign != nil {
			c.sign(v, old)
		}
		for policy, of := range policies {
			n := newNode(t, of)
			id, why, err := n.pull(v)
			row.holds(t, policy, name, why, err)
			if want := c.want; policy == trust.Signed && (why != want || want == "" && err != nil) || policy != trust.Signed && id != old.Digest.Encoded() {
				t.Errorf("%s, %s: got %s, %s, %v", policy, name, id, why, err)
			}
			if err == nil {
				if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
					t.Errorf("%s, %s: wrong bytes at %q, error %v", policy, name, wrong, failed)
				}
			}
		}
		if name != "signed" {
			continue
		}
		f := forge.Honest(t, v)
		f.M.Created = time.Now()
		newer := f.Put(reg)
		sign(t, reg, v, newer, a.builder)
		for policy, of := range policies {
			if id, why, err := newNode(t, of).pull(v); id != newer.Digest.Encoded() {
				t.Errorf("%s, %s, behind a newer one: got %s, %s, %v", policy, name, id, why, err)
			}
		}
	}

	// Of an older image, with a signature that is good for it.
	v, older := image(t, reg, "app"), forge.Push(t, reg, "app", forge.Tar(t, forge.File("old", "old", 0o755)), forge.Tar(t, forge.File("bin/run", "with a hole", 0o755)))
	d := forge.Honest(t, older).Put(reg)
	sign(t, reg, older, d, a.builder)
	listed := list(reg, v, d)
	for policy, of := range policies {
		_, why, err := newNode(t, of).pull(v)
		row.holds(t, policy, "an older image's", why, err)
		if why != reason.Damaged || !strings.Contains(err.Error(), "subject") {
			t.Errorf("%s, an older image's: got %s, %v", policy, why, err)
		}
	}
	listed()
	f, moved := forge.Honest(t, older), forge.Honest(t, v)
	f.M.Subject, f.M.Config = moved.M.Subject, moved.M.Config
	e := a.builder.Sign(t, forge.Target(d), "jws")
	forge.Sign(t, reg, v.Name, f.Put(reg), e)
	for policy, of := range policies {
		_, why, err := newNode(t, of).pull(v)
		row.holds(t, policy, "an older image's with another subject", why, err)
		if err == nil {
			t.Errorf("%s: an older image's with another subject is taken", policy)
		}
	}
}

// list has the registry say that d is an artifact of v.
func list(reg *registrytest.Registry, v *forge.Image, d ocispec.Descriptor) (remove func()) {
	list := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"artifactType":%q}]}`,
		ocispec.MediaTypeImageIndex, d.MediaType, d.Digest, d.Size, artifact.ArtifactType)
	return reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/referrers/"+v.Manifest.String()) }, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, list))
}

// TestListThatLies: a registry that lists an artifact as another image's gives a node nothing to take, signed or not.
func TestListThatLies(t *testing.T) {
	a := newAuthority(t, nil)
	row := rowOf(t, rowList)
	reg := registrytest.Start(t, registrytest.Options{})
	v, other := image(t, reg, "app"), forge.Push(t, reg, "app", forge.Tar(t, forge.File("evil", "evil", 0o755)), forge.Tar(t, forge.File("b", "", 0o644)))
	d := forge.Honest(t, other).Put(reg)
	list(reg, v, d)
	for _, when := range []string{"unsigned", "signed"} {
		if when == "signed" {
			sign(t, reg, other, d, a.builder)
		}
		for policy, of := range map[trust.Policy]policyOf{trust.Open: nil, trust.Signed: a.signed, trust.Proven: proven} {
			_, why, err := newNode(t, of).pull(v)
			if row.holds(t, policy, when, why, err); err != nil && !strings.Contains(err.Error(), "subject") {
				t.Errorf("%s, %s: %v", policy, when, err)
			}
		}
	}
}

// TestOversizedAnswers: what has no end or is larger than such a thing may be ends the search, whatever it is.
func TestOversizedAnswers(t *testing.T) {
	a := newAuthority(t, nil)
	row := rowOf(t, rowEndless)
	reg := registrytest.Start(t, registrytest.Options{})
	v := image(t, reg, "app")
	d := forge.Honest(t, v).Put(reg)
	sign(t, reg, v, d, a.builder)
	policies := map[trust.Policy]policyOf{trust.Open: nil, trust.Signed: a.signed, trust.Proven: proven}
	huge := strings.Repeat(" ", artifact.MaxManifestSize+1)
	for what, match := range map[string]func(*http.Request) bool{
		"referrers":         registrytest.Referrers,
		"artifact manifest": func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/manifests/"+d.Digest.String()) },
		"image manifest":    func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/manifests/"+v.Manifest.String()) },
	} {
		remove := reg.Inject(match, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, huge))
		for policy, of := range policies {
			_, why, err := newNode(t, of).pull(v)
			if row.holds(t, policy, what, why, err); err == nil {
				t.Errorf("%s: %s is taken", policy, what)
			}
		}
		remove()
	}
	for policy, of := range policies {
		if _, _, err := newNode(t, of).pull(v); err != nil {
			t.Errorf("%s: %v", policy, err)
		}
	}
}
