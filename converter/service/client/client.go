// Package client is the conversion service's API as Go calls: what streamctl --server uses. Its methods have the signatures of
// *service.Service, so that a program has one interface for the service in another process and in its own.
//
// The principle: an error from afar is the error that the service returned, as far as errors.Is tells (see Error); what is not known is
// said to be unknown. Only what changes nothing is tried again, and of that only Follow, which outlives the server.
//
// What it does not do: it has no credentials of registries (those stay with the server), and it does not find out where the server is.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// Config says where the server is, and how it is asked.
type Config struct {
	Server   string                 // "https://streaming.example.com:8443"; a path is kept: "https://example.com/streaming"
	Token    func() (string, error) // bearer token, asked for each request because files rotate; nil or "": none. Sent over TLS or to loopback alone.
	CAFile   string                 // PEM certificates that are trusted beside the system's; "": none
	Agent    string                 // User-Agent
	Timeout  time.Duration          // of a request, Verify and Follow apart; 0 is 2 minutes
	Patience time.Duration          // how long Follow waits for a server that does not answer; 0 is 5 minutes
}

const (
	defaultTimeout  = 2 * time.Minute // the server gives up before
	defaultPatience = 5 * time.Minute
	maxAnswer       = 64 << 20 // bytes: a thousand operations, or the map of an image with a hundred layers
	maxError        = 64 << 10 // bytes
)

// Client asks a server. Its methods may be called concurrently.
type Client struct {
	config Config
	base   *url.URL
	clear  bool // what is sent can be read on the way
	http   *http.Client
}

// New returns a client, or what is wrong with its configuration. Nothing is connected to yet. Proxies are those of HTTPS_PROXY,
// HTTP_PROXY and NO_PROXY.
func New(c Config) (*Client, error) {
	base, err := url.Parse(c.Server)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("server %q: want https://HOST[:PORT][/PATH]", c.Server)
	}
	base.Path = strings.TrimSuffix(base.Path, "/")
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.Patience == 0 {
		c.Patience = defaultPatience
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("certificates of the server: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("certificates of the system: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificates of the server: %s has none in PEM", c.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	ip, err := netip.ParseAddr(base.Hostname())
	loopback := err == nil && ip.IsLoopback() || base.Hostname() == "localhost"
	return &Client{
		config: c, base: base, clear: base.Scheme == "http" && !loopback,
		http: &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}, nil
}

// request is one to be sent.
type request struct {
	method string
	path   []string // its elements; a repository is one of them
	query  url.Values
	body   any // nil: none
	accept string
}

// send sends q, and returns what is answered with a status below 300. The caller closes its body.
func (c *Client) send(ctx context.Context, q request) (*http.Response, error) {
	u := *c.base
	for _, element := range q.path {
		if element == "" {
			return nil, fmt.Errorf("%w: a name is missing after %s", service.ErrInvalid, u.Path)
		}
		var escaped []string
		for part := range strings.SplitSeq(element, "/") {
			escaped = append(escaped, url.PathEscape(part))
		}
		u.RawPath = u.EscapedPath() + "/" + strings.Join(escaped, "/")
		u.Path += "/" + element
	}
	u.RawQuery = q.query.Encode()
	var body io.Reader
	if q.body != nil {
		raw, err := json.Marshal(q.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(raw)
	}
	r, err := http.NewRequestWithContext(ctx, q.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if q.body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Accept", q.accept)
	if c.config.Agent != "" {
		r.Header.Set("User-Agent", c.config.Agent)
	}
	if c.config.Token != nil {
		token, err := c.config.Token()
		switch {
		case err != nil:
			return nil, fmt.Errorf("token for %s: %w", c.base, err)
		case token != "" && c.clear:
			return nil, fmt.Errorf("the token is not sent to %s, where it could be read on the way: use https", c.base)
		case token != "":
			r.Header.Set("Authorization", "Bearer "+token)
		}
	}
	answer, err := c.http.Do(r)
	if err != nil {
		return nil, unreachable(ctx, err)
	}
	kind, _, _ := mime.ParseMediaType(answer.Header.Get("Content-Type"))
	if answer.StatusCode >= 300 || kind != q.accept {
		defer answer.Body.Close()
		return nil, errorOf(answer)
	}
	return answer, nil
}

// unreachable classifies an error of the transport.
func unreachable(ctx context.Context, err error) error {
	var certificate *tls.CertificateVerificationError
	if ctx.Err() != nil || errors.As(err, &certificate) {
		return err // who asks has given up; or it will not become better by asking again
	}
	return fmt.Errorf("%w: %w", service.ErrUnavailable, err)
}

// ask sends q and reads the answer into v. It returns the answer's status, which is 200 or 202.
func (c *Client) ask(ctx context.Context, q request, v any) (int, error) {
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	q.accept = "application/json"
	answer, err := c.send(limited, q)
	if err == nil {
		defer answer.Body.Close()
		err = json.NewDecoder(io.LimitReader(answer.Body, maxAnswer)).Decode(v)
	}
	switch {
	case err == nil:
		return answer.StatusCode, nil
	case limited.Err() != nil && ctx.Err() == nil:
		return 0, fmt.Errorf("%w: %s did not answer within %s", service.ErrUnavailable, c.base, c.config.Timeout)
	case answer == nil:
		return 0, err
	}
	return 0, fmt.Errorf("%w: the answer of %s: %w", service.ErrUnavailable, c.base, err)
}
