package registryclient

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

func wantAccepted(t *testing.T, c *Client, sources ...string) {
	t.Helper()
	if hosts := c.Hosts(); len(hosts) != 1 || !slices.Equal(hosts[0].Accepted, sources) {
		t.Errorf("got %+v, want %v to be accepted", hosts, sources)
	}
}

// What an earlier source has, and is wrong, does not hinder a later one, wherever the refusal comes: at the token server, or at the registry, with any status.
func TestSecondCredential(t *testing.T) {
	wrong, right, identity := Credential{"wrong", "u", "no"}, Credential{"right", "u", "hush"}, Credential{"identity", "", "no"}
	token := func(refusal int) func(*registrytest.Registry) {
		return func(r *registrytest.Registry) {
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush", Refusal: refusal})
		}
	}
	for name, tc := range map[string]struct {
		require  func(*registrytest.Registry)
		requests int // of the first read
		renewal  int // requests of the first read after the tokens are dead
	}{
		"basic":     {func(r *registrytest.Registry) { r.RequireBasic("u", "hush") }, 3, 1}, // there is no Basic header to make of an identity token
		"token":     {token(0), 1 + 1 + 2 + 1 + 1, 3},                                       // blob, POST, POST and GET, POST, blob
		"token 401": {token(401), 1 + 3*2, 3},
		"token 403": {token(403), 1 + 3*2, 3},
		"token 404": {token(404), 1 + 3*2, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, read := authFixture(t)
			tc.require(r)
			// A source that has several is asked for all of them.
			same := right
			same.Source = wrong.Source
			for _, list := range [][]Credential{{identity, wrong, right}, {identity, wrong, same}} {
				r.Reset()
				c := newClient(t, Options{Credentials: offer(list...)})
				if err := read(c); err != nil {
					t.Fatal(err)
				}
				wantRequests(t, r, tc.requests)
				wantAccepted(t, c, list[2].Source)
				r.ExpireTokens()
				r.Reset()
				if err := read(c); err != nil {
					t.Fatal(err)
				}
				wantRequests(t, r, tc.renewal)
			}
		})
	}
}

// A source that has no end of wrong credentials is left for the next.
func TestManyWrongCredentials(t *testing.T) {
	r, read := authFixture(t)
	r.RequireBasic("u", "hush")
	var list []Credential
	for i := range 40 {
		list = append(list, Credential{"many", "u", fmt.Sprint("wrong ", i)})
	}
	if err := read(newClient(t, Options{Credentials: offer(append(list, Credential{"right", "u", "hush"})...)})); err != nil {
		t.Error(err)
	}
	wantRequests(t, r, 1+maxOffers+1)
}

// They have their turn later: the first ones come after those that were not tried yet.
func TestManyWrongCredentialsInTurn(t *testing.T) {
	for name, require := range map[string]func(*registrytest.Registry){
		"basic": func(r *registrytest.Registry) { r.RequireBasic("u", "hush") },
		"token": func(r *registrytest.Registry) { r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"}) },
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := authFixture(t)
			require(r)
			var list []Credential
			for i := range 40 {
				list = append(list, Credential{"many", "u", fmt.Sprint("wrong ", i)})
			}
			list = append(list, Credential{"many", "u", "hush"})
			c := newClient(t, Options{Budget: time.Minute, Stall: time.Minute, Credentials: offer(list...)})
			for range 2 {
				if err := getBlob(t, c, r); !errors.Is(err, ErrDenied) {
					t.Fatalf("got %v", err)
				}
			}
			if err := getBlob(t, c, r); err != nil {
				t.Error(err)
			}
			list[40], list[0] = list[0], list[40] // and all again
			r.ExpireTokens()
			if err := getBlob(t, c, r); err != nil {
				t.Error(err)
			}
		})
	}
}

// What was forgotten is not sent any more.
func TestForget(t *testing.T) {
	for name, require := range map[string]func(*registrytest.Registry){
		"basic": func(r *registrytest.Registry) { r.RequireBasic("u", "hush") },
		"token": func(r *registrytest.Registry) { r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"}) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, read := authFixture(t)
			require(r)
			list := []Credential{{"source", "u", "hush"}}
			c := newClient(t, Options{Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] { return offer(list...)(ctx, p) }})
			c.Forget(repoOf(r)) // of which nothing is known yet
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			list = nil
			c.Forget(repoOf(r) + "/other")
			c.Forget("no repository")
			if err := read(c); err != nil {
				t.Error(err)
			}
			r.Reset()
			c.Forget(repoOf(r))
			if err := read(c); err == nil {
				t.Error("let in with what was forgotten")
			}
			for _, q := range r.Requests() {
				if q.Authorization != "" {
					t.Errorf("sent %q", q.Authorization)
				}
			}
			wantAccepted(t, c)
		})
	}
}

