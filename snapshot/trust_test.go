package snapshot

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// signedNode is a node whose policy is signed for all repositories, with an authority that it trusts.
type signedNode struct {
	*testNode
	ca     *trusttest.CA
	signer *trusttest.Identity
	dir    string // of the trust policy and the trust store
}

func newSignedNode(t *testing.T) *signedNode {
	s := &signedNode{ca: trusttest.NewCA(t, "authority", nil)}
	s.signer = s.ca.Issue(t, "build", trusttest.Leaf{})
	s.dir = trusttest.NewDir(t, s.ca, trusttest.Statement{Name: "all"})
	v, err := notary.NewVerifier(notary.Options{Dir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	s.testNode = newTestNodeWith(t, func(n *testNode) {
		n.policy = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, v }
	})
	return s
}

// artifacts are those of img that the registry lists.
func (n *testNode) artifacts(img testImage) []ocispec.Descriptor {
	n.t.Helper()
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	repo, _, _, err := registryclient.ParseReference(img.ref)
	if err != nil {
		n.t.Fatal(err)
	}
	list, err := client.Referrers(n.t.Context(), repo, img.manifest, artifact.ArtifactType)
	if err != nil || len(list) == 0 {
		n.t.Fatalf("artifacts: %v, %v", list, err)
	}
	return list
}

func target(d ocispec.Descriptor) trust.Target {
	return trust.Target{Digest: d.Digest, MediaType: d.MediaType, Size: d.Size}
}

// putSignature attaches e to d in a repository, with hints or, as notation itself does, without.
func (n *testNode) putSignature(repo string, d ocispec.Descriptor, e trust.Envelope, hints bool) {
	n.t.Helper()
	var more map[string]string
	if !hints {
		more = map[string]string{trust.HintDigest: "", trust.HintSize: "", trust.HintType: ""}
	}
	_, raw, err := trust.Manifest(d, e, more)
	if err != nil {
		n.t.Fatal(err)
	}
	n.reg.PutBlob(repo, e.Bytes)
	n.reg.PutBlob(repo, ocispec.DescriptorEmptyJSON.Data)
	n.reg.PutManifest(repo, "", ocispec.MediaTypeImageManifest, raw)
}

func (s *signedNode) find(img testImage) (string, error) {
	id, _, err := s.images.Find(testContext(), img.ref, img.manifest)
	return id, err
}

// ofSignatures matches requests for lists of signatures and for envelopes.
func (s *signedNode) signatureRequests(d ocispec.Descriptor, envelopes ...trust.Envelope) int {
	n, _ := s.reg.Count(func(q registrytest.Request) bool {
		of := strings.Contains(q.Path, "/referrers/"+d.Digest.String())
		for _, e := range envelopes {
			of = of || strings.Contains(q.Path, e.Digest.String())
		}
		return of
	})
	return n
}

// TestSigned: an artifact is taken once one of its signatures is good, and each way in which none is has its reason. Of what is refused nothing stays and no
// data is read.
func TestSigned(t *testing.T) {
	cases := map[string]struct {
		sign func(s *signedNode, d ocispec.Descriptor) // nil does not
		want reason.Code                               // "" is taken
	}{
		"unsigned": {nil, reason.SignatureMissing},
		"JWS": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, s.signer.Sign(s.t, target(d), "jws"), true)
		}, ""},
		"COSE": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, s.signer.Sign(s.t, target(d), "cose"), true)
		}, ""},
		"without hints": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, s.signer.Sign(s.t, target(d), "jws"), false)
		}, ""},
		"hints that lie": {func(s *signedNode, d ocispec.Descriptor) {
			e := s.signer.Sign(s.t, target(d), "jws")
			junk := trusttest.Envelope(e.MediaType, []byte("junk"))
			s.reg.PutBlob("app", junk.Bytes)
			_, raw, err := trust.Manifest(d, e, trust.Hints(junk.Descriptor()))
			if err != nil {
				s.t.Fatal(err)
			}
			s.reg.PutBlob("app", e.Bytes)
			s.reg.PutManifest("app", "", ocispec.MediaTypeImageManifest, raw)
		}, ""},
		"by somebody else": {func(s *signedNode, d ocispec.Descriptor) {
			evil := trusttest.NewCA(s.t, "authority", nil).Issue(s.t, "build", trusttest.Leaf{})
			s.putSignature("app", d, evil.Sign(s.t, target(d), "jws"), true)
		}, reason.SignatureUntrusted},
		"of another artifact": {func(s *signedNode, d ocispec.Descriptor) {
			other := target(d)
			other.Digest = s.artifacts(s.push("other", tarOf(s.t, file{"o", ""})).converted(s.testNode))[0].Digest
			s.putSignature("app", d, s.signer.Sign(s.t, other, "jws"), true)
		}, reason.SignatureInvalid},
		"of no form": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, trusttest.Envelope("application/jose+json", []byte(`{"payload":""}`)), true)
		}, reason.SignatureInvalid},
		"over": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, s.signer.SignOver(s.t, target(d)), true)
		}, reason.SignatureExpired},
		"revoked": {func(s *signedNode, d ocispec.Descriptor) {
			ca := trusttest.NewCA(s.t, "revoking", trusttest.NewServer(s.t))
			id := ca.Issue(s.t, "build", trusttest.Leaf{})
			ca.Server.Revoke(id)
			trusttest.WriteStore(s.t, s.dir, "default", ca.Root)
			s.putSignature("app", d, id.Sign(s.t, target(d), "jws"), true)
		}, reason.SignatureRevoked},
		"no statement": {func(s *signedNode, d ocispec.Descriptor) {
			s.putSignature("app", d, s.signer.Sign(s.t, target(d), "jws"), true)
			trusttest.WritePolicy(s.t, s.dir, trusttest.Statement{Name: "others", Scopes: []string{"r.example/others"}})
		}, reason.SignatureUnchecked},
		"registry fails": {func(s *signedNode, d ocispec.Descriptor) {
			e := s.signer.Sign(s.t, target(d), "jws")
			s.putSignature("app", d, e, true)
			s.t.Cleanup(s.reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, e.Digest.String()) }, -1, registrytest.Status(http.StatusForbidden)))
		}, reason.Auth},
		"registry fails for the good one": {func(s *signedNode, d ocispec.Descriptor) {
			s.strangers(d, 3)
			e := s.signer.Sign(s.t, target(d), "jws")
			s.putSignature("app", d, e, true)
			s.t.Cleanup(s.reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, e.Digest.String()) }, -1, registrytest.Status(http.StatusForbidden)))
		}, reason.Auth},
		"cannot be checked, beside a stranger's": {func(s *signedNode, d ocispec.Descriptor) {
			s.strangers(d, 3)
			server := trusttest.NewServer(s.t)
			ca := trusttest.NewCA(s.t, "revoking", server)
			server.Set(trusttest.Down)
			trusttest.WriteStore(s.t, s.dir, "default", ca.Root)
			s.putSignature("app", d, ca.Issue(s.t, "build", trusttest.Leaf{}).Sign(s.t, target(d), "jws"), true)
		}, reason.SignatureUnchecked},
		"a good one behind as many as are looked at": {func(s *signedNode, d ocispec.Descriptor) {
			s.strangers(d, 63)
			s.putSignature("app", d, s.signer.Sign(s.t, target(d), "jws"), true)
		}, ""},
		"a good one behind more": {func(s *signedNode, d ocispec.Descriptor) {
			list := s.strangers(d, 64)
			e := s.signer.Sign(s.t, target(d), "jws")
			s.putSignature("app", d, e, true)
			good, _, err := trust.Manifest(d, e, nil)
			if err != nil {
				s.t.Fatal(err)
			}
			b, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: append(list, good)})
			if err != nil {
				s.t.Fatal(err)
			}
			s.t.Cleanup(s.reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/referrers/"+d.Digest.String()) }, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, string(b))))
		}, reason.SignatureUntrusted},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s := newSignedNode(t)
			img := s.push("app", threeLayers(t)...).converted(s.testNode)
			d := s.artifacts(img)[0]
			if c.sign != nil {
				c.sign(s, d)
			}
			s.reg.Reset()
			id, err := s.find(img)
			if c.want == "" {
				if err != nil || id != d.Digest.Encoded() {
					t.Errorf("got %s, %v", id, err)
				}
				return
			}
			if got := reason.Of(err); err == nil || got != c.want {
				t.Errorf("got %s, %v", got, err)
			}
			if left := s.filesIn("images", "indexes"); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
			if n := s.dataRequests(); n != 0 {
				t.Errorf("%d requests for data", n)
			}
		})
	}
}

