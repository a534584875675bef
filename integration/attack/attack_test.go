// Package attack is the attack suite: what a node does with what somebody who may push, or who holds the registry, has made of an image's artifact, under each policy.
// docs/security.md has the table of attacks; those that are not here are tests of the packages that meet them, which it names.
package attack

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/cache"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/attack/forge"
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
	ledger *ledger.Ledger
}

// nowhere is where nothing is mounted.
type nowhere struct{ stream.Mounter }

func (nowhere) At(string) []string      { return nil }
func (nowhere) Targets(string) []string { return nil }
func (nowhere) Invalidate(string) error { return nil }
func (nowhere) Started(string)          {}

func newNode(t testing.TB, policy policyOf) *node {
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
	if n.ledger, err = ledger.Open(filepath.Join(n.root, "trust"), nil); err != nil {
		t.Fatal(err)
	}
	o.Trust.Ledger = n.ledger
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
func (n *node) pull(v *forge.Image) (id string, why reason.Code, err error) {
	id, _, err = n.images.Find(context.Background(), v.Ref, v.Manifest)
	if err != nil {
		why = reason.Of(err)
	}
	return id, why, err
}

// pullOther pulls after something was attached: a search that took long and failed, on a busy machine, stands for a while.
func (n *node) pullOther(v *forge.Image) (id string, why reason.Code, err error) {
	id, why, err = n.pull(v)
	for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); id, why, err = n.pull(v) {
	}
	return id, why, err
}

// read reads all of the image and returns the parts that are not its own bytes, and the first error.
func (n *node) read(id string, v *forge.Image) (wrong []string, failed error) {
	n.t.Helper()
	dev, err := n.images.Device(n.t.Context(), id)
	if err != nil {
		return nil, err
	}
	defer dev.(io.Closer).Close()
	want := v.Content()
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

// row is what docs/security.md says that a node does about an attack, under each policy: the table is what these tests hold nodes against.
type row map[trust.Policy]string

// rowOf returns that of an attack.
func rowOf(t testing.TB, attack string) row {
	t.Helper()
	b, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if len(cells) == 5 && strings.TrimSpace(cells[0]) == attack {
			return row{trust.Open: cells[1], trust.Signed: cells[2], trust.Proven: cells[3]}
		}
	}
	t.Fatalf("docs/security.md has no row %q with a cell for each policy", attack)
	return nil
}

var code = regexp.MustCompile("`([A-Z_]+)`")

// holds says if that is what a pull may come to: the artifact, where the cell has the word taken, or a normal pull for one of the reasons that it names.
func (r row) holds(t *testing.T, policy trust.Policy, when string, why reason.Code, err error) {
	t.Helper()
	taken := strings.Contains(r[policy], "taken")
	var codes []reason.Code
	for _, m := range code.FindAllStringSubmatch(r[policy], -1) {
		codes = append(codes, reason.Code(m[1]))
	}
	if err == nil && !taken || err != nil && !slices.Contains(codes, why) {
		t.Errorf("%s, %s: got %q, %v, want taken %v, %q", policy, when, why, err, taken, codes)
	}
}

// attack is one on an artifact, by whoever may push it. Row is that of docs/security.md, which says what a node does. Where the artifact is taken, reads are right, because
// what cannot be had of it comes from the image's own layer, or fail.
type attack struct {
	row   string
	forge func(f *forge.Artifact)
}

const (
	rowLayers   = "layers swapped, left out, or of another image; another config; another platform"
	rowTar      = "another tar, and the index says so"
	rowTable    = "a chunk table that overlaps, goes back, or points beyond blob or tar"
	rowFrames   = "frames elsewhere, frames that are none"
	rowDigests  = "digests: sha512, cut short, in capitals, with a path in it; keys of JSON twice"
	rowEndless  = "manifests, indexes, lists, challenges, headers without end"
	rowList     = "a list of referrers that names another image's artifact"
	rowLies     = "another tar, a setuid program more, a file less, another mode, one chunk in another's place; the index claims the image's diffID, and all chunk digests are right for it"
	rowReplayed = "older artifacts, put back: of the same image, or of an older one"
)

