package registryclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func ofTokens(q registrytest.Request) bool { return q.Path == "/token" }

// authFixture is a registry with one blob.
func authFixture(t *testing.T) (r *registrytest.Registry, read func(*Client) error) {
	r = registrytest.Start(t, registrytest.Options{})
	data := noise(1000)
	blob := r.PutBlob("team/app", data)
	return r, func(c *Client) error {
		b, err := readRange(t.Context(), c, repoOf(r), blob, 10, 20, 0)
		if err == nil && !bytes.Equal(b, data[10:30]) {
			return errors.New("wrong bytes")
		}
		return err
	}
}

// getBlob gets the blob of authFixture as a pull gets one, which is told at once that it may not.
func getBlob(t *testing.T, c *Client, r *registrytest.Registry) error {
	_, err := c.Blob(t.Context(), repoOf(r), digest.FromBytes(noise(1000)), 1000)
	return err
}

func TestAuthentication(t *testing.T) {
	user := registrytest.TokenOptions{User: "u", Password: "hush"}
	old := user
	old.NoPost = true
	silent := user
	silent.HideLifetime = true
	for name, tc := range map[string]struct {
		basic        bool
		token        registrytest.TokenOptions
		user, secret string
		requests     int // of the first read; 0 is refused
		tokens       int
	}{
		"basic":              {basic: true, user: "u", secret: "hush", requests: 2},
		"basic, wrong":       {basic: true, user: "u", secret: "hushh"},
		"basic, anonymous":   {basic: true},
		"token, anonymous":   {requests: 3, tokens: 1},
		"token, user":        {token: user, user: "u", secret: "hush", requests: 3, tokens: 1},
		"token, GET only":    {token: old, user: "u", secret: "hush", requests: 4, tokens: 2},
		"token, silent":      {token: silent, user: "u", secret: "hush", requests: 3, tokens: 1},
		"token, wrong":       {token: user, user: "u", secret: "hushh"},
		"token, none":        {token: user},
		"identity token":     {token: registrytest.TokenOptions{Identity: "hush"}, secret: "hush", requests: 3, tokens: 1},
		"identity, wrong":    {token: registrytest.TokenOptions{Identity: "hush"}, secret: "hushh"},
		"user for anonymous": {user: "u", secret: "hush", requests: 3, tokens: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, read := authFixture(t)
			if tc.basic {
				r.RequireBasic("u", "hush")
			} else {
				r.RequireToken(tc.token)
			}
			c := newClient(t, Options{Credentials: fixed(tc.user, tc.secret)})
			if tc.requests == 0 {
				start := time.Now()
				_, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1")
				if err == nil || errors.Is(err, ErrNotFound) || strings.Contains(err.Error(), "hush") {
					t.Errorf("got %v", err)
				}
				if d := time.Since(start); d > time.Second {
					t.Errorf("refused only after %v", d)
				}
				return
			}
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			wantRequests(t, r, tc.requests)
			if n, _ := r.Count(ofTokens); n != tc.tokens {
				t.Errorf("got %d token requests, want %d", n, tc.tokens)
			}
			r.Reset()
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			wantRequests(t, r, 1) // and from then on

			if tc.basic {
				return
			}
			r.ExpireTokens()
			r.Reset()
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			wantRequests(t, r, tc.requests)
		})
	}
}

// A token whose life is over is not tried, nor is the registry asked for its challenge again.
func TestTokenLifetime(t *testing.T) {
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{Lifetime: time.Second})
	c := newClient(t, Options{})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	g := c.registries[r.Host()].hosts[0].auth.grants["team/app"]
	if left := time.Until(g.expires); left > time.Second || left < 0 {
		t.Fatalf("a token of one second is held for %v", left)
	}
	g.expires = time.Now().Add(-time.Millisecond)
	r.Reset()
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	wantRequests(t, r, 2) // token, blob
}

// A range that is being read when the token dies goes on with a new one.
func TestTokenExpiresMidway(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	r.RequireToken(registrytest.TokenOptions{})
	data := noise(1000)
	blob := r.PutBlob("team/app", data)
	c := newClient(t, Options{})
	r.Inject(registrytest.Blobs, 1, registrytest.Status(401, "WWW-Authenticate", fmt.Sprintf("Bearer realm=%q", r.URL()+"/token")))
	r.Inject(registrytest.Blobs, 1, registrytest.Reset(100))
	rc, err := c.ReadRange(t.Context(), repoOf(r), blob, 0, 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	r.ExpireTokens()
	got := new(bytes.Buffer)
	if _, err := got.ReadFrom(rc); err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("got %d bytes, %v", got.Len(), err)
	}
}

// Many readers that need a token at once fetch one.
func TestTokenFetchedOnce(t *testing.T) {
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{})
	c := newClient(t, Options{Budget: 20 * time.Second, Stall: 10 * time.Second})
	r.Inject(registrytest.Tokens, -1, registrytest.Delay(100*time.Millisecond))
	for range 2 {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := read(c); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n, _ := r.Count(ofTokens); n != 1 {
			t.Errorf("got %d token requests, want 1", n)
		}
		r.Reset()
		r.ExpireTokens()
	}
}

// A token server that fails is asked again, and one caller's giving up is not another's failure.
func TestTokenServerFails(t *testing.T) {
	t.Parallel()
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{})
	r.Inject(registrytest.Tokens, 2, registrytest.Status(503))
	r.Inject(registrytest.Tokens, 1, registrytest.Answer("application/json", "{}"))
	if err := read(newClient(t, Options{})); err != nil {
		t.Error(err)
	}

	c := newClient(t, Options{Budget: time.Minute, Stall: time.Minute})
	entered := make(chan struct{})
	r.Inject(func(req *http.Request) bool {
		if !registrytest.Tokens(req) {
			return false
		}
		close(entered)
		return true
	}, 1, registrytest.Stall(-1))
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := c.Blob(ctx, repoOf(r), digest.FromString("x"), 1)
		first <- err
	}()
	<-entered
	go func() { second <- read(c) }()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the one who left got %v", err)
	}
	select {
	case err := <-second:
		if err != nil {
			t.Errorf("the one who stayed got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the one who stayed waits for ever")
	}
}