// strangers attaches n signatures of an authority that nobody trusts to d, and returns them as a list has them.
func (s *signedNode) strangers(d ocispec.Descriptor, n int) (list []ocispec.Descriptor) {
	s.t.Helper()
	evil := trusttest.NewCA(s.t, "evil", nil).Issue(s.t, "build", trusttest.Leaf{}).Signer(s.t, notary.SignOptions{})
	for range n {
		e, _, err := evil.Sign(s.t.Context(), target(d))
		if err != nil {
			s.t.Fatal(err)
		}
		s.putSignature("app", d, e, true)
		desc, _, err := trust.Manifest(d, e, nil)
		if err != nil {
			s.t.Fatal(err)
		}
		list = append(list, desc)
	}
	return list
}

func (img testImage) converted(n *testNode) testImage {
	n.t.Helper()
	n.convert(img)
	return img
}

// TestSignedBehindUnsigned: artifacts without a signature, which whoever may push can put before one that has one, are passed over; and an image that has only
// those says so, however the others fail.
func TestSignedBehindUnsigned(t *testing.T) {
	s := newSignedNode(t)
	img := s.push("app", threeLayers(t)...).converted(s.testNode)
	d := s.artifacts(img)[0]
	unsigned := *s.artifactOf(img)
	for i := range 9 {
		unsigned.Created = time.Now().Add(time.Duration(i) * time.Hour)
		s.attach(unsigned)
	}
	if _, err := s.find(img); reason.Of(err) != reason.SignatureMissing {
		t.Errorf("got %v", err)
	}
	evil := trusttest.NewCA(t, "evil", nil).Issue(t, "build", trusttest.Leaf{})
	s.putSignature("app", d, evil.Sign(t, target(d), "jws"), true)
	s.restart() // or the search before stands, if it took long
	if _, err := s.find(img); reason.Of(err) != reason.SignatureUntrusted {
		t.Errorf("the signed one does not give the reason: %v", err)
	}
	s.putSignature("app", d, s.signer.Sign(t, target(d), "jws"), true)
	s.restart()
	if id, err := s.find(img); err != nil || id != d.Digest.Encoded() {
		t.Errorf("got %s, %v", id, err)
	}
}