var attacks = map[string]attack{
	"layers swapped": {rowLayers, func(f *forge.Artifact) {
		f.M.Layers[0], f.M.Layers[1] = f.M.Layers[1], f.M.Layers[0]
	}},
	"layers swapped, sources kept": {rowLayers, func(f *forge.Artifact) {
		f.M.Layers[0], f.M.Layers[1] = f.M.Layers[1], f.M.Layers[0]
		f.M.Layers[0].Source, f.M.Layers[1].Source = f.M.Layers[1].Source, f.M.Layers[0].Source
	}},
	"another tar, and its index says so": {rowTar, func(f *forge.Artifact) {
		f.Encode(1, forge.Tar(f, forge.File("bin/", "", 0o755), forge.File("bin/run", "evil", 0o755)))
	}},
	"chunk table: ends go back": {rowTable, func(f *forge.Artifact) {
		f.Table(1, func(e [][]byte) { copy(e[1], e[0][:8]) })
	}},
	"chunk table: frames beyond the blob": {rowTable, func(f *forge.Artifact) {
		f.Table(1, func(e [][]byte) { binary.LittleEndian.PutUint64(e[len(e)-1][forge.OffFrameEnd:], 1<<40) })
	}},
	"chunk table: a chunk beyond the tar": {rowTable, func(f *forge.Artifact) {
		f.Table(1, func(e [][]byte) { binary.LittleEndian.PutUint64(e[len(e)-1], 1<<40) })
	}},
	"chunk table: more chunks than there are": {rowTable, func(f *forge.Artifact) {
		f.Index(1, func(index []byte) { binary.LittleEndian.PutUint32(index[forge.OffChunks:], 1<<31) })
	}},
	"chunk table: frames elsewhere": {rowFrames, func(f *forge.Artifact) {
		f.Table(1, func(e [][]byte) {
			end := binary.LittleEndian.Uint64(e[1][forge.OffFrameEnd:])
			binary.LittleEndian.PutUint64(e[1][forge.OffFrameEnd:], end+3)
		})
	}},
	"frames that are none": {rowFrames, func(f *forge.Artifact) {
		l := &f.M.Layers[1]
		clear(f.Blobs[1][:l.IndexOffset])
		l.Digest = digest.FromBytes(f.Blobs[1])
	}},
	"another image's config": {rowLayers, func(f *forge.Artifact) { f.M.Config.Digest = digest.FromString("other") }},
	"a layer left out":       {rowLayers, func(f *forge.Artifact) { f.M.Layers = f.M.Layers[:1] }},
	"another platform":       {rowLayers, func(f *forge.Artifact) { f.M.Platform.Architecture = "arm64" }},
	"digest of a layer: sha512": {rowDigests, func(f *forge.Artifact) {
		f.Replace(f.M.Layers[1].Digest.String(), digest.SHA512.FromBytes(f.Blobs[1]).String())
	}},
	"digest of a layer: cut short": {rowDigests, func(f *forge.Artifact) {
		f.Replace(f.M.Layers[1].Digest.String(), f.M.Layers[1].Digest.String()[:70])
	}},
	"digest of an index: in capitals": {rowDigests, func(f *forge.Artifact) {
		f.Replace(f.M.Layers[1].IndexDigest.String(), "sha256:"+strings.ToUpper(f.M.Layers[1].IndexDigest.Encoded()))
	}},
	"digest of an index: a path": {rowDigests, func(f *forge.Artifact) {
		f.Replace(f.M.Layers[1].IndexDigest.String(), "sha256:../../"+f.M.Layers[1].IndexDigest.Encoded()[6:])
	}},
	"index of many bytes": {rowEndless, func(f *forge.Artifact) {
		l := &f.M.Layers[1]
		l.IndexSize = artifact.MaxIndexSize
		l.Size = l.IndexOffset + l.IndexSize
	}},
}

func image(t testing.TB, reg *registrytest.Registry, name string) *forge.Image {
	return forge.Push(t, reg, name,
		forge.Tar(t, forge.File("etc/", "", 0o755), forge.File("etc/base", forge.Noise(30000), 0o644)),
		forge.Tar(t, forge.File("bin/", "", 0o755), forge.File("bin/run", forge.Noise(20000), 0o755), forge.File("etc/", "", 0o755), forge.File("etc/app", forge.Noise(9000), 0o600)))
}

