// Package attack is the attack suite: what a node does with what somebody who may push, or who holds the registry, has made of an image's artifact, under each policy.
// docs/security.md has the table of attacks; those that are not here are tests of the packages that meet them, which it names.
package attack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/stream"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// node is what of a node decides on an artifact and reads it: everything but mounts.
type node struct {
	t      testing.TB
	root   string
	images *stream.Store
}

// nowhere is where nothing is mounted.
type nowhere struct{ stream.Mounter }

func (nowhere) At(string) []string      { return nil }
func (nowhere) Targets(string) []string { return nil }
func (nowhere) Invalidate(string) error { return nil }
func (nowhere) Started(string)          {}

func newNode(t testing.TB, policy func(registryclient.Repository) (trust.Policy, trust.Verifier)) *node {
	t.Helper()
	n := &node{t: t, root: t.TempDir()}
	chunks, err := cache.Open(filepath.Join(n.root, "cache"), cache.Options{Index: stream.Indexes(n.root)})
	if err != nil {
		t.Fatal(err)
	}
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := stream.Options{Root: n.root, Registry: client, Cache: chunks, Mounter: nowhere{}, Policy: policy, RetryAfter: time.Nanosecond}
	if o.Trust.Ledger, err = ledger.Open(filepath.Join(n.root, "trust"), nil); err != nil {
		t.Fatal(err)
	}
	n.images, err = stream.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.images.EndSearches()
		if err := chunks.Close(); err != nil {
			t.Error(err)
		}
		client.Close()
	})
	return n
}

// pull looks for v's artifact, as a pull does.
func (n *node) pull(v *victim) (id string, why reason.Code, err error) {
	id, _, err = n.images.Find(context.Background(), v.ref, v.manifest)
	if err != nil {
		why = reason.Of(err)
	}
	return id, why, err
}

// read reads all of the image and returns the parts that are not its own bytes, and the first error.
func (n *node) read(id string, v *victim) (wrong []string, failed error) {
	n.t.Helper()
	dev, err := n.images.Device(n.t.Context(), id)
	if err != nil {
		return nil, err
	}
	defer dev.(io.Closer).Close()
	want := v.content()
	for off := 0; off < len(want); off += 512 {
		got := make([]byte, min(512, len(want)-off))
		if _, err := dev.ReadAt(n.t.Context(), got, int64(off)); err != nil {
			if failed == nil {
				failed = err
			}
			continue
		}
		if !bytes.Equal(got, want[off:off+len(got)]) {
			wrong = append(wrong, fmt.Sprintf("%d: %q", off, got[:min(40, len(got))]))
		}
	}
	return wrong, failed
}

// kept lists what a node has of images.
func (n *node) kept() (files []string) {
	for _, dir := range []string{"images", "indexes"} {
		filepath.WalkDir(filepath.Join(n.root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, path)
			}
			return err
		})
	}
	return files
}

// attack is one on an artifact, by whoever may push it.
type attack struct {
	forge func(f *forgery)
	// What a node does that asks for no signature: the reasons of which one is that of the normal pull. Where there is none, reads are right, because what cannot be
	// had of the artifact comes from the image's own layer, or fail.
	refused []reason.Code
}