// TestVerdictIsKept: a verdict is asked for once, over restarts, until what is trusted changes; and it is of one repository.
func TestVerdictIsKept(t *testing.T) {
	s := newSignedNode(t)
	img := s.push("app", threeLayers(t)...).converted(s.testNode)
	d := s.artifacts(img)[0]
	e := s.signer.Sign(t, target(d), "jws")
	s.putSignature("app", d, e, true)
	asked := func(want bool) {
		t.Helper()
		s.reg.Reset()
		if _, err := s.find(img); err != nil {
			t.Fatal(err)
		}
		if got := s.signatureRequests(d, e); (got > 0) != want {
			t.Errorf("%d requests for the signature", got)
		}
	}
	asked(true)
	s.prepareAll(img, 0, "") // so that the image stays
	s.restart()
	asked(false)
	trusttest.WritePolicy(t, s.dir, trusttest.Statement{Name: "again"})
	s.restart()
	asked(true)
	trusttest.WritePolicy(t, s.dir, trusttest.Statement{Name: "and again"})
	asked(true) // what an earlier search has found does not stand
	asked(false)

	// The same artifact, and nobody has signed it for this repository's users.
	other := img
	other.ref = strings.Replace(img.ref, "/app", "/copy", 1)
	s.copyTo("copy", img, d)
	if _, err := s.find(other); reason.Of(err) != reason.SignatureMissing {
		t.Errorf("of another repository: %v", err)
	}
	s.putSignature("copy", d, e, true)
	s.reg.Reset()
	if id, err := s.find(other); err != nil || id != d.Digest.Encoded() {
		t.Errorf("of another repository: %s, %v", id, err)
	}
	s.restart()
	asked(false)

	// A trust store without the authority.
	trusttest.WriteStore(t, s.dir, "default", trusttest.NewCA(t, "new", nil).Root)
	s.restart()
	if _, err := s.find(img); reason.Of(err) != reason.SignatureUntrusted {
		t.Errorf("after the authority is gone: %v", err)
	}
}

