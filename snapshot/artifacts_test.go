package snapshot

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// artifactOf returns the manifest of the image's artifact.
func (n *testNode) artifactOf(img testImage) *artifact.Manifest {
	n.t.Helper()
	p, ref, err := converter.Open(img.ref, converter.OpenOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	refs, err := converter.ListReferrers(context.Background(), p, ref, nil, artifact.ArtifactType)
	if err != nil || len(refs) == 0 {
		n.t.Fatalf("referrers: %v, %v", refs, err)
	}
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	repo, _, _, err := registryclient.ParseReference(img.ref)
	if err != nil {
		n.t.Fatal(err)
	}
	raw, err := client.Manifest(context.Background(), repo, refs[0].Digest, artifact.MaxManifestSize)
	if err != nil {
		n.t.Fatal(err)
	}
	m, err := artifact.DecodeManifest(raw)
	if err != nil {
		n.t.Fatal(err)
	}
	return m
}

// attach pushes m, changed, as one more referrer of its subject.
func (n *testNode) attach(m artifact.Manifest) {
	n.t.Helper()
	raw, err := m.Encode()
	if err != nil {
		n.t.Fatal(err)
	}
	n.reg.PutManifest("app", "", ocispec.MediaTypeImageManifest, raw)
}

// Artifacts that do not belong to the image are refused one by one, and a good one beside them is used.
func TestRefusedArtifacts(t *testing.T) {
	changes := map[string]func(m *artifact.Manifest, other *artifact.Manifest){
		"another image's layers": func(m, other *artifact.Manifest) { m.Layers = other.Layers },
		"another image's config": func(m, other *artifact.Manifest) { m.Config = other.Config },
		"layers swapped":         func(m, _ *artifact.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] },
		"tars swapped, sources kept": func(m, _ *artifact.Manifest) {
			m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0]
			m.Layers[0].Source, m.Layers[1].Source = m.Layers[1].Source, m.Layers[0].Source
		},
		"a layer left out":         func(m, _ *artifact.Manifest) { m.Layers = m.Layers[:2] },
		"index of another place":   func(m, _ *artifact.Manifest) { m.Layers[0].IndexOffset -= 8; m.Layers[0].Size -= 8 },
		"index of another digest":  func(m, _ *artifact.Manifest) { m.Layers[0].IndexDigest = digest.FromString("other") },
		"a blob that is not there": func(m, _ *artifact.Manifest) { m.Layers[0].Digest = digest.FromString("gone") },
	}
	for name, change := range changes {
		for _, good := range []bool{false, true} {
			suffix := ", alone"
			if good {
				suffix = ", beside a good one"
			}
			t.Run(name+suffix, func(t *testing.T) {
				n := newTestNode(t)
				img := n.push("app", threeLayers(t)...)
				n.convert(img)
				bad := *n.artifactOf(img)
				otherImg := n.push("app:other", tarOf(t, file{"evil", "evil"}), tarOf(t, file{"b", ""}), tarOf(t, file{"c", ""}))
				n.convert(otherImg)
				change(&bad, n.artifactOf(otherImg))
				if !good {
					n.deleteArtifact(img)
				}
				n.attach(bad)
				_, _, err := n.images.Find(testContext(), img.ref, img.manifest)
				if good && err != nil {
					t.Errorf("got %v, want the good artifact", err)
				}
				if !good && err == nil {
					t.Error("an artifact that is not the image's was taken")
				}
			})
		}
	}
}

func (n *testNode) deleteArtifact(img testImage) {
	n.t.Helper()
	p, ref, err := converter.Open(img.ref, converter.OpenOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	if deleted, err := converter.DeleteArtifacts(context.Background(), p, ref, nil); err != nil || len(deleted) != 1 {
		n.t.Fatalf("delete: %v, %v", deleted, err)
	}
}

// What the disk holds is verified before it is used, and fetched again if it is damaged.
func TestDamagedFiles(t *testing.T) {
	damage := map[string]func(path string) error{
		"flipped": func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(path, b, 0o600)
		},
		"cut":   func(path string) error { return os.Truncate(path, 10) },
		"empty": func(path string) error { return os.Truncate(path, 0) },
		"gone":  os.Remove,
	}
	for name, f := range damage {
		t.Run(name, func(t *testing.T) {
			n := newTestNode(t)
			img := n.push("app", threeLayers(t)...)
			n.convert(img)
			top := n.prepareAll(img, 0, "")
			n.stop()
			indexes, err := filepath.Glob(filepath.Join(n.root, "indexes", "*"))
			if err != nil || len(indexes) != 3 {
				t.Fatalf("indexes: %v, %v", indexes, err)
			}
			for _, path := range indexes {
				if err := f(path); err != nil {
					t.Fatal(err)
				}
			}
			n.start()
			mounts, err := n.sn.Prepare(testContext(), "container", top)
			if err != nil {
				t.Fatal(err)
			}
			inMounts(t, mounts, func(root string) { wantFiles(t, root, threeLayersMerged) })
		})
	}
}
