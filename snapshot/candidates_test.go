package snapshot

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestArtifactsWithoutEnd: a search tries so many artifacts and no more, whatever is attached.
func TestArtifactsWithoutEnd(t *testing.T) {
	n := newTestNode(t)
	img := n.push("app", threeLayers(t)...).converted(n)
	bad := *n.artifactOf(img)
	for i := range 70 {
		bad.Layers[0].IndexDigest = digest.FromString(fmt.Sprint(i))
		bad.Created = time.Now().Add(time.Duration(i+1) * time.Hour)
		n.attach(bad)
	}
	n.reg.Reset()
	if _, _, err := n.images.Find(testContext(), img.ref, img.manifest); err == nil || !strings.Contains(err.Error(), "7 older artifacts are not looked at") {
		t.Errorf("got %v", err)
	}
	if got, _ := n.reg.Count(func(q registrytest.Request) bool { return strings.Contains(q.Path, "/manifests/") }); got != 65 {
		t.Errorf("%d manifests are read, want the image's and 64", got)
	}
}

// TestLargeIndexes: of an artifact with large indexes nothing but its manifest and signature is asked for before that is good.
func TestLargeIndexes(t *testing.T) {
	s := newSignedNode(t)
	img := s.push("app", threeLayers(t)...).converted(s.testNode)
	large := *s.artifactOf(img)
	s.deleteArtifact(img)
	l := &large.Layers[0]
	l.Digest, l.IndexSize = digest.FromString("large"), 17<<20
	l.Size = l.IndexOffset + l.IndexSize
	s.attach(large)
	d := s.artifacts(img)[0]
	evil := trusttest.NewCA(t, "evil", nil).Issue(t, "build", trusttest.Leaf{}).Sign(t, target(d), "jws")
	s.putSignature("app", d, evil, true)
	s.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, evil.Digest.String()) }, -1, registrytest.Delay(100*time.Millisecond))
	s.reg.Reset()
	if _, err := s.find(img); reason.Of(err) != reason.SignatureUntrusted {
		t.Errorf("got %v", err)
	}
	if got, _ := s.reg.Count(func(q registrytest.Request) bool { return strings.HasSuffix(q.Path, l.Digest.String()) }); got != 0 {
		t.Errorf("%d requests for its layer", got)
	}
}
