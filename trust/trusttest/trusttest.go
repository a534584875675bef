// Package trusttest is what tests of signatures need: certificate authorities with an OCSP responder and a list of revoked certificates, certificates that sign,
// and the files of a trust policy and a trust store.
package trusttest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
)

// CA is a certificate authority.
type CA struct {
	Root   *x509.Certificate
	Server *Server // nil: its certificates cannot be revoked
	key    crypto.Signer
	serial int64
}

// Kinds are the keys that Notary Project signatures are made with; the first are cheap to make.
var Kinds = []string{"ec256", "ec384", "ec521", "rsa2048", "rsa3072", "rsa4096"}

func newKey(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	curves := map[string]elliptic.Curve{"": elliptic.P256(), "ec256": elliptic.P256(), "ec384": elliptic.P384(), "ec521": elliptic.P521()}
	bits := map[string]int{"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
	var key crypto.Signer
	var err error
	if c, ok := curves[kind]; ok {
		key, err = ecdsa.GenerateKey(c, rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, bits[kind])
	}
	if err != nil {
		t.Fatalf("key %q: %v", kind, err)
	}
	return key
}

// NewCA makes an authority. With a server, its certificates name it for their revocation.
func NewCA(t testing.TB, name string, server *Server) *CA {
	t.Helper()
	ca := &CA{Server: server, key: newKey(t, ""), serial: 1}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: subject(name),
		NotBefore: time.Now().Add(-30 * 24 * time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	ca.Root = certificate(t, template, template, ca.key.Public(), ca.key)
	if server != nil {
		server.authority(ca)
	}
	return ca
}

func certificate(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Subject is how verdicts and trusted identities name what CA.Issue issues for name: notation wants a state and a country.
func Subject(name string) string { return subject(name).String() }

func subject(name string) pkix.Name {
	return pkix.Name{CommonName: name, Organization: []string{"Example"}, Province: []string{"WA"}, Country: []string{"US"}}
}

// Leaf says what certificate to issue.
type Leaf struct {
	Kind      string // of Kinds; "" is the cheapest
	NotBefore time.Time
	NotAfter  time.Time // zero: valid for some days around now
	CRLOnly   bool      // its status is in a list alone; otherwise the OCSP responder is asked first
}

// Identity is a certificate with its key.
type Identity struct {
	Chain []*x509.Certificate // the certificate first, the root last
	Key   crypto.Signer
}

// Issue issues a certificate that signs code, for Subject(name).
func (ca *CA) Issue(t testing.TB, name string, o Leaf) *Identity {
	t.Helper()
	ca.serial++
	key := newKey(t, o.Kind)
	if o.NotBefore.IsZero() {
		o.NotBefore = time.Now().Add(-20 * 24 * time.Hour)
	}
	if o.NotAfter.IsZero() {
		o.NotAfter = time.Now().Add(20 * 24 * time.Hour)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(ca.serial), Subject: subject(name),
		NotBefore: o.NotBefore, NotAfter: o.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true,
	}
	if ca.Server != nil {
		template.CRLDistributionPoints = []string{ca.Server.URL + "/crl/" + ca.Root.Subject.CommonName}
		if !o.CRLOnly {
			template.OCSPServer = []string{ca.Server.URL + "/ocsp/" + ca.Root.Subject.CommonName}
		}
	}
	return &Identity{Chain: []*x509.Certificate{certificate(t, template, ca.Root, key.Public(), ca.key), ca.Root}, Key: key}
}

// Files writes the key and the chain into a directory, as openssl does, and returns their names.
func (id *Identity) Files(t testing.TB, dir string) (keyFile, certFile string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, id.Chain[0].Subject.CommonName)
	write(t, name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	write(t, name+".crt", PEM(id.Chain...), 0o644)
	return name + ".key", name + ".crt"
}

// PEM is how certificates are in files.
func PEM(chain ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range chain {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}

// Signer signs as the identity does. o has no files and no key.
func (id *Identity) Signer(t testing.TB, o notary.SignOptions) *notary.Signer {
	t.Helper()
	o.KeyFile, o.CertFile = id.Files(t, t.TempDir())
	s, err := notary.NewSigner(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Sign signs target; format is "jws" or "cose".
func (id *Identity) Sign(t testing.TB, target trust.Target, format string) trust.Envelope {
	t.Helper()
	e, _, err := id.Signer(t, notary.SignOptions{Format: format}).Sign(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Envelope is one of these bytes.
func Envelope(mediaType string, b []byte) trust.Envelope {
	return trust.Envelope{Digest: digest.FromBytes(b), MediaType: mediaType, Bytes: b}
}

// Statement is one of a trust policy.
type Statement struct {
	Name         string
	Scopes       []string          // none is all: "*"
	Level        string            // "" is strict
	Override     map[string]string // of the level
	Stores       []string          // names of trust stores of kind ca; none is "ca:default"
	Identities   []string          // none is "*"
	NoIdentities bool              // none, for level skip
}

// WritePolicy writes trustpolicy.json into a directory. It is another file each time, as when somebody installs it.
func WritePolicy(t testing.TB, dir string, statements ...Statement) {
	t.Helper()
	type verification struct {
		Level    string            `json:"level"`
		Override map[string]string `json:"override,omitempty"`
	}
	type policy struct {
		Name       string       `json:"name"`
		Scopes     []string     `json:"registryScopes"`
		Check      verification `json:"signatureVerification"`
		Stores     []string     `json:"trustStores,omitempty"`
		Identities []string     `json:"trustedIdentities,omitempty"`
	}
	var list []policy
	for _, s := range statements {
		p := policy{s.Name, s.Scopes, verification{s.Level, s.Override}, s.Stores, s.Identities}
		if p.Check.Level == "" {
			p.Check.Level = "strict"
		}
		if p.Scopes == nil {
			p.Scopes = []string{"*"}
		}
		if p.Stores == nil && !s.NoIdentities {
			p.Stores = []string{"ca:default"}
		}
		if p.Identities == nil && !s.NoIdentities {
			p.Identities = []string{"*"}
		}
		list = append(list, p)
	}
	b, err := json.Marshal(map[string]any{"version": "1.0", "trustPolicies": list})
	if err != nil {
		t.Fatal(err)
	}
	replace(t, filepath.Join(dir, "trustpolicy.json"), b)
}

// WriteStore writes certificates into a trust store of kind ca.
func WriteStore(t testing.TB, dir, name string, certificates ...*x509.Certificate) {
	t.Helper()
	replace(t, filepath.Join(dir, "truststore", "x509", "ca", name, "ca.crt"), PEM(certificates...))
}

// NewDir makes a directory with a trust store "default" of ca's root and a trust policy.
func NewDir(t testing.TB, ca *CA, statements ...Statement) string {
	t.Helper()
	dir := t.TempDir()
	WriteStore(t, dir, "default", ca.Root)
	WritePolicy(t, dir, statements...)
	return dir
}

func replace(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, path+".new", b, 0o644)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
}

// DER is a signature of two numbers side by side, as JWS and COSE have it, in the form that openssl knows.
func DER(t testing.TB, sig []byte) []byte {
	t.Helper()
	n := len(sig) / 2
	b, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// SignOver signs target with what is over when it returns: a second later.
func (id *Identity) SignOver(t testing.TB, target trust.Target) trust.Envelope {
	t.Helper()
	e, _, err := id.Signer(t, notary.SignOptions{Expiry: time.Second}).Sign(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	store := &CA{Root: id.Chain[len(id.Chain)-1]}
	v, err := notary.NewVerifier(notary.Options{Dir: NewDir(t, store, Statement{Name: "all"})})
	if err != nil {
		t.Fatal(err)
	}
	target.Repository = "registry.example/app"
	for tick := time.Tick(20 * time.Millisecond); err == nil; <-tick {
		_, err = v.Verify(t.Context(), target, e)
	}
	if !errors.Is(err, trust.ErrExpired) {
		t.Fatal(err)
	}
	return e
}
