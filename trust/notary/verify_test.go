package notary_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

var formats = map[string]string{"jws": "application/jose+json", "cose": "application/cose"}

func target(name string) trust.Target {
	return trust.Target{Repository: "registry.example.com/team/app", Digest: digest.FromString(name), MediaType: ocispec.MediaTypeImageManifest, Size: 1234}
}

func verifier(t testing.TB, o notary.Options) *notary.Verifier {
	t.Helper()
	v, err := notary.NewVerifier(o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// request is a signature that notation's signer does not make: of another time, say.
type request struct {
	format, content string
	signed, expires time.Time
	scheme          signature.SigningScheme
	attributes      []signature.Attribute
}

func sign(t testing.TB, id *trusttest.Identity, target trust.Target, r request) trust.Envelope {
	t.Helper()
	if r.format == "" {
		r.format = "jws"
	}
	if r.signed.IsZero() {
		r.signed = time.Now()
	}
	if r.scheme == "" {
		r.scheme = signature.SigningSchemeX509
	}
	if r.content == "" {
		r.content = "application/vnd.cncf.notary.payload.v1+json"
	}
	payload, err := json.Marshal(map[string]any{"targetArtifact": ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}})
	if err != nil {
		t.Fatal(err)
	}
	local, err := signature.NewLocalSigner(id.Chain, id.Key)
	if err != nil {
		t.Fatal(err)
	}
	e, err := signature.NewEnvelope(formats[r.format])
	if err != nil {
		t.Fatal(err)
	}
	raw, err := e.Sign(&signature.SignRequest{
		Payload: signature.Payload{ContentType: r.content, Content: payload}, Signer: local, SigningTime: r.signed, Expiry: r.expires,
		SigningScheme: r.scheme, ExtendedSignedAttributes: r.attributes,
	})
	if err != nil {
		t.Fatal(err)
	}
	return trusttest.Envelope(formats[r.format], raw)
}

// jwsWith is a JWS envelope with one of its fields changed.
func jwsWith(t *testing.T, e trust.Envelope, change func(fields map[string]any)) trust.Envelope {
	t.Helper()
	var fields map[string]any
	if err := json.Unmarshal(e.Bytes, &fields); err != nil {
		t.Fatal(err)
	}
	change(fields)
	b, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return trusttest.Envelope(e.MediaType, b)
}

func protected(t *testing.T, e trust.Envelope, old, new string) trust.Envelope {
	return jwsWith(t, e, func(fields map[string]any) {
		raw := decode64(t, fields["protected"].(string))
		if !bytes.Contains(raw, []byte(old)) {
			t.Fatalf("%s is not in %s", old, raw)
		}
		fields["protected"] = encode64(bytes.Replace(raw, []byte(old), []byte(new), 1))
	})
}

// TestVerdicts: each way to be no good has its own class, and no other.
func TestVerdicts(t *testing.T) {
	server := trusttest.NewServer(t)
	ca := trusttest.NewCA(t, "authority", server)
	plain := trusttest.NewCA(t, "plain", nil)
	stranger := trusttest.NewCA(t, "authority", nil) // of the same name
	build, other := ca.Issue(t, "build", trusttest.Leaf{}), ca.Issue(t, "other", trusttest.Leaf{})
	revoked, listed := ca.Issue(t, "build", trusttest.Leaf{}), ca.Issue(t, "build", trusttest.Leaf{CRLOnly: true})
	server.Revoke(revoked)
	server.Revoke(listed)
	simple := plain.Issue(t, "build", trusttest.Leaf{})
	day := 24 * time.Hour
	ended := plain.Issue(t, "build", trusttest.Leaf{NotBefore: time.Now().Add(-10 * day), NotAfter: time.Now().Add(-day)})
	coming := plain.Issue(t, "build", trusttest.Leaf{NotBefore: time.Now().Add(day)})

	dir := trusttest.NewDir(t, ca,
		trusttest.Statement{Name: "all", Identities: []string{"x509.subject:" + trusttest.Subject("build")}},
		trusttest.Statement{Name: "plain", Scopes: []string{"registry.example.com/plain"}, Stores: []string{"ca:plain"}},
		trusttest.Statement{Name: "permissive", Scopes: []string{"registry.example.com/permissive"}, Stores: []string{"ca:default", "ca:plain"}, Level: "permissive"},
		trusttest.Statement{Name: "skip", Scopes: []string{"registry.example.com/skip"}, Level: "skip", NoIdentities: true},
		trusttest.Statement{Name: "audit", Scopes: []string{"registry.example.com/audit"}, Level: "audit"},
		trusttest.Statement{Name: "logged", Scopes: []string{"registry.example.com/logged"}, Override: map[string]string{"authenticity": "log"}},
		trusttest.Statement{Name: "no store", Scopes: []string{"registry.example.com/nostore"}, Stores: []string{"ca:missing"}},
	)
	trusttest.WriteStore(t, dir, "plain", plain.Root)
	v := verifier(t, notary.Options{Dir: dir})

	at := func(repository string) trust.Target {
		a := target("artifact")
		a.Repository = "registry.example.com/" + repository
		return a
	}
	good := build.Sign(t, at("app"), "jws")
	cose := build.Sign(t, at("app"), "cose")
	for name, c := range map[string]struct {
		e        trust.Envelope
		at       trust.Target
		want     error
		warnings int
	}{
		"JWS":  {e: good, at: at("app")},
		"COSE": {e: cose, at: at("app")},
		"without revocation, trusted from the root": {e: simple.Sign(t, at("plain"), "jws"), at: at("plain")},

		"of another artifact":       {e: build.Sign(t, target("another"), "jws"), at: at("app"), want: trust.ErrInvalid},
		"of another, untrusted too": {e: stranger.Issue(t, "build", trusttest.Leaf{}).Sign(t, target("another"), "cose"), at: at("app"), want: trust.ErrInvalid},
		"empty":                     {e: trusttest.Envelope(formats["jws"], nil), at: at("app"), want: trust.ErrInvalid},
		"JWS cut short":             {e: trusttest.Envelope(formats["jws"], good.Bytes[:len(good.Bytes)-20]), at: at("app"), want: trust.ErrInvalid},
		"COSE cut short":            {e: trusttest.Envelope(formats["cose"], cose.Bytes[:len(cose.Bytes)-20]), at: at("app"), want: trust.ErrInvalid},
		"a bit of the signature":    {e: trusttest.Envelope(formats["cose"], flip(cose.Bytes)), at: at("app"), want: trust.ErrInvalid},
		"JWS that says COSE":        {e: trusttest.Envelope(formats["cose"], good.Bytes), at: at("app"), want: trust.ErrInvalid},
		"another media type":        {e: trusttest.Envelope("text/html", good.Bytes), at: at("app"), want: trust.ErrInvalid},
		"other bytes":               {e: trust.Envelope{Digest: cose.Digest, MediaType: good.MediaType, Bytes: good.Bytes}, at: at("app"), want: trust.ErrInvalid},
		"too large":                 {e: trusttest.Envelope(formats["jws"], make([]byte, trust.MaxEnvelope+1)), at: at("app"), want: trust.ErrInvalid},
		"algorithm none":            {e: protected(t, good, `"ES256"`, `"none"`), at: at("app"), want: trust.ErrInvalid},
		"algorithm HS256":           {e: protected(t, good, `"ES256"`, `"HS256"`), at: at("app"), want: trust.ErrInvalid},
		"another algorithm":         {e: protected(t, good, `"ES256"`, `"ES384"`), at: at("app"), want: trust.ErrInvalid},
		"another content type":      {e: sign(t, build, at("app"), request{content: "application/json"}), at: at("app"), want: trust.ErrInvalid},
		"another payload": {e: jwsWith(t, good, func(f map[string]any) {
			f["payload"] = encode64(bytes.Replace(decode64(t, f["payload"].(string)), []byte("1234"), []byte("1235"), 1))
		}), at: at("app"), want: trust.ErrInvalid},
		"chain in another order": {e: jwsWith(t, good, func(f map[string]any) { slices.Reverse(f["header"].(map[string]any)["x5c"].([]any)) }), at: at("app"), want: trust.ErrInvalid},
		"no chain":               {e: jwsWith(t, good, func(f map[string]any) { delete(f["header"].(map[string]any), "x5c") }), at: at("app"), want: trust.ErrInvalid},
		"a thousand certificates": {e: jwsWith(t, good, func(f map[string]any) {
			h := f["header"].(map[string]any)
			x5c := h["x5c"].([]any)
			h["x5c"] = append(slices.Repeat(x5c[:1], 1000), x5c[1:]...)
		}), at: at("app"), want: trust.ErrInvalid},
		"the size is another": {e: good, at: func() trust.Target { a := at("app"); a.Size++; return a }(), want: trust.ErrInvalid},

		"of a stranger":           {e: stranger.Issue(t, "build", trusttest.Leaf{}).Sign(t, at("app"), "jws"), at: at("app"), want: trust.ErrUntrusted},
		"of another trust store":  {e: simple.Sign(t, at("app"), "jws"), at: at("app"), want: trust.ErrUntrusted},
		"permissive, a stranger":  {e: stranger.Issue(t, "build", trusttest.Leaf{}).Sign(t, at("app"), "jws"), at: at("permissive"), want: trust.ErrUntrusted},
		"a scheme without stores": {e: sign(t, build, at("app"), request{scheme: signature.SigningSchemeX509SigningAuthority}), at: at("app"), want: trust.ErrUntrusted},
		"wrong identity":          {e: other.Sign(t, at("app"), "jws"), at: at("app"), want: trust.ErrIdentity},

		"signature is over":            {e: sign(t, simple, at("plain"), request{signed: time.Now().Add(-2 * time.Hour), expires: time.Now().Add(-time.Hour)}), at: at("plain"), want: trust.ErrExpired},
		"certificate is over":          {e: sign(t, ended, at("plain"), request{signed: time.Now().Add(-2 * day)}), at: at("plain"), want: trust.ErrExpired},
		"certificate has not begun":    {e: sign(t, coming, at("plain"), request{signed: time.Now().Add(2 * day)}), at: at("plain"), want: trust.ErrExpired},
		"permissive, all that is over": {e: sign(t, ended, at("permissive"), request{signed: time.Now().Add(-2 * day), expires: time.Now().Add(-time.Hour)}), at: at("permissive"), warnings: 2},

		"revoked":             {e: revoked.Sign(t, at("app"), "jws"), at: at("app"), want: trust.ErrRevoked},
		"in a list":           {e: listed.Sign(t, at("app"), "cose"), at: at("app"), want: trust.ErrRevoked},
		"permissive, revoked": {e: revoked.Sign(t, at("permissive"), "jws"), at: at("permissive"), warnings: 1},

		"level skip":              {e: build.Sign(t, at("skip"), "jws"), at: at("skip"), want: trust.ErrUnchecked},
		"level audit":             {e: build.Sign(t, at("audit"), "jws"), at: at("audit"), want: trust.ErrUnchecked},
		"authenticity log":        {e: build.Sign(t, at("logged"), "jws"), at: at("logged"), want: trust.ErrUnchecked},
		"trust store absent":      {e: build.Sign(t, at("nostore"), "jws"), at: at("nostore"), want: trust.ErrUnchecked},
		"no name of a repository": {e: good, at: trust.Target{Repository: "app", Digest: digest.FromString("artifact"), MediaType: ocispec.MediaTypeImageManifest, Size: 1234}, want: trust.ErrUnchecked},
		"critical attribute":      {e: sign(t, build, at("app"), request{attributes: []signature.Attribute{{Key: "com.example.x", Critical: true, Value: "y"}}}), at: at("app"), want: trust.ErrUnchecked},
		"plugin that is absent":   {e: sign(t, build, at("app"), request{attributes: plugged("absent")}), at: at("app"), want: trust.ErrUnchecked},
	} {
		d, err := v.Verify(t.Context(), c.at, c.e)
		if !errors.Is(err, c.want) || c.want == nil && err != nil || len(d.Warnings) != c.warnings {
			t.Errorf("%s: %+v, %v; want %v and %d warnings", name, d, err, c.want, c.warnings)
			continue
		}
		if n := classes(err); c.want != nil && n != 1 {
			t.Errorf("%s: %v is of %d classes", name, err, n)
		}
		if c.want == nil && (d.Identity != trusttest.Subject("build") || d.Signed.IsZero() || time.Until(d.Until) > 24*time.Hour || !d.Until.After(time.Now())) {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

func plugged(name string) []signature.Attribute {
	return []signature.Attribute{
		{Key: "io.cncf.notary.verificationPlugin", Critical: true, Value: name},
		{Key: "io.cncf.notary.verificationPluginMinVersion", Critical: true, Value: "1.0.0"},
	}
}

// classes counts the classes that err is of; a wrong identity is one of the untrusted.
func classes(err error) (n int) {
	for _, class := range []error{trust.ErrMissing, trust.ErrInvalid, trust.ErrUntrusted, trust.ErrExpired, trust.ErrRevoked, trust.ErrUnchecked} {
		if errors.Is(err, class) {
			n++
		}
	}
	return n
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}

// TestHowLong: a verdict is kept no longer than what it rests on is good.
func TestHowLong(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})})
	soon := time.Now().Add(10 * time.Minute)
	for name, e := range map[string]trust.Envelope{
		"the signature's":   sign(t, ca.Issue(t, "a", trusttest.Leaf{}), target("x"), request{expires: soon}),
		"the certificate's": sign(t, ca.Issue(t, "b", trusttest.Leaf{NotAfter: soon}), target("x"), request{}),
	} {
		d, err := v.Verify(t.Context(), target("x"), e)
		if err != nil || d.Until.After(soon) {
			t.Errorf("%s end: %v, %v", name, d.Until, err)
		}
	}
}