// A bad credential does not break what everybody may read.
func TestBadCredentialOfPublicImage(t *testing.T) {
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{})
	r.Inject(func(req *http.Request) bool {
		_, _, named := req.BasicAuth()
		return registrytest.Tokens(req) && (named || req.Method == http.MethodPost)
	}, -1, registrytest.Status(401))
	c := newClient(t, Options{Credentials: fixed("u", "no")})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	wantAccepted(t, c, "anonymous")
}

// When the credential that served stops being accepted, the next one serves, also in the middle of a client's life.
func TestCredentialStops(t *testing.T) {
	for name, refusal := range map[string]int{"token server": 0, "401": 401, "403": 403} {
		t.Run(name, func(t *testing.T) {
			r, read := authFixture(t)
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: "one", Refusal: refusal})
			c := newClient(t, Options{Credentials: offer(Credential{"first", "u", "one"}, Credential{"second", "u", "two"})})
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			wantAccepted(t, c, "first")
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: "two", Refusal: refusal})
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			wantAccepted(t, c, "second")
		})
	}
}

// What a registry answers to a token, once it has one, is what counts: a failure that passes is tried again, and one that does not is told.
func TestAnswerToToken(t *testing.T) {
	t.Parallel()
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
	with := func(status int) func() {
		return r.Inject(func(req *http.Request) bool { return registrytest.Blobs(req) && req.Header.Get("Authorization") != "" }, 1, registrytest.Status(status))
	}
	with(503)
	if err := read(newClient(t, Options{Credentials: fixed("u", "hush")})); err != nil {
		t.Error(err)
	}
	defer with(451)()
	var status *StatusError
	if err := read(newClient(t, Options{Credentials: fixed("u", "hush")})); !errors.As(err, &status) || status.StatusCode != 451 || errors.Is(err, ErrDenied) {
		t.Errorf("got %v", err)
	}
}

// What is not there costs no more than it did: the sources have nothing else to offer, and nobody is anonymous who has an account. It stays "not found"
// where others are refused.
func TestNotFoundWithCredentials(t *testing.T) {
	right, wrong := Credential{"right", "u", "hush"}, Credential{"wrong", "u", "no"}
	for name, tc := range map[string]struct {
		offer  []Credential
		counts [2]int
	}{
		"one":  {[]Credential{right}, [2]int{3, 1}},
		"two":  {[]Credential{right, wrong}, [2]int{5, 1}}, // POST and GET for the second, once
		"both": {[]Credential{wrong, right}, [2]int{5, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			r, read := authFixture(t)
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
			c := newClient(t, Options{Credentials: offer(tc.offer...)})
			for _, n := range tc.counts {
				r.Reset()
				if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":missing"); !errors.Is(err, ErrNotFound) || errors.Is(err, ErrDenied) {
					t.Errorf("got %v", err)
				}
				wantRequests(t, r, n)
			}
			r.Reset()
			if err := read(c); err != nil {
				t.Error(err)
			}
			wantRequests(t, r, 1)
			wantAccepted(t, c, "right")
		})
	}
}

// A source that fails does not hinder the others, and is told when they are of no use either.
func TestSourceFails(t *testing.T) {
	r, read := authFixture(t)
	r.RequireBasic("u", "hush")
	right := Credential{"right", "u", "hush"}
	c := newClient(t, Options{Credentials: func(context.Context, Place) iter.Seq2[Credential, error] {
		return func(yield func(Credential, error) bool) {
			_ = yield(Credential{}, errors.New("helper: no such file")) && yield(right, nil)
		}
	}})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	r.RequireBasic("u", "other")
	err := read(c)
	var status *StatusError
	if !errors.As(err, &status) || status.StatusCode != 401 {
		t.Errorf("got %v, want the registry's 401", err)
	}
	for _, s := range []string{"helper: no such file", "right: status 401"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("got %v, want %q in it", err, s)
		}
	}
}

