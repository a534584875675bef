package trusttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"
)

// Server answers whether certificates are revoked: an OCSP responder and lists (CRL) of any number of authorities.
type Server struct {
	*httptest.Server

	mu          sync.Mutex
	authorities map[string]*CA
	revoked     map[string]time.Time // by authority and serial number
	requests    []string
	fault       Fault
}

// Fault is what is wrong with a Server's answers.
type Fault int

const (
	None   Fault = iota
	Down         // 503 for all
	Forged       // the answers of another authority, with a far date
	Silent       // no answer until the client goes
	Old          // answers that are over
)

// NewServer starts a server, which ends with the test.
func NewServer(t testing.TB) *Server {
	s := &Server{authorities: map[string]*CA{}, revoked: map[string]time.Time{}}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *Server) authority(ca *CA) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authorities[ca.Root.Subject.CommonName] = ca
}

// Revoke revokes the certificate of id.
func (s *Server) Revoke(id *Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked[id.Chain[0].Issuer.CommonName+"/"+id.Chain[0].SerialNumber.String()] = time.Now()
}

// Set says what is wrong from now on.
func (s *Server) Set(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Requests are the paths that were asked for, without what follows the authority's name.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string{}, s.requests...)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	parts := strings.SplitN(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/", 3)
	if len(parts) < 2 {
		http.NotFound(w, r)
		return
	}
	name, err := url.PathUnescape(parts[1])
	if err != nil {
		http.NotFound(w, r)
		return
	}
	s.mu.Lock()
	fault, ca := s.fault, s.authorities[name]
	s.requests = append(s.requests, parts[0]+"/"+name)
	s.mu.Unlock()
	switch {
	case ca == nil:
		http.NotFound(w, r)
		return
	case fault == Down:
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	case fault == Silent:
		<-r.Context().Done()
		return
	}
	next := time.Now().Add(time.Hour)
	signer := ca
	switch fault {
	case Old:
		next = time.Now().Add(-time.Minute)
	case Forged:
		next = time.Now().Add(365 * 24 * time.Hour)
		signer = &CA{Root: ca.Root, key: forger()}
	}
	var b []byte
	if parts[0] == "crl" {
		b, err = s.list(ca, signer, next)
	} else {
		b, err = s.status(ca, signer, next, r, parts)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Write(b)
}

func (s *Server) list(ca, signer *CA, next time.Time) ([]byte, error) {
	l := &x509.RevocationList{Number: big.NewInt(time.Now().UnixNano()), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: next}
	s.mu.Lock()
	for key, at := range s.revoked {
		if serial, ok := strings.CutPrefix(key, ca.Root.Subject.CommonName+"/"); ok {
			n, _ := new(big.Int).SetString(serial, 10)
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: at})
		}
	}
	s.mu.Unlock()
	issuer := *signer.Root
	issuer.PublicKey = signer.key.Public()
	return x509.CreateRevocationList(rand.Reader, l, &issuer, signer.key)
}

func (s *Server) status(ca, signer *CA, next time.Time, r *http.Request, parts []string) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
	if err != nil {
		return nil, err
	}
	if r.Method == http.MethodGet && len(parts) == 3 {
		text, err := url.QueryUnescape(parts[2])
		if err != nil {
			return nil, err
		}
		if text, err = url.QueryUnescape(text); err != nil { // notation escapes it, and url.JoinPath once more
			return nil, err
		}
		if raw, err = base64.StdEncoding.DecodeString(strings.ReplaceAll(text, " ", "+")); err != nil {
			return nil, err
		}
	}
	q, err := ocsp.ParseRequest(raw)
	if err != nil {
		return nil, err
	}
	answer := ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber, ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: next}
	s.mu.Lock()
	at, revoked := s.revoked[ca.Root.Subject.CommonName+"/"+q.SerialNumber.String()]
	s.mu.Unlock()
	if revoked {
		answer.Status, answer.RevokedAt = ocsp.Revoked, at
	}
	return ocsp.CreateResponse(ca.Root, ca.Root, answer, signer.key)
}

// forger makes the key of somebody who has no business to answer.
func forger() crypto.Signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // the system has no random numbers
	}
	return key
}