// copyTo puts img's manifest and its artifact d into another repository.
func (n *testNode) copyTo(repo string, img testImage, d ocispec.Descriptor) {
	n.t.Helper()
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	from, _, _, err := registryclient.ParseReference(img.ref)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, dgst := range []ocispec.Descriptor{{Digest: img.manifest}, d} {
		raw, err := client.Manifest(n.t.Context(), from, dgst.Digest, artifact.MaxManifestSize)
		if err != nil {
			n.t.Fatal(err)
		}
		m, err := artifact.UnmarshalManifest(raw)
		if err != nil {
			n.t.Fatal(err)
		}
		for _, b := range append(m.Layers, m.Config) {
			blob, err := client.Blob(n.t.Context(), from, b.Digest, 1<<20)
			if err != nil {
				n.t.Fatal(err)
			}
			n.reg.PutBlob(repo, blob)
		}
		n.reg.PutManifest(repo, "", m.MediaType, raw)
	}
}

// TestHintOfProfile: where a profile says where the envelope is, neither a list of signatures is waited for nor the signature's manifest asked for.
func TestHintOfProfile(t *testing.T) {
	s := newSignedNode(t)
	img := s.push("app", threeLayers(t)...).converted(s.testNode)
	d := s.artifacts(img)[0]
	e := s.signer.Sign(t, target(d), "jws")
	s.putSignature("app", d, e, false)
	profile := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact.ProfileType, Config: ocispec.DescriptorEmptyJSON,
		Subject:     &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: img.manifest, Size: 1},
		Annotations: trust.Hints(e.Descriptor()),
	}
	raw, err := json.Marshal(profile)
	if err != nil {
		t.Fatal(err)
	}
	s.reg.PutManifest("app", "", profile.MediaType, raw)
	s.t.Cleanup(s.reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/referrers/"+d.Digest.String()) }, -1, registrytest.Status(http.StatusForbidden)))
	if id, err := s.find(img); err != nil || id != d.Digest.Encoded() {
		t.Errorf("got %s, %v", id, err)
	}
}

// TestPlatformOfArtifact: an artifact that says it is of another platform is not the image's.
func TestPlatformOfArtifact(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...).converted(n)
	bad := *n.artifactOf(img)
	n.deleteArtifact(img)
	bad.Platform.Architecture = "arm64"
	n.attach(bad)
	_, _, err := n.images.Find(testContext(), img.ref, img.manifest)
	if reason.Of(err) != reason.Damaged || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("got %v", err)
	}
}

// TestManifestDigestOfAnotherKind: whoever can set labels can name a manifest by another digest than SHA-256, in capitals or cut short: nothing is streamed.
func TestManifestDigestOfAnotherKind(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...).converted(n)
	hex := img.manifest.Encoded()
	for _, dgst := range []string{"sha512:" + hex + hex, "sha256:" + strings.ToUpper(hex), "sha256:" + hex[:63], "sha256:../" + hex[3:], "sha256:", hex, "sha384:" + hex + hex[:32]} {
		mounts, err := n.sn.Prepare(testContext(), "extract "+dgst, "", img.labelsOf(0, dgst))
		if err != nil || len(mounts) == 0 {
			t.Errorf("%s: got %v, want a normal pull", dgst, err)
		}
	}
	if left := n.filesIn("images", "indexes"); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}
