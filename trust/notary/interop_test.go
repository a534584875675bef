package notary_test

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/plugin"
	"github.com/notaryproject/notation-go/signer"
	stock "github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

func decode64(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func encode64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// kinds are the sizes of keys: all of them take a while to make.
func kinds() []string {
	if os.Getenv("FULL") != "" {
		return trusttest.Kinds
	}
	return []string{"ec256", "ec384", "ec521", "rsa2048"}
}

// TestInterop: what we sign is accepted by notation-go with a stock trust policy and trust store, and by openssl, which knows nothing of Notary; what notation-go
// signs is accepted by us, with the same files.
func TestInterop(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	directory := trusttest.NewDir(t, ca, trusttest.Statement{Name: "all", Identities: []string{"x509.subject:" + trusttest.Subject("build")}})
	ours := verifier(t, notary.Options{Dir: directory})
	theirs := stockVerifier(t, directory)
	for _, kind := range kinds() {
		id := ca.Issue(t, "build", trusttest.Leaf{Kind: kind})
		for format, mediaType := range formats {
			t.Run(kind+"/"+format, func(t *testing.T) {
				e := id.Sign(t, target("x"), format)
				desc := ocispec.Descriptor{MediaType: target("x").MediaType, Digest: target("x").Digest, Size: target("x").Size}
				outcome, err := theirs.Verify(t.Context(), desc, e.Bytes, notation.VerifierVerifyOptions{
					ArtifactReference: target("x").Repository + "@" + desc.Digest.String(), SignatureMediaType: mediaType})
				if err != nil || outcome.Error != nil {
					t.Errorf("notation-go: %v, %v", err, outcome)
				}
				if _, err := ours.Verify(t.Context(), target("x"), e); err != nil {
					t.Errorf("ours by us: %v", err)
				}
				checkByOpenssl(t, ca, kind, e)

				generic, err := signer.NewGenericSigner(id.Key, id.Chain)
				if err != nil {
					t.Fatal(err)
				}
				raw, _, err := generic.Sign(t.Context(), desc, notation.SignerSignOptions{SignatureMediaType: mediaType})
				if err != nil {
					t.Fatal(err)
				}
				if d, err := ours.Verify(t.Context(), target("x"), trusttest.Envelope(mediaType, raw)); err != nil || d.Identity != trusttest.Subject("build") {
					t.Errorf("theirs by us: %+v, %v", d, err)
				}
			})
		}
	}
}

// stockVerifier is notation-go's, made of the files as the notation command makes it.
func stockVerifier(t *testing.T, directory string) notation.Verifier {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(directory, "trustpolicy.json"))
	if err != nil {
		t.Fatal(err)
	}
	var document trustpolicy.Document
	if err := json.Unmarshal(b, &document); err != nil {
		t.Fatal(err)
	}
	v, err := stock.New(&document, truststore.NewX509TrustStore(dir.NewSysFS(directory)), plugin.NewCLIManager(dir.NewSysFS(t.TempDir())))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// checkByOpenssl takes the envelope apart by the specifications of JWS and COSE and has openssl check the signature and the chain.
func checkByOpenssl(t *testing.T, ca *trusttest.CA, kind string, e trust.Envelope) {
	t.Helper()
	var signed, sig []byte
	var chain [][]byte
	if e.MediaType == formats["jws"] {
		var j struct {
			Payload, Protected, Signature string
			Header                        struct{ X5c [][]byte }
		}
		if err := json.Unmarshal(e.Bytes, &j); err != nil {
			t.Fatal(err)
		}
		signed, sig, chain = []byte(j.Protected+"."+j.Payload), decode64(t, j.Signature), j.Header.X5c // RFC 7515, 5.1
	} else {
		var c struct {
			_           struct{} `cbor:",toarray"`
			Protected   []byte
			Unprotected map[any]any
			Payload     []byte
			Signature   []byte
		}
		var tag cbor.RawTag
		if err := cbor.Unmarshal(e.Bytes, &tag); err != nil || tag.Number != 18 {
			t.Fatalf("tag %d, %v", tag.Number, err)
		}
		if err := cbor.Unmarshal(tag.Content, &c); err != nil {
			t.Fatal(err)
		}
		var err error
		if signed, err = cbor.Marshal([]any{"Signature1", c.Protected, []byte{}, c.Payload}); err != nil { // RFC 9052, 4.4
			t.Fatal(err)
		}
		sig = c.Signature
		for _, x := range c.Unprotected[uint64(33)].([]any) { // x5chain, RFC 9360
			chain = append(chain, x.([]byte))
		}
	}
	if len(chain) != 2 {
		t.Fatalf("a chain of %d", len(chain))
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	file := func(name string, b []byte) string {
		name = filepath.Join(work, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	hash := map[string]string{"ec256": "-sha256", "ec384": "-sha384", "ec521": "-sha512", "rsa2048": "-sha256", "rsa3072": "-sha384", "rsa4096": "-sha512"}[kind]
	args := []string{"dgst", hash}
	if strings.HasPrefix(kind, "ec") {
		sig = trusttest.DER(t, sig)
	} else {
		args = append(args, "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")
	}
	args = append(args, "-verify", file("public", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})), "-signature", file("signature", sig))
	openssl(t, "Verified OK", append(args, file("signed", signed))...)
	openssl(t, "OK", "verify", "-CAfile", file("root", trusttest.PEM(ca.Root)), file("leaf", trusttest.PEM(leaf)))
	if out, err := exec.Command("openssl", append(args, file("signed", append(signed, 0)))...).CombinedOutput(); err == nil {
		t.Errorf("openssl accepts anything: %s", out)
	}
}

func openssl(t *testing.T, want string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("no openssl")
	}
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), want) {
		t.Errorf("openssl %s: %v: %s", strings.Join(args, " "), err, out)
	}
}
