package serve

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// options say how to reach a registry.
func (r registry) options(version string) (converter.RegistryOptions, error) {
	o := converter.RegistryOptions{PlainHTTP: r.PlainHTTP, Insecure: r.Insecure, UserAgent: "streamctl/" + version}
	if r.CA != "" {
		t, err := trusting(r.CA)
		if err != nil {
			return o, err
		}
		o.Transport = t
	}
	if r.Username != "" {
		login := passwordFile{r.Username, r.PasswordFile}
		if _, err := login.Authorization(); err != nil {
			return o, err // now rather than at the first conversion
		}
		o.Keychain = login
	}
	return o, nil
}

// passwordFile is a login whose password is read whenever it is needed, because whoever renews it replaces the file.
type passwordFile struct{ username, file string }

func (p passwordFile) Resolve(authn.Resource) (authn.Authenticator, error) { return p, nil }

func (p passwordFile) Authorization() (*authn.AuthConfig, error) {
	password, err := p.password()
	if err != nil {
		return nil, err
	}
	return &authn.AuthConfig{Username: p.username, Password: password}, nil
}

func (p passwordFile) password() (string, error) {
	b, err := os.ReadFile(p.file)
	return strings.TrimRight(string(b), "\r\n"), err
}

// trusting is the transport of go-containerregistry, or of any client, that trusts the certificates in ca beside the system's.
func trusting(ca string) (*http.Transport, error) {
	b, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s has no certificate in PEM", ca)
	}
	t, ok := remote.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, fmt.Errorf("transport %T takes no certificates", remote.DefaultTransport)
	}
	t = t.Clone()
	t.TLSClientConfig = &tls.Config{RootCAs: pool}
	return t, nil
}
