package integration_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestNotation: the real notation command accepts what streamctl signs and signs what streamctl accepts, by the same files, where the registry has the referrers
// API and where it has the tag schema only; and what neither has signed, both refuse.
func TestNotation(t *testing.T) {
	for name, o := range map[string]registrytest.Options{"referrers API": {}, "tag schema": {NoReferrers: true}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			run := func(want bool, program string, args ...string) string {
				t.Helper()
				c := exec.CommandContext(t.Context(), program, args...)
				c.Env = append(os.Environ(), "XDG_CONFIG_HOME="+dir, "XDG_CACHE_HOME="+dir)
				out, err := c.CombinedOutput()
				if (err == nil) != want {
					t.Fatalf("%s %q: %v\n%s", program, args, err, out)
				}
				return string(out)
			}
			r := startRegistry(t, o)
			image := r.Host() + "/team/app:v1"
			tar := filepath.Join(dir, "layer.tar")
			run(true, "tar", "-C", "/etc", "-cf", tar, "hostname")
			run(true, "crane", "append", "-f", tar, "-t", image)
			run(true, "crane", "mutate", "--set-platform", "linux/amd64", "-t", image, image)
			run(true, "notation", "cert", "generate-test", "--default", "example.com")
			policy := `{"version":"1.0","trustPolicies":[{"name":"team","registryScopes":["` + r.Host() + `/team/app"],"signatureVerification":{"level":"strict"},
				"trustStores":["ca:example.com"],"trustedIdentities":["x509.subject:C=US,ST=WA,O=Notary,CN=example.com"]}]}`
			if err := os.WriteFile(filepath.Join(dir, "notation", "trustpolicy.json"), []byte(policy), 0o600); err != nil {
				t.Fatal(err)
			}
			run(true, "streamctl", "create", image, "--profile", "none")
			var list struct{ Artifacts []struct{ Artifact string } }
			if err := json.Unmarshal([]byte(run(true, "streamctl", "inspect", image, "-o", "json")), &list); err != nil {
				t.Fatal(err)
			}
			artifact := r.Host() + "/team/app@" + list.Artifacts[0].Artifact

			run(false, "notation", "verify", "--insecure-registry", artifact)
			run(false, "streamctl", "verify", "--signed", image)
			// Unless told otherwise notation writes the referrers tag whatever the registry has: the second time with what streamctl has left of the first.
			for _, how := range [][]string{{"jws"}, {"cose"}, {"jws", "--force-referrers-tag=false"}} {
				format := how[0]
				run(true, "notation", slices.Concat([]string{"sign", "--insecure-registry", "--signature-format"}, how, []string{artifact})...)
				run(true, "streamctl", "verify", "--signed", image)
				run(true, "streamctl", "sign", "--adopt", image)
				run(true, "streamctl", "create", "--force", "--profile", "none", image) // the same artifact, which stays
				if out := run(true, "streamctl", "sign", image); !strings.Contains(out, "was signed before") {
					t.Errorf("%s of notation is not known by its key: %s", format, out)
				}
				run(true, "streamctl", "delete", image)
				run(true, "streamctl", "create", "--sign", "", "--signature-format", format, "--profile", "none", image)
				run(true, "notation", "verify", "--insecure-registry", artifact)
				if out := run(true, "notation", "list", "--insecure-registry", artifact); strings.Count(out, "sha256:") != 2 {
					t.Errorf("after streamctl delete and create --sign: %s", out)
				}
				run(true, "streamctl", "delete", image)
				run(true, "streamctl", "create", "--profile", "none", image)
			}
		})
	}
}