// Credentials are asked for whenever a token is, because they change.
func TestCredentialsChange(t *testing.T) {
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "one"})
	var secret atomic.Value
	secret.Store("one")
	c := newClient(t, Options{Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] {
		if p.Image != repoOf(r) || len(p.Names) != 1 || p.Names[0] != p.Image {
			t.Errorf("asked for credentials of %v", p)
		}
		return fixed("u", secret.Load().(string))(ctx, p)
	}})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "two"})
	secret.Store("two")
	if err := read(c); err != nil {
		t.Fatal(err)
	}
}

// ECR's passwords live for twelve hours, and then the answer is 403.
func TestPasswordRunsOut(t *testing.T) {
	r, read := authFixture(t)
	r.RequireBasic("u", "one")
	secret := "one"
	c := newClient(t, Options{Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] { return fixed("u", secret)(ctx, p) }})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	r.RequireBasic("u", "two")
	r.Reset()
	r.Inject(registrytest.Any, 2, registrytest.Status(403))
	var status *StatusError
	if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1"); !errors.As(err, &status) || status.StatusCode != 403 { // a read would wait
		t.Errorf("got %v while the credentials are the old ones, want 403", err)
	}
	wantRequests(t, r, 1) // the same password again would not help
	secret = "two"
	endPause(t, c)
	if err := read(c); err != nil {
		t.Error(err)
	}
	wantRequests(t, r, 3)
}

// Some registries answer 403 to a token that has run out. Another one is got, and again when that has lived for a while; the other credentials are tried if it does
// not help. A 403 that stays is about something else, and costs nothing for a while then.
func TestTokenForbidden(t *testing.T) {
	r, _ := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
	c := newClient(t, Options{Budget: time.Minute, Stall: time.Minute, Credentials: offer(Credential{"right", "u", "hush"}, Credential{"other", "o", "no"})})
	if err := getBlob(t, c, r); err != nil {
		t.Fatal(err)
	}
	age := func() {
		g := c.registries[r.Host()].hosts[0].auth.grants["team/app"]
		g.renewed = g.renewed.Add(-renewAgain)
	}
	for range 3 { // the second time of the token that was got for the first
		r.Reset()
		r.Inject(registrytest.Blobs, 1, registrytest.Status(403))
		if err := getBlob(t, c, r); err != nil {
			t.Fatal(err)
		}
		wantRequests(t, r, 3) // blob, token, blob
		age()
	}
	end := r.Inject(registrytest.Blobs, -1, registrytest.Status(403))
	for _, n := range []int{3 + 3, 1} { // POST and GET for the other one, GET for nobody
		r.Reset()
		var status *StatusError
		if err := getBlob(t, c, r); !errors.As(err, &status) || status.StatusCode != 403 || !errors.Is(err, ErrDenied) {
			t.Errorf("got %v", err)
		}
		wantRequests(t, r, n)
	}
	end()
	r.Reset()
	if err := getBlob(t, c, r); err != nil {
		t.Error(err)
	}
	wantRequests(t, r, 1)
	wantAccepted(t, c, "right")
}

// When the rights of the account that served have gone, which a registry says with 403 to a new token as well, another account serves.
func TestRightsGone(t *testing.T) {
	r, _ := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "one", Refusal: 403})
	c := newClient(t, Options{Budget: time.Minute, Stall: time.Minute, Credentials: offer(Credential{"first", "u", "one"}, Credential{"second", "u", "two"})})
	if err := getBlob(t, c, r); err != nil {
		t.Fatal(err)
	}
	wantAccepted(t, c, "first")
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "two", Refusal: 403})
	r.Inject(registrytest.Blobs, 1, registrytest.Status(403)) // to the token that is not known any more
	if err := getBlob(t, c, r); err != nil {
		t.Fatal(err)
	}
	wantAccepted(t, c, "second")
}

func TestNoSecretsToPlainTokenServers(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{TLS: true})
	plain := registrytest.Start(t, registrytest.Options{})
	plain.RequireToken(registrytest.TokenOptions{})
	blob := r.PutBlob("team/app", []byte("x"))
	r.Inject(registrytest.Blobs, -1, registrytest.Status(401, "WWW-Authenticate", fmt.Sprintf("Bearer realm=%q", plain.URL()+"/token")))
	c := newClient(t, Options{HostsDir: hostsDir(t, r.Host(), serverTOML(t, r, "")), Credentials: fixed("u", "hush")})
	if _, err := c.Blob(t.Context(), repoOf(r), blob, 1); err == nil || strings.Contains(err.Error(), "hush") {
		t.Errorf("got %v", err)
	}
	wantRequests(t, plain, 0)

	// Nor elsewhere, if the token server says so.
	front := registrytest.Start(t, registrytest.Options{})
	front.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
	front.Inject(registrytest.Tokens, -1, registrytest.Status(307, "Location", plain.URL()+"/token"))
	c = newClient(t, Options{Credentials: fixed("u", "hush"), Budget: 300 * time.Millisecond})
	if _, err := c.Blob(t.Context(), repoOf(front), blob, 1); err == nil {
		t.Error("a token server that redirects elsewhere was followed")
	}
	wantRequests(t, plain, 0)
}
