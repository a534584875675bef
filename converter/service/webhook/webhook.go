// Package webhook hears from registries what was pushed and deleted.
//
// The principle: a payload is a hint from outside. Each delivery is authenticated by what its source offers before it is read; the
// registry that it is about is the one that the configuration says; names and digests that cannot be any are dropped; and a sender is told that
// a delivery arrived when every event of it was noted, or else tries again. The same event may come twice.
//
// What it does not do: it asks no registry, and follows no address that a payload has (callbacks, links for validation).
package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// Source is a sender of webhooks. Exactly one of Header, Query, HMAC, Username and Issuer says how it is authenticated.
type Source struct {
	Name     string // its path is /hooks/NAME
	Kind     string // one of Kinds
	Registry string // the host that its events are about, as the service names it

	// RepositoryKey is of JFrog Artifactory: the repository whose images Registry serves. "" is that Registry serves all, as KEY/IMAGE.
	RepositoryKey string

	Header   string // a header that has Secret: "Authorization", with Bearer or without, or another
	Query    string // a parameter of the URL that has Secret, for senders that offer nothing else: it may be in proxies' logs
	HMAC     string // a header that has the HMAC-SHA256 of the body by Secret, in hexadecimal digits
	Username string // of basic authentication; Secret is the password
	Secret   []byte // at least 16 bytes

	Issuer   string            // of OpenID Connect: a bearer token is expected, signed by it
	Audience string            // that the token is for
	Claims   map[string]string // that it has, at least one: anybody may have the issuer make tokens for an audience. "email" must be verified
	Client   *http.Client      // for requests to the issuer; nil is one with a timeout
}

// Handler notes events. ErrNotFound and ErrInvalid are final; after another error the sender tries again.
type Handler interface {
	Handle(ctx context.Context, e service.Event) error
}

// Bounds of deliveries.
const (
	maxBody       = 1 << 20          // bytes: thousands of events
	maxEvents     = 1000             // of a delivery
	maxDeliveries = 64               // of a source at once
	minSecret     = 16               // bytes
	retryAfter    = "10"             // seconds
	readTime      = 10 * time.Second // of a body
)

// hook is a source, ready for use.
type hook struct {
	Source
	decode   decoder
	verifier *access.Verifier // nil unless there is an Issuer
	refusals *rate.Limiter    // that are logged
	room     chan struct{}    // one for each delivery being handled: what one source's sender does keeps out no other

	mu      sync.Mutex
	unknown []*sender // of HMAC's whose bodies are being read, the first one first
}

// sender is one who is authenticated when the body is there, and not before.
type sender struct{ cut func() }

// Server serves /hooks/NAME for each source.
type Server struct {
	hooks   map[string]*hook
	handler Handler
	log     *slog.Logger
	mux     *http.ServeMux
	counts  [len(Results)]atomic.Int64
}

// What became of a delivery, as Counts has it.
const (
	Accepted    = iota // every event of it was noted
	Refused            // not authenticated
	Invalid            // not what its kind sends
	Unavailable        // it could not be noted, and is sent again
)

// Results are the names of the above.
var Results = [...]string{"accepted", "refused", "invalid", "unavailable"}

