package integration_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestPull pulls and runs with each of containerd's configurations, by tag and by digest, with crictl and with ctr, an image and an image
// of several platforms: no layer is downloaded, and what the node calls the image is what the registry calls it.
func TestPull(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	pause := registry.Host() + "/pause:1"
	pushPause(t, pause)
	seed := uint64(100)
	for _, pull := range []node.Pull{node.Transfer, node.Local} {
		n := startNode(t, node.Options{Pull: pull, Pause: pause, Stream: []string{registry.Host() + "/*"}})
		for _, platforms := range []string{"one platform", "index"} {
			for _, by := range []string{"tag", "digest"} {
				for _, client := range []string{"crictl", "ctr"} {
					if client == "ctr" && pull == node.Local {
						continue // ctr knows the transfer service only; see TestCtrWithLocalPull
					}
					seed++
					t.Run(fmt.Sprintf("%s/%s/%s/%s", pull, platforms, by, client), func(t *testing.T) {
						tag := fmt.Sprintf("%s/app%d:v1", registry.Host(), seed)
						img := pushSmall(t, tag, seed)
						dgst := digestOf(t, img)
						if platforms == "index" {
							dgst = pushIndex(t, tag, img)
						}
						run(t, "streamctl", "create", "--record", "", tag)
						ref := tag
						if by == "digest" {
							ref = strings.TrimSuffix(tag, ":v1") + "@" + dgst
						}
						registry.Reset()
						var out string
						if client == "crictl" {
							out = runPod(t, n, ref)
						} else {
							out = runCtr(t, n, ref)
						}
						checkSums(t, out, seed)
						if got := layerDownloads(t, registry, tag); len(got) > 0 {
							t.Errorf("layers were downloaded: %q", got)
						}
						checkIdentity(t, n, ref, dgst, img)
					})
				}
			}
		}
	}
}

