package notary

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-core-go/signature/cose"
	"github.com/notaryproject/notation-core-go/signature/jws"
	nx509 "github.com/notaryproject/notation-core-go/x509"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/config"
	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/signer"
	framework "github.com/notaryproject/notation-plugin-framework-go/plugin"
	"github.com/notaryproject/tspclient-go"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// SignOptions say what to sign with: a key of notation's list, or the files of a key and its certificates.
type SignOptions struct {
	Dir       string        // has signingkeys.json
	PluginDir string        // has the plugins of keys that are elsewhere
	Key       string        // name in that list; "" is its default, unless there is a KeyFile
	KeyFile   string        // PEM
	CertFile  string        // PEM: the certificate of KeyFile, and those above it up to a root
	Format    string        // "jws", "cose"; "" is jws
	Expiry    time.Duration // after which a signature is over, in seconds; 0 is never
	Timeout   time.Duration // of one signature, with plugin and timestamp, and of a plugin's first answer; 0 is a minute

	TimestampURL  string // of an RFC 3161 authority; "" is none
	TimestampRoot string // PEM: its root certificate
	Agent         string // the program that signs, in the envelope
}

// formats are the media types of envelopes by the names of notation's --signature-format.
var formats = map[string]string{"": jws.MediaTypeEnvelope, "jws": jws.MediaTypeEnvelope, "cose": cose.MediaTypeEnvelope}

// Signer signs. It is a trust.Signer.
type Signer struct {
	name    string
	new     func() (notation.Signer, error)
	options notation.SignerSignOptions
	timeout time.Duration

	mu   sync.Mutex
	leaf *x509.Certificate // nil until a plugin has told it
}

// NewSigner reads the key, or asks the plugin for it. Its error names the file or the plugin.
func NewSigner(ctx context.Context, o SignOptions) (*Signer, error) {
	s := &Signer{options: notation.SignerSignOptions{SignatureMediaType: formats[o.Format], ExpiryDuration: o.Expiry, SigningAgent: o.Agent}, timeout: cmp.Or(o.Timeout, time.Minute)}
	switch {
	case s.options.SignatureMediaType == "":
		return nil, fmt.Errorf("signature format %q: jws or cose", o.Format)
	case o.Expiry < 0 || o.Expiry%time.Second != 0:
		return nil, fmt.Errorf("expiry of signatures %s: whole seconds, or 0 for none", o.Expiry)
	case (o.KeyFile == "") != (o.CertFile == ""):
		return nil, errors.New("a key file and a certificate file belong together")
	case o.KeyFile != "" && o.Key != "":
		return nil, fmt.Errorf("key %q, or the key file %s: one of both", o.Key, o.KeyFile)
	}
	if err := s.timestamps(o); err != nil {
		return nil, err
	}
	if o.KeyFile != "" {
		if err := s.local(o.KeyFile, o.KeyFile, o.CertFile); err != nil {
			return nil, err
		}
		return s, nil
	}
	suite, err := keyOf(o.Dir, o.Key)
	if err != nil {
		return nil, err
	}
	if suite.X509KeyPair != nil {
		err = s.local(suite.Name, suite.KeyPath, suite.CertificatePath)
	} else {
		err = s.plugin(ctx, o.PluginDir, suite)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// keyOf finds a key in signingkeys.json.
func keyOf(directory, name string) (config.KeySuite, error) {
	path := filepath.Join(directory, dir.PathSigningKeys)
	b, err := os.ReadFile(path)
	if err != nil {
		return config.KeySuite{}, fmt.Errorf("list of signing keys: %w", err)
	}
	var keys config.SigningKeys
	if err := json.Unmarshal(b, &keys); err != nil {
		return config.KeySuite{}, fmt.Errorf("list of signing keys %s: %w", path, err)
	}
	var suite config.KeySuite
	if name == "" {
		suite, err = keys.GetDefault()
	} else {
		suite, err = keys.Get(name)
	}
	if err == nil && suite.X509KeyPair == nil && suite.ExternalKey == nil {
		err = fmt.Errorf("key %q has neither files nor a plugin", suite.Name)
	}
	if err != nil {
		return suite, fmt.Errorf("list of signing keys %s: %w", path, err)
	}
	return suite, nil
}

// local signs with a key in a file.
func (s *Signer) local(name, keyFile, certFile string) error {
	i, err := os.Stat(keyFile)
	if err != nil {
		return fmt.Errorf("signing key: %w", err)
	}
	if i.Mode().Perm()&0o027 != 0 { // groups may read: Kubernetes gives a pod its Secrets so
		return fmt.Errorf("signing key: %s may be read or written by others than its owner and group (%s): chmod 600", keyFile, i.Mode().Perm())
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return fmt.Errorf("signing key %s with certificate %s: %w", keyFile, certFile, err)
	}
	var chain []*x509.Certificate
	for _, der := range pair.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %s: %w", certFile, err)
		}
		chain = append(chain, c)
	}
	now := time.Now()
	if err := nx509.ValidateCodeSigningCertChain(chain, &now); err != nil {
		return fmt.Errorf("certificate %s signs no code that others accept: %w", certFile, err)
	}
	generic, err := signer.NewGenericSigner(pair.PrivateKey, chain)
	if err != nil {
		return fmt.Errorf("signing key %s: %w", keyFile, err)
	}
	s.name, s.leaf, s.new = name, chain[0], func() (notation.Signer, error) { return generic, nil }
	return nil
}

