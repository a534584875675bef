// Package kubeapi asks a Kubernetes API server for the little that a node's daemon wants of it: objects by name, the pods of a node, a new event.
//
// The principle: client-go gives the connection that a kubeconfig describes, certificates that are renewed and programs for tokens included, and not its client, which
// registers every type of Kubernetes: 17 MB of program and a MB of memory for four kinds of request. What is asked for is what the caller wants now: nothing is listed beyond the node, watched,
// kept or tried again. Errors show nothing of an answer but a status and its message.
package kubeapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

const (
	timeout    = 15 * time.Second
	maxAnswer  = 64 << 20 // bytes: a node has hundreds of pods, and a pod at most 1.5 MB
	maxStatus  = 64 << 10
	maxMessage = 200 // of a status, in an error
	maxName    = 253 // RFC 1123
)

// Client asks one API server. It is safe for concurrent use.
type Client struct {
	file string

	mu     sync.Mutex
	stamp  string // of file
	client *http.Client
	base   *url.URL
}

// New returns a Client with the connection of a kubeconfig, which is read at the first request and again when it changes; "" is the connection of the pod that this process
// runs in, with the token of its service account.
func New(kubeconfig string) *Client { return &Client{file: kubeconfig} }

// StatusError is an answer that is no success.
type StatusError struct {
	Code    int // of HTTP
	Message string
}

func (e *StatusError) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("API server: status %d: %s", e.Code, e.Message), ": ")
}

// connect returns the connection of the kubeconfig as it is now.
func (c *Client) connect() (*http.Client, *url.URL, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamp, read := "a pod's", rest.InClusterConfig // whose token client-go reads again
	if c.file != "" {
		fi, err := os.Stat(c.file)
		if err != nil {
			return nil, nil, err
		}
		stamp = fmt.Sprint(fi.Size(), fi.ModTime().UnixNano())
		read = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", c.file) }
	}
	if stamp == c.stamp {
		return c.client, c.base, nil
	}
	config, err := read()
	if err != nil {
		return nil, nil, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, nil, err
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	c.client, c.base, c.stamp = client, base, stamp
	return client, base, nil
}

func (c *Client) name() string {
	if c.file == "" {
		return "this pod's service account"
	}
	return "kubeconfig " + c.file
}

// Close closes idle connections.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
}

// Get gets an object or a list of the core group into v. path is below the group, "namespaces/default/secrets/regcred". An answer that is no success is a *StatusError.
func (c *Client) Get(ctx context.Context, path string, query map[string]string, v any) error {
	return c.do(ctx, http.MethodGet, path, query, "", nil, func(d *json.Decoder) error { return d.Decode(v) })
}

// Create makes an object of the core group out of v. path is that of its list, "namespaces/default/events".
func (c *Client) Create(ctx context.Context, path string, v any) error {
	return c.send(ctx, http.MethodPost, path, "application/json", v)
}

// Patch merges v into an object of the core group, by JSON merge patch: null removes.
func (c *Client) Patch(ctx context.Context, path string, v any) error {
	return c.send(ctx, http.MethodPatch, path, "application/merge-patch+json", v)
}

func (c *Client) send(ctx context.Context, method, path, contentType string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.do(ctx, method, path, nil, contentType, b, nil)
}

// IsName reports whether an object of the core group can have a name: it is a DNS subdomain. The API server does not look at some of the names that are written into objects, those of a pod's imagePullSecrets: one with
// dots and slashes would make of a path that of another's object.
func IsName(name string) bool {
	const alphanumeric = "abcdefghijklmnopqrstuvwxyz0123456789"
	return name != "" && len(name) <= maxName && strings.Trim(name, alphanumeric+"-.") == "" && strings.Trim(name, "-.") == name
}

// do sends a request, with body if there is one, and has the answer decoded unless decode is nil.
func (c *Client) do(ctx context.Context, method, path string, query map[string]string, contentType string, body []byte, decode func(*json.Decoder) error) error {
	for name := range strings.SplitSeq(path, "/") {
		if !IsName(name) {
			return fmt.Errorf("%q: no object has this path", plain.Cut(path, maxMessage))
		}
	}
	client, base, err := c.connect()
	if err != nil {
		return fmt.Errorf("%s: %w", c.name(), err)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	u := base.JoinPath("api/v1", path)
	q := url.Values{}
	for key, value := range query {
		q.Set(key, value)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := client.Do(req)
	var failed *url.Error
	if errors.As(err, &failed) {
		err = failed.Err // without the whole URL
	}
	if err != nil {
		return c.unanswered(base, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		var status struct{ Message string }
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxStatus)) // an error in an error adds nothing
		_ = json.Unmarshal(b, &status)
		return &StatusError{resp.StatusCode, plain.Cut(status.Message, maxMessage)}
	}
	if decode == nil {
		return nil
	}
	err = decode(json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)))
	switch {
	case err == nil || errors.Is(err, errTooMany):
		return err
	case ctx.Err() != nil:
		return c.unanswered(base, ctx.Err())
	}
	return errors.New("the API server's answer is no JSON") // and may show a secret
}

// unanswered names who has not answered, and what says who that is.
func (c *Client) unanswered(base *url.URL, err error) error {
	return fmt.Errorf("API server %s of %s: %w", base.Host, c.name(), err)
}
