// Package report tells the conversion service how long the starts of streamed images took, for its console.
//
// The principle: a report is a courtesy. Add never waits; what is told goes out some seconds later, a request at a time, and is left out when there is too much of it or the
// service is away for long. It names images and their artifacts, and this node by a random number; no host, no pod and no secret is in it.
package report

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	mathrand "math/rand/v2"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const (
	maxWaiting = 256              // starts; the oldest make way
	maxAge     = time.Hour        // of a start that could not be told
	collect    = 10 * time.Second // at most, from the first start until it is told, so that several go in one request, and nodes not all at once
	firstPause = 30 * time.Second // of a registry after a failure, twice as long each time
	lastPause  = 15 * time.Minute
	timeout    = 30 * time.Second // of a request
	maxAnswer  = 64 << 10         // bytes
	maxText    = 200              // of an answer, in an error
)

// Options of a Reporter.
type Options struct {
	Server    string      // URL of the service
	TokenFile string      // with the bearer token for it, read for each request; "" is none
	CAFile    string      // PEM certificates that are trusted for it beside the system's, likewise
	IDFile    string      // where this node's random number is kept
	Agent     string      // User-Agent
	OnError   func(error) // told when reports begin to fail, and with nil when they work again; it must not block
}

// CheckServer says what is wrong with the URL of a service. A token goes over TLS or to this machine alone.
func CheckServer(server string, token bool) error {
	u, err := url.Parse(server)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%q: want the URL of a conversion service, as in \"https://streaming.example.com\"", server)
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if local := err == nil && ip.IsLoopback() || u.Hostname() == "localhost"; token && u.Scheme == "http" && !local {
		return fmt.Errorf("%q: a token could be read on the way: want https", server)
	}
	return nil
}

// Status is how reports do.
type Status struct {
	Server  string `json:"server"`
	Waiting int    `json:"waiting"` // starts that are to be told
	Told    int64  `json:"told"`    // since the daemon's start
	Dropped int64  `json:"dropped"` // that were refused, or could not be told for long
	Error   string `json:"error,omitempty"`
}

// waiting is a start to be told.
type waiting struct {
	repo  registryclient.Repository
	start starts.Start
	since time.Time
}

// Reporter tells of starts. Its methods may be called from any goroutine; on nil they do nothing.
type Reporter struct {
	o       Options
	node    string
	collect time.Duration
	pause   time.Duration
	wake    chan struct{}

	mu     sync.Mutex
	queue  []waiting
	status Status
}

// New returns a Reporter. It asks no network: Run does.
func New(o Options) (*Reporter, error) {
	if err := CheckServer(o.Server, o.TokenFile != ""); err != nil {
		return nil, err
	}
	id, err := nodeID(o.IDFile)
	if err != nil {
		return nil, fmt.Errorf("number of this node for reports: %w", err)
	}
	return &Reporter{o: o, node: id, collect: collect, pause: firstPause, wake: make(chan struct{}, 1), status: Status{Server: o.Server}}, nil
}

var idPattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[0-9a-f]{32}$`) })

// nodeID reads the number in a file, and makes one if there is none.
func nodeID(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err == nil && idPattern().Match(b) {
		return string(b), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	raw := make([]byte, 16)
	rand.Read(raw) // never fails
	id := hex.EncodeToString(raw)
	return id, os.WriteFile(file, []byte(id), 0o600)
}

// Add has a start told of. It returns at once.
func (r *Reporter) Add(repo registryclient.Repository, st starts.Start) {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.queue = append(r.queue, waiting{repo, st, time.Now()})
	if over := len(r.queue) - maxWaiting; over > 0 {
		r.drop(over)
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// drop takes the first n starts out. The caller holds mu.
func (r *Reporter) drop(n int) {
	r.queue = slices.Delete(r.queue, 0, n)
	r.status.Dropped += int64(n)
}

// Status returns how reports do, nil of nil.
func (r *Reporter) Status() *Status {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	st := r.status
	st.Waiting = len(r.queue)
	return &st
}

// away is a registry whose starts could not be told.
type away struct {
	until time.Time
	pause time.Duration
	err   error
}

// Run tells until ctx ends. What is not told then is lost. The service asks a registry before it takes what is told of its images: one that does not answer is in no
// other's way.
func (r *Reporter) Run(ctx context.Context) {
	failed := map[string]away{} // by registry
	for ctx.Err() == nil {
		batch, wait := r.next(failed)
		if len(batch) == 0 {
			if r.wait(ctx, wait) {
				sleep(ctx, r.collect/5+mathrand.N(r.collect*4/5))
			}
			continue
		}
		taken, err := r.send(ctx, batch)
		host := batch[0].host()
		if err == nil || taken > 0 || errors.Is(err, errRefused) {
			delete(failed, host)
		} else {
			pause := min(max(r.pause, 2*failed[host].pause), lastPause)
			failed[host] = away{time.Now().Add(pause + mathrand.N(pause/4)), pause, err}
		}
		r.done(ctx, batch, taken, err, failed)
	}
}

// wait waits for something new to tell, which it says, or for d, for ever if that is 0.
func (r *Reporter) wait(ctx context.Context, d time.Duration) (news bool) {
	var due <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		due = t.C
	}
	select {
	case <-r.wake:
		return true
	case <-due:
	case <-ctx.Done():
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// host is that of the start's registry.
func (w waiting) host() string {
	host, _, _ := strings.Cut(string(w.repo), "/")
	return host
}

// next returns the starts of the repository of the first one that is not too old, and whose registry is not to be left alone, those of one image side by side.
// Without any, it says how long until one is to be tried again; 0 is that nothing waits.
func (r *Reporter) next(failed map[string]away) (batch []waiting, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := 0
	for old < len(r.queue) && time.Since(r.queue[old].since) > maxAge {
		old++
	}
	r.drop(old)
	maps.DeleteFunc(failed, func(host string, _ away) bool {
		return !slices.ContainsFunc(r.queue, func(w waiting) bool { return w.host() == host })
	})
	for _, w := range r.queue {
		switch d := time.Until(failed[w.host()].until); {
		case d > 0 && (wait == 0 || d < wait):
			wait = d
		case d > 0:
		case (len(batch) == 0 || w.repo == batch[0].repo) && len(batch) < starts.MaxStarts:
			batch = append(batch, w)
		}
	}
	slices.SortStableFunc(batch, func(a, b waiting) int { return strings.Compare(string(a.start.Manifest), string(b.start.Manifest)) })
	return batch, wait
}

// errRefused is an answer that will be the same the next time.
var errRefused = errors.New("refused")

// done takes what need not be told again out of the queue, and says when reports begin to fail and when all work again.
func (r *Reporter) done(ctx context.Context, batch []waiting, taken int, err error, failed map[string]away) {
	refused := errors.Is(err, errRefused)
	gone := batch[:taken]
	if refused {
		gone = batch
	}
	r.mu.Lock()
	r.queue = slices.DeleteFunc(r.queue, func(w waiting) bool { return slices.Contains(gone, w) })
	if refused {
		r.status.Dropped += int64(len(gone))
	} else {
		r.status.Told += int64(len(gone))
	}
	for _, a := range failed {
		err = cmp.Or(err, a.err)
	}
	before := r.status.Error != ""
	r.status.Error = ""
	if err != nil {
		r.status.Error = err.Error()
	}
	r.mu.Unlock()
	if ctx.Err() == nil && before != (err != nil) {
		r.o.OnError(err)
	}
}

// send tells of starts of one repository, and returns how many of them the service has taken.
func (r *Reporter) send(ctx context.Context, batch []waiting) (taken int, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body := starts.Report{Node: r.node}
	for _, w := range batch {
		body.Starts = append(body.Starts, w.start)
	}
	req, err := r.request(ctx, batch[0].repo, body)
	if err != nil {
		return 0, err
	}
	client, err := r.client()
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return 0, fmt.Errorf("answer of %s: %w", r.o.Server, err)
	}
	if resp.StatusCode != http.StatusOK {
		return 0, answerError(req.URL, resp.StatusCode, b)
	}
	var answer struct{ Taken int }
	if err := json.Unmarshal(b, &answer); err != nil || answer.Taken < 1 || answer.Taken > len(batch) {
		return 0, fmt.Errorf("%s does not answer as a conversion service does: %s", req.URL, plain.Cut(string(b), maxText))
	}
	return answer.Taken, nil
}

func (r *Reporter) request(ctx context.Context, repo registryclient.Repository, body starts.Report) (*http.Request, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	host, name, _ := strings.Cut(string(repo), "/")
	u, err := url.Parse(r.o.Server)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.JoinPath("v1/registries", host, "repositories", name, "_starts").String(), bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", r.o.Agent)
	if r.o.TokenFile != "" {
		token, err := os.ReadFile(r.o.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	return req, nil
}

// client is one for a request: hours lie between two, in which files are renewed, and a connection would be kept for nothing.
func (r *Reporter) client() (*http.Client, error) {
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: false}
	if r.o.CAFile != "" {
		pem, err := os.ReadFile(r.o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("certificates of the system: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in PEM", r.o.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

// answerError makes an error of an answer that is no success.
func answerError(u *url.URL, status int, body []byte) error {
	var e struct{ Errors []struct{ Message string } }
	text := http.StatusText(status)
	if json.Unmarshal(body, &e) == nil && len(e.Errors) > 0 {
		text = e.Errors[0].Message
	}
	err := fmt.Errorf("%s: status %d: %s", u, status, plain.Cut(text, maxText))
	switch status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType:
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}
