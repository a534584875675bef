package integration_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/attack/forge"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestForgedMounts: what a container reads through the mounts of a real node, of images to which whoever may push has attached an artifact with a setuid program more. Under signed and proven no byte
// of that: the image is pulled in the normal way, or streamed by the honest artifact behind it. Under open the program is there until the proof, which shows that this test would see it.
func TestForgedMounts(t *testing.T) {
	registry := startRegistry(t, registrytest.Options{})
	ca := trusttest.NewCA(t, "authority", nil)
	builder := ca.Issue(t, "build", trusttest.Leaf{})
	stranger := trusttest.NewCA(t, "authority", nil).Issue(t, "build", trusttest.Leaf{})
	config := map[string]string{
		"open":   "",
		"signed": fmt.Sprintf("trust_default = \"signed\"\nnotation_dir = %q\n", trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})),
		"proven": "trust_default = \"proven\"\n",
	}
	seed := uint64(700)
	for policy, cases := range map[string][]struct {
		what           string
		honest, signed bool // an honest artifact is behind the forged one, and somebody has signed that
		streamed, evil bool // what becomes of it
	}{
		"open":   {{what: "unsigned", streamed: true, evil: true}},
		"signed": {{what: "unsigned"}, {what: "a stranger's"}, {what: "with the signature of the honest one", honest: true, signed: true, streamed: true}},
		"proven": {{what: "unsigned"}, {what: "a stranger's", honest: true, streamed: true}},
	} {
		t.Run(policy, func(t *testing.T) {
			n := startNode(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: config[policy]})
			for _, c := range cases {
				seed++
				ref := fmt.Sprintf("%s/app%d:v1", registry.Host(), seed)
				v := forge.Of(t, registry, ref, pushSmall(t, ref, seed))
				good := forge.Honest(t, v)
				if c.honest {
					d := good.Put(registry)
					if c.signed {
						forge.Sign(t, registry, v.Name, d, builder.Sign(t, forge.Target(d), "jws"))
					}
				}
				f := forge.Honest(t, v)
				top := len(v.Tars) - 1
				f.Encode(top, forge.Before(t, v.Tars[top], forge.File("data/su", "evil", 0o4755)))
				f.Claim(top)
				f.M.Created = time.Now() // before the honest one
				lie := f.Put(registry)
				switch c.what {
				case "a stranger's":
					forge.Sign(t, registry, v.Name, lie, stranger.Sign(t, forge.Target(lie), "jws"))
				case "with the signature of the honest one":
					forge.Sign(t, registry, v.Name, lie, builder.Sign(t, forge.Target(good.Put(registry)), "jws"))
				}
				registry.Reset()
				if err := n.Pull(t.Context(), ref); err != nil {
					t.Fatalf("%s: %v", c.what, err)
				}
				if normal := len(layerDownloads(t, registry, ref)) > 0; normal == c.streamed {
					t.Errorf("%s: pulled in the normal way: %v", c.what, normal)
				}
				out, err := n.Run(t.Context(), ref, nil)
				if err != nil {
					t.Fatalf("%s: %v", c.what, err)
				}
				if evil := strings.Contains(out, "/data/su\n"); evil != c.evil {
					t.Errorf("%s: the forged program is there: %v", c.what, evil)
				}
				if !c.evil {
					checkSums(t, out, seed)
				}
				if read := f.DataRequests(registry, top); policy == "signed" && read > 0 {
					t.Errorf("%s: %d requests for the forged layer's data", c.what, read)
				}
			}
		})
	}
}