// plugin signs with a key that a plugin has.
func (s *Signer) plugin(ctx context.Context, directory string, suite config.KeySuite) error {
	if directory == "" {
		return fmt.Errorf("signing key %q is of plugin %q, and no directory of plugins is given", suite.Name, suite.PluginName)
	}
	p, err := pluginsOf(directory).Get(ctx, suite.PluginName)
	if err != nil {
		return fmt.Errorf("signing key %q: plugin %q: %w", suite.Name, suite.PluginName, err)
	}
	if err := s.within(ctx, func(ctx context.Context) error {
		_, err := p.GetMetadata(ctx, &framework.GetMetadataRequest{PluginConfig: suite.PluginConfig})
		return err
	}); err != nil {
		return fmt.Errorf("signing key %q: plugin %q: %w", suite.Name, suite.PluginName, err)
	}
	s.name = suite.Name
	// One for each signature: it keeps what the plugin answers to it.
	s.new = func() (notation.Signer, error) { return signer.NewPluginSigner(p, suite.ID, suite.PluginConfig) }
	return nil
}

func (s *Signer) timestamps(o SignOptions) (err error) {
	if o.TimestampURL == "" {
		return nil
	}
	if s.options.Timestamper, err = tspclient.NewHTTPTimestamper(&http.Client{Timeout: 10 * time.Second}, o.TimestampURL); err != nil {
		return fmt.Errorf("timestamps of %s: %w", o.TimestampURL, err)
	}
	roots, err := nx509.ReadCertificateFile(o.TimestampRoot)
	if err != nil || len(roots) == 0 {
		return fmt.Errorf("root certificate of the timestamps, %q: %w", o.TimestampRoot, cmp.Or(err, errors.New("it has no certificate")))
	}
	s.options.TSARootCAs = x509.NewCertPool()
	for _, c := range roots {
		s.options.TSARootCAs.AddCert(c)
	}
	return nil
}

// Sign signs t, see trust.Signer. What it makes is checked before it returns.
func (s *Signer) Sign(ctx context.Context, t trust.Target) (trust.Envelope, map[string]string, error) {
	e, info, annotations, err := s.sign(ctx, t)
	if err != nil {
		return e, nil, fmt.Errorf("sign %s with %s: %s", t.Digest, s, plain.Cut(err.Error(), 1000))
	}
	s.known(info.CertificateChain[0])
	var thumbprints []string
	for _, c := range info.CertificateChain {
		sum := sha256.Sum256(c.Raw)
		thumbprints = append(thumbprints, hex.EncodeToString(sum[:]))
	}
	list, err := json.Marshal(thumbprints)
	if err != nil {
		return e, nil, err
	}
	all := map[string]string{}
	maps.Copy(all, annotations)
	all["io.cncf.notary.x509chain.thumbprint#S256"] = string(list)
	all[ocispec.AnnotationCreated] = info.SignedAttributes.SigningTime.UTC().Format(time.RFC3339)
	return e, all, nil
}

func (s *Signer) sign(ctx context.Context, t trust.Target) (e trust.Envelope, info *signature.SignerInfo, annotations map[string]string, err error) {
	n, err := s.new()
	if err != nil {
		return e, nil, nil, err
	}
	var raw []byte
	if err := s.within(ctx, func(ctx context.Context) (err error) {
		raw, info, err = n.Sign(ctx, ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size}, s.options)
		return err
	}); err != nil {
		return e, nil, nil, err
	}
	if p, ok := n.(interface{ PluginAnnotations() map[string]string }); ok {
		annotations = p.PluginAnnotations()
	}
	return trust.Envelope{Digest: digest.FromBytes(raw), MediaType: s.options.SignatureMediaType, Bytes: raw}, info, annotations, nil
}

// within does what a plugin or an authority may take its time for: one that does not answer would keep a conversion, or streamctl, for ever.
func (s *Signer) within(ctx context.Context, do func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := do(limited)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("no answer within %s: %w", s.timeout, err)
	}
	return err
}

// Signed says if e is a signature of t by the same certificate that has more than a quarter of its time left, see trust.Signer. A plugin tells its certificate
// with a signature only: the first call has it sign nothing. What is signed is checked: anybody can write an envelope that has our certificates in it.
func (s *Signer) Signed(ctx context.Context, t trust.Target, e trust.Envelope) (bool, error) {
	envelope, err := signature.ParseEnvelope(e.MediaType, e.Bytes)
	if err != nil {
		return false, nil
	}
	content, err := envelope.Verify()
	if err != nil || isOf(t, content) != nil {
		return false, nil
	}
	leaf, err := s.certificate(ctx)
	if err != nil {
		return false, err
	}
	left := content.SignerInfo.SignedAttributes.Expiry
	if !left.IsZero() && time.Until(left) < left.Sub(content.SignerInfo.SignedAttributes.SigningTime)/4 || time.Now().After(leaf.NotAfter) {
		return false, nil
	}
	return content.SignerInfo.CertificateChain[0].Equal(leaf), nil
}

// certificate is the one that the signer signs with.
func (s *Signer) certificate(ctx context.Context) (*x509.Certificate, error) {
	if leaf := s.known(nil); leaf != nil {
		return leaf, nil
	}
	_, info, _, err := s.sign(ctx, trust.Target{Digest: ocispec.DescriptorEmptyJSON.Digest, MediaType: ocispec.MediaTypeEmptyJSON, Size: ocispec.DescriptorEmptyJSON.Size})
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %s", s, plain.Cut(err.Error(), 1000))
	}
	return s.known(info.CertificateChain[0]), nil
}

// known is the certificate, if it is known, after leaf is noted unless it is nil.
func (s *Signer) known(leaf *x509.Certificate) *x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	if leaf != nil {
		s.leaf = leaf
	}
	return s.leaf
}

// String is the key and, where it is known, whom its certificate is for.
func (s *Signer) String() string {
	if leaf := s.known(nil); leaf != nil {
		return plain.Cut(fmt.Sprintf("key %s (%s)", s.name, leaf.Subject), 300)
	}
	return plain.Cut("key "+s.name, 300)
}