// A source that fails when a token has to be renewed is no end of reads: they wait for it as for a registry that is away, and nobody else does.
func TestSourceFailsForAWhile(t *testing.T) {
	r, read := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "hush"})
	var fails atomic.Int32
	c := newClient(t, Options{Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] {
		if fails.Add(-1) < 0 {
			return fixed("u", "hush")(ctx, p)
		}
		return func(yield func(Credential, error) bool) { yield(Credential{}, errors.New("out of luck")) }
	}})
	for range 2 { // the second time with a token that has run out, the first without any
		fails.Store(2)
		if err := read(c); err != nil {
			t.Fatal(err)
		}
		if h := c.Hosts()[0]; h.Away {
			t.Errorf("got %+v: it is not the host that fails", h)
		}
		c.registries[r.Host()].hosts[0].auth.grants["team/app"].expires = time.Now().Add(-time.Millisecond)
	}
	fails.Store(2)
	if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1"); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "out of luck") {
		t.Errorf("got %v", err)
	}
	if fails.Load() != 1 {
		t.Errorf("a pull has asked more than once")
	}
}

// A password that is changed at the registry before it is where a source has it from costs a read some time, and no error. A pull is told at once.
func TestReadsWaitForCredentials(t *testing.T) {
	for name, require := range map[string]func(*registrytest.Registry, string){
		"basic": func(r *registrytest.Registry, password string) { r.RequireBasic("u", password) },
		"token": func(r *registrytest.Registry, password string) {
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: password})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, read := authFixture(t)
			var asked atomic.Int32
			late := int32(0)
			c := newClient(t, Options{Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] {
				if asked.Add(1) > late {
					return fixed("u", "new")(ctx, p)
				}
				return fixed("u", "old")(ctx, p)
			}})
			require(r, "old")
			late = 1
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			require(r, "new")
			asked.Store(0)
			late = 2
			if err := read(c); err != nil {
				t.Errorf("a read: %v", err)
			}
			require(r, "newer")
			asked.Store(0)
			if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1"); !errors.Is(err, ErrDenied) {
				t.Errorf("a pull: %v", err)
			}
			if n := asked.Load(); n > 2 {
				t.Errorf("a pull has asked the sources %d times", n)
			}
		})
	}
}

// endPause has reads ask again that were denied a moment ago.
func endPause(t *testing.T, c *Client) {
	t.Helper()
	for _, r := range c.registries {
		for _, h := range r.hosts {
			for _, d := range h.auth.denials {
				if left := time.Until(d.until); left <= 0 || left > deniedPause(d.n) {
					t.Errorf("reads are denied for %v more, after %d refusals", left, d.n+1)
				}
				d.until = time.Now()
			}
		}
	}
}

// However many reads wait, what is refused is offered once in each pause, and what was let in before is not sent in it. A pull does not wait: it may be why there is another
// credential, and serves the reads then.
func TestReadsAreDeniedTogether(t *testing.T) {
	for name, require := range map[string]func(*registrytest.Registry, string){
		"basic": func(r *registrytest.Registry, password string) { r.RequireBasic("u", password) },
		"token": func(r *registrytest.Registry, password string) {
			r.RequireToken(registrytest.TokenOptions{User: "u", Password: password})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, read := authFixture(t)
			r.PutManifest("team/app", "v1", "application/vnd.oci.image.manifest.v1+json", []byte("{}"))
			var secret atomic.Value
			secret.Store("one")
			c := newClient(t, Options{Wait: time.Second, Stall: time.Minute, Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] {
				return fixed("u", secret.Load().(string))(ctx, p)
			}})
			require(r, "one")
			if err := read(c); err != nil {
				t.Fatal(err)
			}
			require(r, "two")
			logins := func() (n int) {
				for _, q := range r.Requests() {
					if q.Path == "/token" || strings.HasPrefix(q.Authorization, "Basic") {
						n++
					}
				}
				return n
			}
			for range 3 {
				r.Reset()
				if err := read(c); !errors.Is(err, ErrDenied) {
					t.Fatalf("got %v", err)
				}
				if n := logins(); n < 1 || n > 3 { // a token is asked for with POST and GET, and by nobody
					t.Errorf("%d logins of the first", n)
				}
				c.registries[r.Host()].hosts[0].auth.denials["team/app"].until = time.Now().Add(time.Hour)
				r.Reset()
				for range 20 {
					if err := read(c); !errors.Is(err, ErrDenied) {
						t.Fatalf("got %v", err)
					}
				}
				if n := logins(); n > 0 {
					t.Errorf("%d logins of the others, want none", n)
				}
				c.registries[r.Host()].hosts[0].auth.denials["team/app"].until = time.Now()
			}
			if err := read(c); !errors.Is(err, ErrDenied) {
				t.Fatalf("got %v", err)
			}
			secret.Store("two")
			if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1"); err != nil {
				t.Errorf("a pull: %v", err)
			}
			if err := read(c); err != nil {
				t.Errorf("a read after the pull: %v", err)
			}
			if n := len(c.registries[r.Host()].hosts[0].auth.denials); n > 0 {
				t.Errorf("%d refusals are remembered", n)
			}
		})
	}
}