// attacks by their rows in docs/security.md.
var attacks = map[string]attack{
	"layers swapped": {forge: func(f *forgery) {
		f.m.Layers[0], f.m.Layers[1] = f.m.Layers[1], f.m.Layers[0]
	}, refused: []reason.Code{reason.Damaged}},
	"layers swapped, sources kept": {forge: func(f *forgery) {
		f.m.Layers[0], f.m.Layers[1] = f.m.Layers[1], f.m.Layers[0]
		f.m.Layers[0].Source, f.m.Layers[1].Source = f.m.Layers[1].Source, f.m.Layers[0].Source
	}, refused: []reason.Code{reason.Damaged}},
	"another tar, and its index says so": {forge: func(f *forgery) {
		f.encode(1, tarOf(f.t, entry{"bin/", "", 0o755}, entry{"bin/run", "evil", 0o755}))
	}, refused: []reason.Code{reason.Damaged}},
	"chunk table: ends go back": {forge: func(f *forgery) {
		f.table(1, func(e [][]byte) { copy(e[1], e[0][:8]) })
	}, refused: []reason.Code{reason.Damaged}},
	"chunk table: frames beyond the blob": {forge: func(f *forgery) {
		f.table(1, func(e [][]byte) { binary.LittleEndian.PutUint64(e[len(e)-1][offFrameEnd:], 1<<40) })
	}, refused: []reason.Code{reason.Damaged}},
	"chunk table: a chunk beyond the tar": {forge: func(f *forgery) {
		f.table(1, func(e [][]byte) { binary.LittleEndian.PutUint64(e[len(e)-1], 1<<40) })
	}, refused: []reason.Code{reason.Damaged}},
	"chunk table: more chunks than there are": {forge: func(f *forgery) {
		f.index(1, func(index []byte) { binary.LittleEndian.PutUint32(index[offChunks:], 1<<31) })
	}, refused: []reason.Code{reason.Damaged}},
	"chunk table: frames elsewhere": {forge: func(f *forgery) {
		f.table(1, func(e [][]byte) {
			end := binary.LittleEndian.Uint64(e[1][offFrameEnd:])
			binary.LittleEndian.PutUint64(e[1][offFrameEnd:], end+3)
		})
	}},
	"frames that are none": {forge: func(f *forgery) {
		l := &f.m.Layers[1]
		clear(f.blobs[1][:l.IndexOffset])
		l.Digest = digest.FromBytes(f.blobs[1])
	}},
	"another image's config": {forge: func(f *forgery) { f.m.Config.Digest = digest.FromString("other") }, refused: []reason.Code{reason.Damaged}},
	"a layer left out":       {forge: func(f *forgery) { f.m.Layers = f.m.Layers[:1] }, refused: []reason.Code{reason.Damaged}},
	"another platform":       {forge: func(f *forgery) { f.m.Platform.Architecture = "arm64" }, refused: []reason.Code{reason.Damaged}},
	"digest of a layer: sha512": {forge: func(f *forgery) {
		f.replace(f.m.Layers[1].Digest.String(), digest.SHA512.FromBytes(f.blobs[1]).String())
	}, refused: []reason.Code{reason.Damaged}},
	"digest of a layer: cut short": {forge: func(f *forgery) {
		f.replace(f.m.Layers[1].Digest.String(), f.m.Layers[1].Digest.String()[:70])
	}, refused: []reason.Code{reason.Damaged}},
	"digest of an index: in capitals": {forge: func(f *forgery) {
		f.replace(f.m.Layers[1].IndexDigest.String(), "sha256:"+strings.ToUpper(f.m.Layers[1].IndexDigest.Encoded()))
	}, refused: []reason.Code{reason.Damaged}},
	"digest of an index: a path": {forge: func(f *forgery) {
		f.replace(f.m.Layers[1].IndexDigest.String(), "sha256:../../"+f.m.Layers[1].IndexDigest.Encoded()[6:])
	}, refused: []reason.Code{reason.Damaged}},
	"index of many bytes": {forge: func(f *forgery) {
		l := &f.m.Layers[1]
		l.IndexSize = artifact.MaxIndexSize
		l.Size = l.IndexOffset + l.IndexSize
	}, refused: []reason.Code{reason.Unsupported, reason.Damaged}},
}

func image(t testing.TB, reg *registrytest.Registry, name string) *victim {
	return push(t, reg, name,
		tarOf(t, entry{"etc/", "", 0o755}, entry{"etc/base", noise(30000), 0o644}),
		tarOf(t, entry{"bin/", "", 0o755}, entry{"bin/run", noise(20000), 0o755}, entry{"etc/", "", 0o755}, entry{"etc/app", noise(9000), 0o600}))
}