// runPod pulls ref and runs its command in a pod, and returns the output.
func runPod(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	if err := n.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	c, err := n.RunPod(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Output(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	return out
}

// runCtr pulls ref and runs its command with ctr, and returns the output.
func runCtr(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	if _, err := n.Ctr(t.Context(), "images", "pull", "--snapshotter", n.Snapshotter(), "--plain-http", ref); err != nil {
		t.Fatal(err)
	}
	out, err := n.Run(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// checkSums compares what `guest sum` has printed with the files of ociimage.Small.
func checkSums(t *testing.T, out string, seed uint64) {
	t.Helper()
	checkSumsBelow(t, out, seed, "/data")
}

// checkSumsBelow is checkSums for a container that has read only what is at or below path.
func checkSumsBelow(t *testing.T, out string, seed uint64, path string) {
	t.Helper()
	want := ociimage.SmallSums(seed)
	maps.DeleteFunc(want, func(p, _ string) bool { return p != path && !strings.HasPrefix(p, path+"/") })
	got := map[string]string{}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, l := range lines[:len(lines)-1] {
		sum, path, _ := strings.Cut(l, " ")
		got[path] = sum
	}
	if last := lines[len(lines)-1]; last != "done" {
		t.Errorf("the container ended with %q, not with \"done\"", last)
	}
	var wrong []string
	for path, sum := range want {
		if got[path] != sum {
			wrong = append(wrong, fmt.Sprintf("%s: sum is %q, want %q", path, got[path], sum))
		}
		delete(got, path)
	}
	for path := range got {
		wrong = append(wrong, path+": should not be there")
	}
	if len(wrong) > 0 {
		t.Errorf("%d files are wrong, among them:\n%s", len(wrong), strings.Join(wrong[:min(5, len(wrong))], "\n"))
	}
}

// checkIdentity holds the node's names of the image against the registry's.
func checkIdentity(t *testing.T, n *node.Node, ref, dgst string, img v1.Image) {
	t.Helper()
	got, err := n.Inspect(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != config.String() {
		t.Errorf("image ID is %s, want %s", got.ID, config)
	}
	for _, d := range got.RepoDigests { // ctr leaves none
		if !strings.HasSuffix(d, "@"+dgst) {
			t.Errorf("repo digest is %s, want %s", d, dgst)
		}
	}
	list, err := n.Ctr(t.Context(), "images", "list", "name=="+ref)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(list, " "+dgst+" ") {
		t.Errorf("the image's digest should be %s, ctr lists\n%s", dgst, list)
	}
}

func digestOf(t *testing.T, d interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	h, err := d.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

// pushIndex pushes an index of img and an image for another architecture with other layers.
func pushIndex(t *testing.T, ref string, img v1.Image) string {
	t.Helper()
	g, err := guest()
	if err != nil {
		t.Fatal(err)
	}
	other, err := ociimage.Small(tempDir(t), g, 1)
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.IndexMediaType(mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: platformOf(t, img)}}), types.OCIImageIndex)
	if err := ociimage.PushIndex(t.Context(), index, ref); err != nil {
		t.Fatal(err)
	}
	return digestOf(t, index)
}

func platformOf(t *testing.T, img v1.Image) *v1.Platform {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return c.Platform()
}

// TestCtrWithLocalPull: with the configuration for local pull ctr can use the snapshotter without the transfer service, for normal pulls.
func TestCtrWithLocalPull(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	n := startNode(t, node.Options{Pull: node.Local, Stream: []string{registry.Host() + "/*"}})
	ref := registry.Host() + "/app:v1"
	pushSmall(t, ref, 7)
	run(t, "streamctl", "create", "--record", "", ref)
	if _, err := n.Ctr(t.Context(), "images", "pull", "--local", "--snapshotter", n.Snapshotter(), "--plain-http", ref); err != nil {
		t.Fatal(err)
	}
	out, err := n.Run(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkSums(t, out, 7)
}

// TestRoundTrips counts the dependent round trips that the snapshotter adds to a pull: two if the image has a profile, three if not, whatever the number of layers, and one
// more on the first contact with a registry that has the referrers tag schema only. Where artifacts must be signed it is one more at most, whoever has signed; that takes
// `streamctl sign --adopt` for an image with a profile that somebody else has signed. Each of its requests is delayed by the same second, so those that wait for one another
// begin a second apart. Without FULL the rows that differ most.
func TestRoundTrips(t *testing.T) {
	const delay = time.Second
	ca := trusttest.NewCA(t, "authority", nil)
	key, cert := ca.Issue(t, "build", trusttest.Leaf{}).Files(t, t.TempDir())
	config := fmt.Sprintf("trust_default = \"signed\"\nnotation_dir = %q\n", trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"}))
	for name, c := range map[string]struct {
		options registrytest.Options
		layers  int
		profile string
		signed  string // "" is not; ours, foreign or adopted
		rounds  []int  // of one pull after the other
		full    bool   // a row of FULL
	}{
		"three layers":               {registrytest.Options{}, 3, "static", "", []int{2, 2}, false},
		"120 layers":                 {registrytest.Options{}, 120, "static", "", []int{2}, true},
		"without profile":            {registrytest.Options{}, 3, "none", "", []int{3, 3}, true},
		"tag schema":                 {registrytest.Options{NoReferrers: true}, 3, "static", "", []int{3, 2}, true},
		"tag schema without":         {registrytest.Options{NoReferrers: true}, 3, "none", "", []int{4, 3}, false},
		"signed":                     {registrytest.Options{}, 3, "static", "ours", []int{3, 3}, false},
		"signed without profile":     {registrytest.Options{}, 3, "none", "ours", []int{3}, true},
		"signed, tag schema without": {registrytest.Options{NoReferrers: true}, 3, "none", "ours", []int{4, 3}, true},
		"foreign without profile":    {registrytest.Options{}, 3, "none", "foreign", []int{4}, true},
		"foreign, adopted":           {registrytest.Options{}, 3, "static", "adopted", []int{2}, false},
	} {
		if c.full && os.Getenv("FULL") == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			registry := startRegistry(t, c.options)
			o := node.Options{Stream: []string{registry.Host() + "/*"}}
			if c.signed != "" {
				o.Config = config
			}
			n := startNode(t, o)
			for i, want := range c.rounds {
				ref := fmt.Sprintf("%s/app%d:v1", registry.Host(), i)
				push(t, ref, func(dir string, guest []byte) (v1.Image, error) {
					return ociimage.Layers(dir, guest, c.layers, uint64(i))
				})
				run(t, "streamctl", "create", "--record", "", "--profile", c.profile, ref)
				switch c.signed {
				case "ours":
					run(t, "streamctl", "sign", "--sign-key", key, "--sign-cert", cert, ref)
				case "foreign", "adopted":
					run(t, "streamctl", "sign", "--sign-key", key, "--sign-cert", cert, ref)
					withoutHints(t, registry, ref)
				}
				if c.signed == "adopted" {
					run(t, "streamctl", "sign", "--adopt", ref)
				}
				remove := registry.Inject(snapshotters, -1, registrytest.Delay(delay))
				pullStreamed(t, registry, n, ref)
				remove()
				var begins []time.Time
				for _, q := range registry.Requests() {
					if strings.HasPrefix(q.Header.Get("User-Agent"), "streaming-snapshotter") {
						begins = append(begins, q.Begin)
					}
				}
				if got := rounds(begins, delay); got != want {
					t.Errorf("pull %d took %d dependent round trips, want %d", i, got, want)
				}
				out, err := n.Run(t.Context(), ref, nil)
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.Count(out, "\n"); got != c.layers {
					t.Errorf("the container sees %d lines, want one for each layer but the first and \"done\":\n%s", got, out)
				}
			}
		})
	}
}

// withoutHints takes away from the signatures of an image's artifact what only ours have.
func withoutHints(t *testing.T, registry *registrytest.Registry, ref string) {
	t.Helper()
	client, err := registryclient.New(registryclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	repo, _, _, err := registryclient.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	image, _, err := client.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	artifacts, err := client.Referrers(t.Context(), repo, image.Digest, artifact.ArtifactType)
	if err != nil || len(artifacts) != 1 {
		t.Fatalf("artifacts: %v, %v", artifacts, err)
	}
	signatures, err := client.Referrers(t.Context(), repo, artifacts[0].Digest, trust.SignatureType)
	if err != nil || len(signatures) != 1 {
		t.Fatalf("signatures: %v, %v", signatures, err)
	}
	raw, err := client.Manifest(t.Context(), repo, signatures[0].Digest, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	for _, hint := range []string{trust.HintDigest, trust.HintSize, trust.HintType} {
		delete(m.Annotations, hint)
	}
	if raw, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(string(repo), registry.Host()+"/")
	registry.PutManifest(name, "", ocispec.MediaTypeImageManifest, raw)
	gone, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://"+registry.Host()+"/v2/"+name+"/manifests/"+signatures[0].Digest.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(gone)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("delete: %s", resp.Status)
	}
}

// snapshotters matches requests that the snapshotter makes, not containerd.
func snapshotters(req *http.Request) bool {
	return strings.HasPrefix(req.Header.Get("User-Agent"), "streaming-snapshotter")
}

// rounds is the length of the longest chain of requests each of which began after the one before had ended.
func rounds(begins []time.Time, took time.Duration) int {
	slices.SortFunc(begins, time.Time.Compare)
	n := 0
	var end time.Time
	for _, b := range begins {
		if !b.Before(end) {
			n++
			end = b.Add(took)
		}
	}
	return n
}
