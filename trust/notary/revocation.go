package notary

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/notaryproject/notation-core-go/revocation"
	"github.com/notaryproject/notation-core-go/revocation/crl"
	"github.com/notaryproject/notation-core-go/revocation/purpose"
	"github.com/notaryproject/notation-core-go/revocation/result"
	"golang.org/x/crypto/ocsp"
	"golang.org/x/sync/singleflight"
)

const (
	ocspTimeout = 2 * time.Second // notation's
	crlTimeout  = 5 * time.Second
	maxAnswer   = 32 << 20 // bytes of a list of revoked certificates: notation's limit
	maxMemory   = 64 << 20 // bytes of all that are kept in memory
	maxFiles    = 256      // from this many on, those that are over are deleted
)

// answers keeps what OCSP responders and servers of lists of revoked certificates (CRL) have answered, as long as the answers themselves say, a day at most. It
// works below notation-core-go, as HTTP, so that a kept answer is checked like a new one. What does not make a certificate's status known is not kept: these
// servers are asked without TLS, and a forged answer with a far date would be there until then.
type answers struct {
	base   *http.Client
	dir    string
	flight singleflight.Group

	mu     sync.Mutex
	memory map[string]answer
}

// answer is one that is kept.
type answer struct {
	URL   string    `json:"url"`
	Until time.Time `json:"until"`
	Body  []byte    `json:"body"`
}

func newAnswers(dir string, client *http.Client) *answers {
	if client == nil {
		client = &http.Client{}
	}
	return &answers{base: client, dir: dir, memory: map[string]answer{}}
}

// validator is notation-core-go's, with what it asks kept and what it finds noted in the call.
func (a *answers) validator(p purpose.Purpose) (revocation.Validator, error) {
	client := func(t time.Duration, until func([]byte) time.Time) *http.Client {
		c := *a.base
		c.Timeout, c.Transport = t, &keeper{a, until}
		return &c
	}
	fetcher, err := crl.NewHTTPFetcher(client(crlTimeout, untilCRL))
	if err != nil {
		return nil, err
	}
	v, err := revocation.NewWithOptions(revocation.Options{OCSPHTTPClient: client(ocspTimeout, untilOCSP), CRLFetcher: fetcher, CertChainPurpose: p})
	if err != nil {
		return nil, err
	}
	return validator{v, a, p}, nil
}

type validator struct {
	revocation.Validator
	answers *answers
	purpose purpose.Purpose
}

// ValidateContext is called by notation-go.
func (v validator) ValidateContext(ctx context.Context, o revocation.ValidateContextOptions) ([]*result.CertRevocationResult, error) {
	results, err := v.Validator.ValidateContext(ctx, o)
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		v.answers.settle(c, v.purpose, results)
	}
	return results, err
}

// call is one Verify, in its context.
type call struct {
	mu   sync.Mutex
	used map[string]answer        // answers that this call got, kept before or not
	ends time.Time                // the first Until of those that made a status known
	dead map[purpose.Purpose]bool // for each purpose that was asked for: a certificate of the chain is revoked
}

type callKey struct{}

func (c *call) use(key string, a answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used == nil {
		c.used = map[string]answer{}
	}
	c.used[key] = a
}

// revoked says if a certificate of the chain of that purpose is, and if we were asked.
func (c *call) revoked(p purpose.Purpose) (dead, asked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dead, asked = c.dead[p]
	return dead, asked
}

func (c *call) until() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ends
}

// settle keeps the answers that made a status known, and drops the others.
func (a *answers) settle(c *call, p purpose.Purpose, results []*result.CertRevocationResult) {
	var known []string
	c.mu.Lock()
	used := c.used
	c.used = nil
	if c.dead == nil {
		c.dead = map[purpose.Purpose]bool{}
	}
	c.dead[p] = false
	for _, r := range results {
		c.dead[p] = c.dead[p] || r.Result == result.ResultRevoked
		for _, s := range r.ServerResults {
			if s.Server != "" && (s.Result == result.ResultOK || s.Result == result.ResultRevoked) {
				known = append(known, strings.TrimSuffix(s.Server, "/"))
			}
		}
	}
	c.mu.Unlock()
	for key, u := range used {
		if u.Until.IsZero() || !slices.ContainsFunc(known, func(server string) bool { return isAt(u.URL, server) }) {
			a.drop(key)
			continue
		}
		c.mu.Lock()
		if c.ends.IsZero() || u.Until.Before(c.ends) {
			c.ends = u.Until
		}
		c.mu.Unlock()
		a.keep(key, u)
	}
}