// policyOf is that of all repositories of a node.
type policyOf func(registryclient.Repository) (trust.Policy, trust.Verifier)

func proven(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Proven, nil }

// authority is whom nodes under the policy signed trust.
type authority struct {
	*trusttest.CA
	builder  *trusttest.Identity
	stranger *trusttest.Identity // of another authority, and of the same name
	signed   policyOf
}

// newAuthority makes one; server, if it is not nil, says what is revoked.
func newAuthority(t testing.TB, server *trusttest.Server) *authority {
	t.Helper()
	a := &authority{CA: trusttest.NewCA(t, "authority", server)}
	a.builder = a.Issue(t, "build", trusttest.Leaf{})
	a.stranger = trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{})
	v, err := notary.NewVerifier(notary.Options{Dir: trusttest.NewDir(t, a.CA, trusttest.Statement{Name: "all"})})
	if err != nil {
		t.Fatal(err)
	}
	a.signed = func(registryclient.Repository) (trust.Policy, trust.Verifier) { return trust.Signed, v }
	return a
}

func sign(t testing.TB, reg *registrytest.Registry, v *forge.Image, d ocispec.Descriptor, by *trusttest.Identity) {
	t.Helper()
	forge.Sign(t, reg, v.Name, d, by.Sign(t, forge.Target(d), "jws"))
}

// TestAttacks: a forged artifact is refused or reads of it are right or fail, as the policy's cell in docs/security.md says; where a signature is asked for, it is refused
// before anything of it is kept, whether it has none or the attacker's own. An honest one behind it is taken under all policies, unless the forged one is.
func TestAttacks(t *testing.T) {
	a := newAuthority(t, nil)
	for name, attack := range attacks {
		t.Run(name, func(t *testing.T) {
			row := rowOf(t, attack.row)
			reg := registrytest.Start(t, registrytest.Options{})
			v := image(t, reg, "app")
			f := forge.Honest(t, v)
			attack.forge(f)
			f.M.Created = time.Now() // before all others
			forged := f.Put(reg)

			nodes := map[trust.Policy]*node{trust.Open: newNode(t, nil), trust.Proven: newNode(t, proven), trust.Signed: newNode(t, a.signed)}
			for _, policy := range []trust.Policy{trust.Open, trust.Proven} {
				n := nodes[policy]
				id, why, err := n.pull(v)
				row.holds(t, policy, "alone", why, err)
				if err != nil {
					continue
				}
				if wrong, failed := n.read(id, v); len(wrong) > 0 || policy == trust.Proven && failed != nil {
					t.Errorf("%s: wrong bytes at %q, error %v", policy, wrong, failed)
				}
			}
			refused(t, nodes[trust.Signed], row, v, "unsigned")
			sign(t, reg, v, forged, a.stranger)
			refused(t, nodes[trust.Signed], row, v, "signed by the attacker")

			good := forge.Honest(t, v).Put(reg)
			sign(t, reg, v, good, a.builder)
			for policy, n := range nodes {
				id, why, err := n.pullOther(v)
				mayBeForged := policy != trust.Signed && strings.Contains(row[policy], "taken")
				if err != nil || id != good.Digest.Encoded() && !mayBeForged {
					t.Fatalf("%s, in front of an honest one: got %s, %s, %v", policy, id, why, err)
				}
				if wrong, failed := n.read(id, v); len(wrong) > 0 || policy != trust.Open && failed != nil {
					t.Errorf("%s, in front of an honest one: wrong bytes at %q, error %v", policy, wrong, failed)
				}
			}
		})
	}
}

// refused says if a node whose policy is signed takes nothing and keeps nothing.
func refused(t *testing.T, n *node, row row, v *forge.Image, when string) {
	t.Helper()
	id, why, err := n.pull(v)
	if err == nil {
		t.Errorf("%s: %s is taken", when, id)
		return
	}
	row.holds(t, trust.Signed, when, why, err)
	if kept := n.kept(); len(kept) > 0 {
		t.Errorf("%s: kept %q", when, kept)
	}
}