// TestAttacks: a forged artifact is refused or reads of it fail; where a signature is asked for, it is refused before anything of it is kept, whether it has none or
// the attacker's own, also in front of one that is signed, which is taken.
func TestAttacks(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	builder := ca.Issue(t, "build", trusttest.Leaf{})
	attacker := trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{})
	verifier, err := notary.NewVerifier(notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})})
	if err != nil {
		t.Fatal(err)
	}
	signed := func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, verifier }
	for name, a := range attacks {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			v := image(t, reg, "app")
			f := honest(t, v)
			a.forge(f)
			f.m.Created = time.Now().Add(time.Hour) // before all others
			forged := f.put(reg)

			n := newNode(t, nil)
			id, why, err := n.pull(v)
			switch {
			case len(a.refused) > 0:
				if !slices.Contains(a.refused, why) {
					t.Errorf("open: got %q, %v, want %q", why, err, a.refused)
				}
			case err != nil:
				t.Errorf("open: got %v", err)
			default:
				if wrong, _ := n.read(id, v); len(wrong) > 0 {
					t.Errorf("open: wrong bytes at %q", wrong)
				}
			}

			n = newNode(t, proven)
			if id, _, err = n.pull(v); err == nil {
				if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
					t.Errorf("proven: wrong bytes at %q, error %v", wrong, failed)
				}
			}

			wantRefused(t, newNode(t, signed), v, "unsigned")
			e := attacker.Sign(t, trust.Target{Digest: forged.Digest, MediaType: forged.MediaType, Size: forged.Size}, "jws")
			sign(t, reg, v.name, forged, e)
			wantRefused(t, newNode(t, signed), v, "signed by the attacker")

			good := honest(t, v).put(reg)
			sign(t, reg, v.name, good, builder.Sign(t, trust.Target{Digest: good.Digest, MediaType: good.MediaType, Size: good.Size}, "jws"))
			n = newNode(t, signed)
			if id, why, err = n.pull(v); err != nil || id != good.Digest.Encoded() {
				t.Fatalf("signed, behind the forged one: got %s, %s, %v", id, why, err)
			}
			if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
				t.Errorf("signed: wrong bytes at %q, error %v", wrong, failed)
			}
		})
	}
}

func wantRefused(t *testing.T, n *node, v *victim, what string) {
	t.Helper()
	id, why, err := n.pull(v)
	if err == nil {
		t.Errorf("%s: %s is taken", what, id)
	}
	if want := []reason.Code{reason.SignatureMissing, reason.SignatureUntrusted, reason.Damaged, reason.Unsupported}; !slices.Contains(want, why) {
		t.Errorf("%s: got %s, %v", what, why, err)
	}
	if kept := n.kept(); len(kept) > 0 {
		t.Errorf("%s: kept %q", what, kept)
	}
}

// lies are artifacts in which tar, index and chunk digests are right for each other, and not for the image: nobody can tell them from an honest one before the
// whole tar is hashed.
var lies = map[string]func(f *forgery){
	"another tar": func(f *forgery) {
		f.encode(1, tarOf(f.t, entry{"bin/", "", 0o755}, entry{"bin/run", "evil", 0o755}))
		f.claim(1)
	},
	"a setuid program more": func(f *forgery) {
		f.encode(1, tarOf(f.t, entry{"bin/", "", 0o755}, entry{"bin/run", noise(20000), 0o755}, entry{"etc/", "", 0o755}, entry{"etc/app", noise(9000), 0o600}, entry{"bin/su", "evil", 0o4755}))
		f.claim(1)
	},
	"a file less": func(f *forgery) {
		f.encode(1, tarOf(f.t, entry{"bin/", "", 0o755}, entry{"bin/run", noise(20000), 0o755}, entry{"etc/", "", 0o755}))
		f.claim(1)
	},
	"another mode": func(f *forgery) {
		f.encode(1, tarOf(f.t, entry{"bin/", "", 0o755}, entry{"bin/run", noise(20000), 0o4755}, entry{"etc/", "", 0o755}, entry{"etc/app", noise(9000), 0o600}))
		f.claim(1)
	},
	"one chunk in another's place": func(f *forgery) {
		f.table(1, func(e [][]byte) { copy(e[2][offDigest:], e[3][offDigest:]) })
	},
}

func proven(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Proven, nil }