// isAt reports whether url is a server's, whose own has no slash at its end, or below it: http://ca.example.evil is not at http://ca.example.
func isAt(url, server string) bool {
	below, ok := strings.CutPrefix(url, server)
	return ok && (below == "" || below[0] == '/')
}

func untilOCSP(b []byte) time.Time {
	r, err := ocsp.ParseResponse(b, nil)
	if err != nil {
		return time.Time{}
	}
	return r.NextUpdate
}

func untilCRL(b []byte) time.Time {
	l, err := x509.ParseRevocationList(b)
	if err != nil {
		return time.Time{}
	}
	return l.NextUpdate
}

// keeper answers requests with what is kept, and else asks: once, however many ask the same at once.
type keeper struct {
	*answers
	until func([]byte) time.Time
}

type fetched struct {
	status int
	header http.Header
	answer answer
}

// RoundTrip is called by an http.Client.
func (k *keeper) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	var body []byte
	if r.Body != nil {
		var err error
		body, err = io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s\n%s", r.Method, r.URL, body))
	key := hex.EncodeToString(sum[:])
	got := fetched{http.StatusOK, http.Header{}, answer{}}
	var kept bool
	if got.answer, kept = k.kept(key); !kept {
		select {
		case res := <-k.flight.DoChan(key, func() (any, error) { return k.ask(r, body) }):
			if res.Err != nil {
				return nil, res.Err
			}
			got = res.Val.(fetched)
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	if c, ok := r.Context().Value(callKey{}).(*call); ok && got.status == http.StatusOK {
		c.use(key, got.answer)
	}
	return &http.Response{
		Status: http.StatusText(got.status), StatusCode: got.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: got.header,
		Body: io.NopCloser(bytes.NewReader(got.answer.Body)), ContentLength: int64(len(got.answer.Body)), Request: r,
	}, nil
}

// ask sends the request, for all who wait: it outlives the first of them.
func (k *keeper) ask(r *http.Request, body []byte) (fetched, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), crlTimeout)
	defer cancel()
	r = r.Clone(ctx)
	if r.Body = http.NoBody; len(body) > 0 {
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	transport := k.base.Transport
	if transport == nil {
		transport = http.DefaultTransport
	}
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return fetched{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fetched{}, err
	}
	got := fetched{resp.StatusCode, resp.Header, answer{URL: r.URL.String(), Body: b}}
	if got.answer.Until = k.until(b); got.answer.Until.After(time.Now().Add(maxKept)) {
		got.answer.Until = time.Now().Add(maxKept)
	}
	return got, nil
}

func (a *answers) kept(key string) (answer, bool) {
	a.mu.Lock()
	got, ok := a.memory[key]
	a.mu.Unlock()
	if !ok && a.dir != "" {
		b, err := os.ReadFile(filepath.Join(a.dir, key))
		ok = err == nil && json.Unmarshal(b, &got) == nil
	}
	return got, ok && time.Now().Before(got.Until)
}

func (a *answers) drop(key string) {
	a.mu.Lock()
	delete(a.memory, key)
	a.mu.Unlock()
	if a.dir != "" {
		os.Remove(filepath.Join(a.dir, key))
	}
}

// keep keeps an answer on disk, or in memory where there is none or it cannot be written. What a crash leaves of a file is no JSON, and no answer.
func (a *answers) keep(key string, u answer) {
	if a.dir != "" && a.write(key, u) == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	n := len(u.Body)
	for _, m := range a.memory {
		n += len(m.Body)
	}
	maps.DeleteFunc(a.memory, func(_ string, m answer) bool { return n > maxMemory || time.Now().After(m.Until) })
	a.memory[key] = u
}

func (a *answers) write(key string, u answer) error {
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return err
	}
	if old, ok := a.kept(key); ok && !old.Until.Before(u.Until) {
		return nil
	}
	b, err := json.Marshal(u)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(a.dir, "new-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(a.dir, key))
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	if all, err := os.ReadDir(a.dir); err == nil && len(all) > maxFiles {
		for _, e := range all {
			if i, err := e.Info(); err == nil && time.Since(i.ModTime()) > maxKept {
				os.Remove(filepath.Join(a.dir, e.Name()))
			}
		}
	}
	return nil
}