// Counts says how many deliveries had which result.
func (s *Server) Counts() (n [len(Results)]int64) {
	for i := range n {
		n[i] = s.counts[i].Load()
	}
	return n
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// New returns the server of the sources. The log may be nil.
func New(sources []Source, h Handler, log *slog.Logger) (*Server, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{hooks: map[string]*hook{}, handler: h, log: log, mux: http.NewServeMux()}
	for _, source := range sources {
		k, err := newHook(source)
		if err != nil {
			return nil, fmt.Errorf("webhook %q: %w", source.Name, err)
		}
		if s.hooks[source.Name] != nil {
			return nil, fmt.Errorf("webhook %q: there are two of the name", source.Name)
		}
		s.hooks[source.Name] = k
	}
	s.mux.HandleFunc("POST /hooks/{name}", func(w http.ResponseWriter, r *http.Request) {
		if result, ok := s.deliver(w, r); ok {
			s.counts[result].Add(1)
		}
	})
	s.mux.HandleFunc("OPTIONS /hooks/{name}", s.consent)
	return s, nil
}

var sourceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// Check returns what is wrong with a source, but for its secret, which may not be there yet.
func (s Source) Check() error {
	if !sourceName.MatchString(s.Name) {
		return errors.New("its name must be letters, digits, '.', '_' and '-'")
	}
	if decoders[s.Kind] == nil {
		return fmt.Errorf("kind %q: must be one of %s", s.Kind, strings.Join(Kinds(), ", "))
	}
	if s.Registry == "" {
		return errors.New("it has no registry")
	}
	ways := 0
	for _, way := range []string{s.Header, s.Query, s.HMAC, s.Username, s.Issuer} {
		if way != "" {
			ways++
		}
	}
	if ways != 1 {
		return fmt.Errorf("it has %d of header, query, HMAC, user name and issuer: must have exactly one", ways)
	}
	if s.Issuer != "" && (s.Audience == "" || len(s.Claims) == 0) {
		return errors.New("it must have an audience and at least one claim: the issuer makes tokens for others, too")
	}
	for name, value := range s.Claims {
		if name == "" || value == "" {
			return fmt.Errorf("claim %q must have a name and a value", name)
		}
	}
	return nil
}

func newHook(s Source) (*hook, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	k := &hook{Source: s, decode: decoders[s.Kind], refusals: rate.NewLimiter(rate.Every(time.Second), 10), room: make(chan struct{}, maxDeliveries)}
	if s.Issuer == "" {
		if len(s.Secret) < minSecret {
			return nil, fmt.Errorf("its secret has %d bytes: must have %d or more", len(s.Secret), minSecret)
		}
		return k, nil
	}
	var err error
	k.verifier, err = access.NewVerifier(s.Issuer, []string{s.Audience}, s.Client)
	return k, err
}

// deliver answers 200 when each event was noted. ok is false for what is no delivery of a source's.
func (s *Server) deliver(w http.ResponseWriter, r *http.Request) (result int, ok bool) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	k := s.hooks[r.PathValue("name")]
	if k == nil {
		access.WriteError(w, http.StatusNotFound, "NAME_UNKNOWN", "there is no such webhook")
		return 0, false
	}
	body, err := k.read(w, r)
	var large *http.MaxBytesError
	switch {
	case errors.Is(err, errRefused):
		if k.refusals.Allow() {
			s.log.WarnContext(r.Context(), "a webhook was refused: its authentication is wrong", "webhook", k.Name, "remote", r.RemoteAddr)
		}
		access.WriteError(w, http.StatusUnauthorized, "UNAUTHORIZED", err.Error())
		return Refused, true
	case errors.As(err, &large):
		access.WriteError(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", "a delivery has 1 MiB at most")
		return Invalid, true
	case err != nil:
		later(w, http.StatusServiceUnavailable, err.Error())
		return Unavailable, true
	}
	defer k.leave()
	d, err := k.decode(k.Source, r.Header, body)
	if err == nil && len(d.events) > maxEvents {
		err = fmt.Errorf("%d events: a delivery has %d at most", len(d.events), maxEvents)
	}
	if err != nil {
		s.log.WarnContext(r.Context(), "a webhook's payload is not what its kind sends", "webhook", k.Name, "kind", k.Kind, "error", err)
		access.WriteError(w, http.StatusBadRequest, "INVALID", "this is no payload of a webhook of the kind "+k.Kind)
		return Invalid, true
	}
	if err := s.note(r.Context(), k, d.events); err != nil {
		s.log.ErrorContext(r.Context(), "a webhook's event was not noted; its sender tries again", "webhook", k.Name, "error", err)
		later(w, http.StatusServiceUnavailable, "not every event was noted; try again")
		return Unavailable, true
	}
	w.Header().Set("Content-Type", "application/json")
	if d.answer == nil {
		d.answer = map[string]int{"events": len(d.events)}
	}
	json.NewEncoder(w).Encode(d.answer)
	return Accepted, true
}

func later(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Retry-After", retryAfter)
	access.WriteError(w, status, "UNAVAILABLE", message)
}

// note hands on all events, those after one that failed, too: the sender repeats them all.
func (s *Server) note(ctx context.Context, k *hook, events []service.Event) error {
	ctx = access.With(ctx, &access.Identity{Name: k.Name, Kind: access.KindWebhook})
	var failed error
	for _, e := range events {
		err := s.handler.Handle(ctx, e)
		switch {
		case errors.Is(err, service.ErrNotFound) || errors.Is(err, service.ErrInvalid):
			s.log.WarnContext(ctx, "an event is about nothing that is known here", "webhook", k.Name, "repository", e.Repository, "event", e.ID, "error", err)
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("%s: %w", e.Repository, err))
		}
	}
	return failed
}

var errFull = errors.New("too many deliveries at once")

// read authenticates a delivery, takes one of the source's places for it, and returns its body: errRefused for who is not the source,
// *http.MaxBytesError. Without an error, the caller leaves the place. Who is not authenticated has none.
func (k *hook) read(w http.ResponseWriter, r *http.Request) (body []byte, err error) {
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Now().Add(readTime)) // not supported in tests without a connection
	all := func() ([]byte, error) { return io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody)) }
	if k.HMAC != "" {
		leave := k.enter(&sender{func() { c.SetReadDeadline(time.Unix(1, 0)) }})
		body, err = all()
		leave()
		if err == nil {
			err = k.authenticate(r, body)
		}
	} else {
		err = k.authenticate(r, nil)
	}
	if err != nil {
		return nil, err
	}
	select {
	case k.room <- struct{}{}:
	default:
		return nil, errFull
	}
	if k.HMAC == "" {
		if body, err = all(); err != nil {
			k.leave()
		}
	}
	return body, err
}

// enter counts one whose body is about to be read. When there are as many as deliveries may be, the one who began first is cut off: the source itself is done in a
// moment, and strangers who take their time are in nobody's way.
func (k *hook) enter(s *sender) (leave func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.unknown) >= maxDeliveries {
		k.unknown[0].cut()
		k.unknown = k.unknown[1:]
	}
	k.unknown = append(k.unknown, s)
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.unknown = slices.DeleteFunc(k.unknown, func(o *sender) bool { return o == s })
	}
}

func (k *hook) leave() { <-k.room }