// TestLies: open takes a lie until its proof, which puts it into quarantine: reads fail from then on, over restarts, and pulls are normal, or of the next artifact. Proven
// finds it before the first read, and signed does not take it, unless a trusted identity has signed it: then it is as with open.
func TestLies(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	builder := ca.Issue(t, "build", trusttest.Leaf{})
	verifier, err := notary.NewVerifier(notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})})
	if err != nil {
		t.Fatal(err)
	}
	signed := func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, verifier }
	for name, forge := range lies {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			v := image(t, reg, "app")
			f := honest(t, v)
			forge(f)
			f.m.Created = time.Now().Add(time.Hour)
			lie := f.put(reg)
			wantRefused(t, newNode(t, signed), v, "signed")
			sign(t, reg, v.name, lie, builder.Sign(t, trust.Target{Digest: lie.Digest, MediaType: lie.MediaType, Size: lie.Size}, "jws"))

			strict := newNode(t, proven)
			if _, why, err := strict.pull(v); why != reason.Tampered {
				t.Errorf("proven: got %s, %v", why, err)
			}
			nodes := map[string]*node{"open": newNode(t, nil), "signed by a trusted key": newNode(t, signed)}
			for policy, n := range nodes {
				id, _, err := n.pull(v)
				if err != nil {
					t.Fatalf("%s: %v", policy, err)
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

			good := honest(t, v).put(reg)
			sign(t, reg, v.name, good, builder.Sign(t, trust.Target{Digest: good.Digest, MediaType: good.MediaType, Size: good.Size}, "cose"))
			nodes["proven"], nodes["proven, for the first time"] = strict, newNode(t, proven)
			for policy, n := range nodes {
				id, why, err := n.pull(v)
				for deadline := time.Now().Add(time.Minute); why == reason.Tampered && time.Now().Before(deadline); id, why, err = n.pull(v) {
					// A search that took long, on a busy machine, stands for a while.
				}
				if err != nil || id != good.Digest.Encoded() {
					t.Fatalf("%s: beside an honest one: got %s, %s, %v", policy, id, why, err)
				}
				if wrong, failed := n.read(id, v); len(wrong) > 0 || failed != nil {
					t.Errorf("%s: wrong bytes at %q, error %v", policy, wrong, failed)
				}
			}
		})
	}
}

// TestListThatLies: a registry that lists an artifact as another image's gives a node nothing to take.
func TestListThatLies(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	v, other := image(t, reg, "app"), push(t, reg, "app", tarOf(t, entry{"evil", "evil", 0o755}), tarOf(t, entry{"b", "", 0o644}))
	d := honest(t, other).put(reg)
	list := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"artifactType":%q}]}`,
		ocispec.MediaTypeImageIndex, d.MediaType, d.Digest, d.Size, artifact.ArtifactType)
	reg.Inject(func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/referrers/"+v.manifest.String()) }, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, list))
	if _, why, err := newNode(t, nil).pull(v); why != reason.Damaged || !strings.Contains(err.Error(), "subject") {
		t.Errorf("got %s, %v", why, err)
	}
}

// TestOversizedAnswers: what has no end or is larger than such a thing may be ends the search, whatever it is.
func TestOversizedAnswers(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	v := image(t, reg, "app")
	d := honest(t, v).put(reg)
	huge := strings.Repeat(" ", artifact.MaxManifestSize+1)
	for what, match := range map[string]func(*http.Request) bool{
		"referrers":         registrytest.Referrers,
		"artifact manifest": func(r *http.Request) bool { return strings.Contains(r.URL.Path, d.Digest.String()) },
		"image manifest":    func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/"+v.manifest.String()) },
	} {
		remove := reg.Inject(match, -1, registrytest.Answer(ocispec.MediaTypeImageIndex, huge))
		if _, why, err := newNode(t, nil).pull(v); err == nil || why != reason.BadAnswer && why != reason.Damaged {
			t.Errorf("%s: got %s, %v", what, why, err)
		}
		remove()
	}
	if _, _, err := newNode(t, nil).pull(v); err != nil {
		t.Error(err)
	}
}