// TestReadAgain: a change of the trust policy or of a trust store counts at once, and so does damage.
func TestReadAgain(t *testing.T) {
	a, b := trusttest.NewCA(t, "a", nil), trusttest.NewCA(t, "b", nil)
	dir := trusttest.NewDir(t, a, trusttest.Statement{Name: "all"})
	v := verifier(t, notary.Options{Dir: dir})
	e := b.Issue(t, "build", trusttest.Leaf{}).Sign(t, target("x"), "jws")
	last := v.Epoch()
	check := func(when string, want error) {
		t.Helper()
		if _, err := v.Verify(t.Context(), target("x"), e); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%s: %v, want %v", when, err, want)
		}
		if now := v.Epoch(); now == last && when != "at first" {
			t.Errorf("%s: the epoch is still %s", when, now)
		} else {
			last = now
		}
	}
	check("at first", trust.ErrUntrusted)
	trusttest.WriteStore(t, dir, "default", b.Root)
	check("another root in the store", nil)
	trusttest.WritePolicy(t, dir, trusttest.Statement{Name: "all", Identities: []string{"x509.subject:" + trusttest.Subject("deploy")}})
	check("another identity", trust.ErrIdentity)
	if err := os.WriteFile(filepath.Join(dir, "trustpolicy.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	check("half a file", trust.ErrUnchecked)
	if err := os.Remove(filepath.Join(dir, "trustpolicy.json")); err != nil {
		t.Fatal(err)
	}
	check("none", trust.ErrUnchecked)
	trusttest.WritePolicy(t, dir, trusttest.Statement{Name: "all"})
	check("mended", nil)
	if err := os.Remove(filepath.Join(dir, "truststore", "x509", "ca", "default", "ca.crt")); err != nil {
		t.Fatal(err)
	}
	check("an empty store", trust.ErrUntrusted)
	if err := os.Remove(filepath.Join(dir, "truststore", "x509", "ca", "default")); err != nil {
		t.Fatal(err)
	}
	check("no store", trust.ErrUnchecked)
}

// TestTrapsOfPolicies: what lets everybody sign, and stores that are not there, are found before an image is pulled.
func TestTrapsOfPolicies(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	dir := trusttest.NewDir(t, ca,
		trusttest.Statement{Name: "good", Scopes: []string{"registry.example.com/good"}},
		trusttest.Statement{Name: "permissive", Scopes: []string{"registry.example.com/permissive"}, Level: "permissive"},
		trusttest.Statement{Name: "skip", Scopes: []string{"registry.example.com/skip"}, Level: "skip", NoIdentities: true},
		trusttest.Statement{Name: "audit", Scopes: []string{"registry.example.com/audit"}, Level: "audit"},
		trusttest.Statement{Name: "log", Scopes: []string{"registry.example.com/log"}, Override: map[string]string{"authenticity": "log"}},
		trusttest.Statement{Name: "store", Scopes: []string{"registry.example.com/store"}, Stores: []string{"ca:missing"}},
	)
	v := verifier(t, notary.Options{Dir: dir})
	for repository, want := range map[string]string{"good": "", "permissive": "", "skip": `"skip"`, "audit": `"audit"`, "log": `"log"`, "store": "ca:missing"} {
		problems := v.Check(func(r string) bool { return r == "registry.example.com/"+repository })
		if want == "" && len(problems) > 0 || want != "" && (len(problems) != 1 || !strings.Contains(problems[0].Error(), want)) {
			t.Errorf("%s: %v, want %s", repository, problems, want)
		}
	}
	trusttest.WritePolicy(t, dir, trusttest.Statement{Name: "everything", Level: "audit"})
	if problems := v.Check(func(string) bool { return false }); len(problems) != 1 {
		t.Errorf("a statement for all repositories: %v", problems)
	}
	for name, content := range map[string]string{"empty": "", "no JSON": "trust", "no statements": `{"version":"1.0","trustPolicies":[]}`, "another version": `{"version":"9.0","trustPolicies":[]}`} {
		path := filepath.Join(t.TempDir(), "trustpolicy.json")
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := notary.NewVerifier(notary.Options{Dir: filepath.Dir(path)}); err == nil {
			t.Errorf("%s is a trust policy", name)
		}
	}
	link := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "trustpolicy.json"), filepath.Join(link, "trustpolicy.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := notary.NewVerifier(notary.Options{Dir: link}); err == nil || !strings.Contains(err.Error(), "symlink") {
		t.Errorf("a symlink: %v", err)
	}
}

// TestGivenUp: who has gone gets its own error, and no class.
func TestGivenUp(t *testing.T) {
	server := trusttest.NewServer(t)
	ca := trusttest.NewCA(t, "authority", server)
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})})
	server.Set(trusttest.Silent)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := v.Verify(ctx, target("x"), ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target("x"), "jws"))
	if !errors.Is(err, context.Canceled) || classes(err) != 0 {
		t.Error(err)
	}
}

// TestHostileText: what a certificate says is no text that a terminal obeys.
func TestHostileText(t *testing.T) {
	ca := trusttest.NewCA(t, "authority", nil)
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})})
	evil := trusttest.NewCA(t, "evil\x1b[2J\n", nil).Issue(t, "\x1b]0;owned\a\nlevel=info", trusttest.Leaf{})
	_, err := v.Verify(t.Context(), target("x"), sign(t, evil, target("x"), request{}))
	if !errors.Is(err, trust.ErrUntrusted) || strings.ContainsAny(err.Error(), "\x1b\a\n") {
		t.Errorf("%q", err)
	}
}
