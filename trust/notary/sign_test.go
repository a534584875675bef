package notary_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/signer"
	framework "github.com/notaryproject/notation-plugin-framework-go/plugin"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestMain: under the name of a plugin this program is one, by the protocol of notation.
func TestMain(m *testing.M) {
	if name, ok := strings.CutPrefix(filepath.Base(os.Args[0]), "notation-"); ok {
		if err := bePlugin(name, os.Args[1]); err != nil {
			json.NewEncoder(os.Stderr).Encode(map[string]string{"errorCode": "ERROR", "errorMessage": err.Error()})
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// bePlugin answers one command. A file "ran" beside the program says that it was started.
func bePlugin(name, command string) error {
	dir := filepath.Dir(os.Args[0])
	if err := os.WriteFile(filepath.Join(dir, "ran"), nil, 0o600); err != nil {
		return err
	}
	answer := func(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
	var q struct {
		KeyID                 string            `json:"keyId"`
		Payload               []byte            `json:"payload"`
		SignatureEnvelopeType string            `json:"signatureEnvelopeType"`
		PluginConfig          map[string]string `json:"pluginConfig"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&q); err != nil {
		return err
	}
	if name == "mute" || name == "stuck" && command != "get-plugin-metadata" {
		wait := make(chan os.Signal, 1)
		signal.Notify(wait, syscall.SIGTERM)
		<-wait // for SIGKILL
	}
	if command == "get-plugin-metadata" {
		capability := map[string]framework.Capability{"raw": framework.CapabilitySignatureGenerator, "stuck": framework.CapabilityEnvelopeGenerator, "whole": framework.CapabilityEnvelopeGenerator,
			"status": framework.CapabilityRevocationCheckVerifier}[name]
		return answer(framework.GetMetadataResponse{Name: name, Description: "of a test", Version: "1.0.0", URL: "https://example.com",
			SupportedContractVersions: []string{"1.0"}, Capabilities: []framework.Capability{capability}})
	}
	if command == "verify-signature" {
		_, err := os.Stat(filepath.Join(dir, "revoked"))
		return answer(framework.VerifySignatureResponse{VerificationResults: map[framework.Capability]*framework.VerificationResult{
			framework.CapabilityRevocationCheckVerifier: {Success: err != nil, Reason: "of a test"}}, ProcessedAttributes: []any{}})
	}
	pair, err := tls.LoadX509KeyPair(q.PluginConfig["cert"], q.KeyID)
	if err != nil {
		return err
	}
	switch command {
	case "describe-key":
		return answer(framework.DescribeKeyResponse{KeyID: q.KeyID, KeySpec: framework.KeySpecEC256})
	case "generate-signature":
		sum := sha256.Sum256(q.Payload)
		r, s, err := ecdsa.Sign(rand.Reader, pair.PrivateKey.(*ecdsa.PrivateKey), sum[:])
		if err != nil {
			return err
		}
		return answer(framework.GenerateSignatureResponse{KeyID: q.KeyID, Signature: append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...),
			SigningAlgorithm: framework.SignatureAlgorithmECDSA_SHA256, CertificateChain: pair.Certificate})
	case "generate-envelope":
		generic, err := signer.NewGenericSignerFromFiles(q.KeyID, q.PluginConfig["cert"])
		if err != nil {
			return err
		}
		var payload struct {
			TargetArtifact ocispec.Descriptor `json:"targetArtifact"`
		}
		if err := json.Unmarshal(q.Payload, &payload); err != nil {
			return err
		}
		raw, _, err := generic.Sign(context.Background(), payload.TargetArtifact, notation.SignerSignOptions{SignatureMediaType: q.SignatureEnvelopeType})
		if err != nil {
			return err
		}
		return answer(framework.GenerateEnvelopeResponse{SignatureEnvelope: raw, SignatureEnvelopeType: q.SignatureEnvelopeType, Annotations: map[string]string{"com.example.kms": "7"}})
	}
	return fmt.Errorf("command %q", command)
}

// install makes this program a plugin, and returns its directory.
func install(t *testing.T, plugins, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(plugins, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "notation-"+name)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestKeysOfNotation: names of signingkeys.json, with files and with plugins of both kinds; what is signed is good, and known as signed.
func TestKeysOfNotation(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	dir := trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})
	plugins := t.TempDir()
	install(t, plugins, "raw")
	install(t, plugins, "whole")
	keyFile, certFile := ca.Issue(t, "build", trusttest.Leaf{}).Files(t, t.TempDir())
	external := func(plugin string) map[string]any {
		return map[string]any{"name": plugin, "id": keyFile, "pluginName": plugin, "pluginConfig": map[string]string{"cert": certFile}}
	}
	keys, err := json.Marshal(map[string]any{"default": "local", "keys": []any{
		map[string]any{"name": "local", "keyPath": keyFile, "certPath": certFile}, external("raw"), external("whole"), external("absent"), map[string]any{"name": "nothing"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "signingkeys.json"), keys, 0o644); err != nil {
		t.Fatal(err)
	}
	v := verifier(t, notary.Options{Dir: dir})
	var before trust.Envelope
	for _, key := range []string{"", "local", "raw", "whole"} {
		for format := range formats {
			s, err := notary.NewSigner(t.Context(), notary.SignOptions{Dir: dir, PluginDir: plugins, Key: key, Format: format, Expiry: time.Hour})
			if err != nil {
				t.Fatalf("%q: %v", key, err)
			}
			if before.Bytes != nil { // by the same certificate
				if ok, err := s.Signed(t.Context(), target("x"), before); err != nil || !ok {
					t.Errorf("%q: not known as signed: %v", key, err)
				}
			}
			e, annotations, err := s.Sign(t.Context(), target("x"))
			if err != nil {
				t.Fatalf("%q: %v", key, err)
			}
			d, err := v.Verify(t.Context(), target("x"), e)
			if err != nil || d.Identity != trusttest.Subject("build") || time.Until(d.Expires) > time.Hour {
				t.Errorf("%q, %s: %+v, %v", key, format, d, err)
			}
			if !strings.Contains(s.String(), "CN=build") {
				t.Errorf("%q: %s", key, s)
			}
			if !strings.HasPrefix(annotations["io.cncf.notary.x509chain.thumbprint#S256"], `["`) || annotations[ocispec.AnnotationCreated] == "" || (key == "whole") != (annotations["com.example.kms"] == "7") {
				t.Errorf("%q: %v", key, annotations)
			}
			before = e
		}
	}
	for key, want := range map[string]string{"absent": "absent", "nothing": "neither", "unknown": "unknown"} {
		if _, err := notary.NewSigner(t.Context(), notary.SignOptions{Dir: dir, PluginDir: plugins, Key: key}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// TestSigned: what has a signature need not be signed again, unless that is another's, of something else, or over soon.
func TestSigned(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	id := ca.Issue(t, "build", trusttest.Leaf{})
	s := id.Signer(t, notary.SignOptions{})
	for name, c := range map[string]struct {
		e    trust.Envelope
		want bool
	}{
		"good":          {id.Sign(t, target("x"), "cose"), true},
		"another's":     {ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target("x"), "jws"), false},
		"of another":    {id.Sign(t, target("y"), "jws"), false},
		"forged":        {forged(t, id.Sign(t, target("x"), "jws")), false},
		"nothing":       {trusttest.Envelope(formats["jws"], []byte("{}")), false},
		"over":          {sign(t, id, target("x"), request{signed: time.Now().Add(-2 * time.Hour), expires: time.Now().Add(-time.Hour)}), false},
		"over soon":     {sign(t, id, target("x"), request{signed: time.Now().Add(-20 * time.Hour), expires: time.Now().Add(time.Hour)}), false},
		"good for long": {sign(t, id, target("x"), request{signed: time.Now().Add(-20 * time.Hour), expires: time.Now().Add(20 * time.Hour)}), true},
	} {
		if got, err := s.Signed(t.Context(), target("x"), c.e); err != nil || got != c.want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// forged is an envelope with the same payload and certificates, as anybody can write one who has no key: they are public.
func forged(t *testing.T, e trust.Envelope) trust.Envelope {
	t.Helper()
	var fields map[string]any
	if err := json.Unmarshal(e.Bytes, &fields); err != nil {
		t.Fatal(err)
	}
	old := fields["signature"].(string)
	fields["signature"] = strings.Repeat("A", len(old))
	b, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return trusttest.Envelope(e.MediaType, b)
}

func TestRefusedKeys(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	good, cert := ca.Issue(t, "good", trusttest.Leaf{}).Files(t, t.TempDir())
	_, another := ca.Issue(t, "another", trusttest.Leaf{}).Files(t, t.TempDir())
	ended, endedCert := ca.Issue(t, "ended", trusttest.Leaf{NotAfter: time.Now().Add(-time.Hour)}).Files(t, t.TempDir())
	open, openCert := ca.Issue(t, "open", trusttest.Leaf{}).Files(t, t.TempDir())
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    notary.SignOptions
		want string
	}{
		"a key for all to read":   {notary.SignOptions{KeyFile: open, CertFile: openCert}, "chmod 600"},
		"another's certificate":   {notary.SignOptions{KeyFile: good, CertFile: another}, "does not match"},
		"a certificate is over":   {notary.SignOptions{KeyFile: ended, CertFile: endedCert}, "signs no code"},
		"no file":                 {notary.SignOptions{KeyFile: good + "x", CertFile: cert}, "no such file"},
		"no certificate":          {notary.SignOptions{KeyFile: good}, "belong together"},
		"both":                    {notary.SignOptions{KeyFile: good, CertFile: cert, Key: "x"}, "one of both"},
		"format":                  {notary.SignOptions{KeyFile: good, CertFile: cert, Format: "pgp"}, "jws or cose"},
		"half a second":           {notary.SignOptions{KeyFile: good, CertFile: cert, Expiry: time.Second / 2}, "whole seconds"},
		"no list":                 {notary.SignOptions{Dir: t.TempDir(), Key: "x"}, "signingkeys.json"},
		"timestamps without root": {notary.SignOptions{KeyFile: good, CertFile: cert, TimestampURL: "http://127.0.0.1:1"}, "root certificate"},
	} {
		if _, err := notary.NewSigner(t.Context(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestPluginThatDoesNotAnswer: neither when it is asked who it is nor when it is to sign does a plugin keep the signer for ever.
func TestPluginThatDoesNotAnswer(t *testing.T) {
	dir, plugins := t.TempDir(), t.TempDir()
	options := func(name string, timeout time.Duration) notary.SignOptions {
		return notary.SignOptions{Dir: dir, PluginDir: plugins, Key: name, Timeout: timeout}
	}
	var keys []map[string]any
	for _, name := range []string{"mute", "stuck"} {
		install(t, plugins, name)
		keys = append(keys, map[string]any{"name": name, "id": "key", "pluginName": name})
	}
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "signingkeys.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := notary.NewSigner(t.Context(), options("mute", 100*time.Millisecond)); err == nil || !strings.Contains(err.Error(), "no answer within 100ms") {
		t.Errorf("a plugin that does not say who it is: %v", err)
	}
	timeout := time.Second
	s, err := notary.NewSigner(t.Context(), options("stuck", timeout))
	for err != nil && strings.Contains(err.Error(), "no answer within") { // it answers that, but the machine may be busy
		timeout *= 2
		s, err = notary.NewSigner(t.Context(), options("stuck", timeout))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Sign(t.Context(), trust.Target{Digest: ocispec.DescriptorEmptyJSON.Digest, MediaType: ocispec.MediaTypeImageManifest, Size: 2}); err == nil || !strings.Contains(err.Error(), "no answer within "+timeout.String()) {
		t.Errorf("a plugin that does not sign: %v", err)
	}
}

// TestPlugins: a plugin that a signature asks for answers for revocation; a plugin's name in a signature leads to no other program, and in a stranger's to none at all.
func TestPlugins(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	root := t.TempDir()
	dir := install(t, filepath.Join(root, "plugins"), "status")
	elsewhere := install(t, root, "elsewhere")
	for _, name := range []string{"a", "..", "."} { // what notation-go makes of "../elsewhere/x"
		os.Symlink(filepath.Join(elsewhere, "notation-elsewhere"), filepath.Join(elsewhere, name))
	}
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"}), PluginDir: filepath.Join(root, "plugins")})
	id := ca.Issue(t, "build", trusttest.Leaf{})
	stranger := trusttest.NewCA(t, "stranger", nil).Issue(t, "build", trusttest.Leaf{})

	started := func() bool {
		_, err := os.Stat(filepath.Join(dir, "ran"))
		return err == nil
	}
	forged := sign(t, id, target("x"), request{attributes: plugged("status")})
	forged = jwsWith(t, forged, func(fields map[string]any) { // whose chain is ours, which is no secret
		fields["signature"] = encode64(flip(decode64(t, fields["signature"].(string))))
	})
	if _, err := v.Verify(t.Context(), target("x"), forged); !errors.Is(err, trust.ErrInvalid) || started() {
		t.Errorf("a forged signature that names a plugin: %v, started %v", err, started())
	}
	for _, scheme := range []signature.SigningScheme{signature.SigningSchemeX509, signature.SigningSchemeX509SigningAuthority} {
		if _, err := v.Verify(t.Context(), target("x"), sign(t, stranger, target("x"), request{scheme: scheme, attributes: plugged("status")})); !errors.Is(err, trust.ErrUntrusted) || started() {
			t.Errorf("a stranger's signature that names a plugin, scheme %s: %v, started %v", scheme, err, started())
		}
	}
	if _, err := v.Verify(t.Context(), target("x"), sign(t, id, target("x"), request{attributes: plugged("status")})); err != nil || !started() {
		t.Errorf("the plugin says it is good: %v, started %v", err, started())
	}
	if err := os.WriteFile(filepath.Join(dir, "revoked"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), target("x"), sign(t, id, target("x"), request{attributes: plugged("status")})); !errors.Is(err, trust.ErrRevoked) {
		t.Errorf("the plugin says it is revoked: %v", err)
	}
	for _, name := range []string{"../elsewhere/a", "../../" + filepath.Base(root) + "/elsewhere/a", elsewhere + "/a", ".", "..", "status/../../elsewhere/a", "status\x00", "absent"} {
		if _, err := v.Verify(t.Context(), target("x"), sign(t, id, target("x"), request{attributes: plugged(name)})); !errors.Is(err, trust.ErrUnchecked) {
			t.Errorf("plugin %q: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(elsewhere, "ran")); err == nil {
		t.Error("a program outside of the plugins was started")
	}
}