// A registry that denies access to everybody for a moment, and asks for no credential, ends no read either.
func TestReadsWaitForAccess(t *testing.T) {
	t.Parallel()
	r, read := authFixture(t)
	c := newClient(t, Options{})
	r.Inject(registrytest.Any, 2, registrytest.Status(403))
	if err := read(c); err != nil {
		t.Error(err)
	}
	wantRequests(t, r, 3)
	r.Inject(registrytest.Any, 1, registrytest.Status(403))
	if _, _, err := c.Resolve(t.Context(), string(repoOf(r))+":v1"); !errors.Is(err, ErrDenied) {
		t.Errorf("a pull: %v", err)
	}
}

// So do reads of a pull, of indexes, while the pull may last: then they say both, that it was too long and why.
func TestReadsOfPullWaitForCredentials(t *testing.T) {
	t.Parallel()
	r, _ := authFixture(t)
	r.RequireToken(registrytest.TokenOptions{User: "u", Password: "new"})
	c := newClient(t, Options{Wait: time.Hour, Credentials: fixed("u", "old")})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := readRange(ctx, c, repoOf(r), digest.FromBytes(noise(1000)), 10, 20, 0); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrDenied) {
		t.Errorf("got %v", err)
	}
}

// A read that no credential is accepted for is told so after half a minute.
func TestReadsDoNotWaitForCredentialsForLong(t *testing.T) {
	c := newClient(t, Options{Wait: time.Hour})
	k, err := c.newCall(t.Context(), "r.example.com/team/app", canPull)
	if err != nil {
		t.Fatal(err)
	}
	defer k.end()
	k.reads = true
	var sum time.Duration
	n := 0
	for ; !k.asked[0].out && n < 100; n++ {
		k.failed(k.asked[0], &exhaustedError{})
		if !k.asked[0].out {
			sum += time.Until(k.asked[0].next)
		}
	}
	if n != maxRefused+1 || sum < 30*time.Second || sum > 40*time.Second {
		t.Errorf("asked %d times, with pauses of %v", n, sum)
	}
}

// A mirror is asked for by its own name, the registry by the image's, and by its own too if hosts.toml moves it.
func TestPlaces(t *testing.T) {
	first, second := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	first.RequireBasic("u", "hush")
	second.RequireBasic("u", "hush")
	blob := second.PutBlob("team/app", []byte("x"))
	var places []Place
	c := newClient(t, Options{
		HostsDir: hostsDir(t, "images.example.com", fmt.Sprintf("server = %q\n[host.\"%s/v2/proxy\"]\noverride_path = true\n", second.URL(), first.URL())),
		Credentials: func(ctx context.Context, p Place) iter.Seq2[Credential, error] {
			places = append(places, p)
			return fixed("u", "hush")(ctx, p)
		},
	})
	for range 2 {
		if _, err := c.Blob(t.Context(), "images.example.com/team/app", blob, 1); err != nil {
			t.Fatal(err)
		}
	}
	const image = "images.example.com/team/app"
	mirror := Place{Image: image, Names: []Repository{Repository(first.Host() + "/proxy/team/app")}}
	want := []Place{mirror, mirror, {Image: image, Names: []Repository{image, repoOf(second)}}} // the mirror has it not: is there another credential?
	if !slices.EqualFunc(places, want, func(a, b Place) bool { return a.Image == b.Image && a.Last == b.Last && slices.Equal(a.Names, b.Names) }) {
		t.Errorf("got %v, want %v", places, want)
	}
}
