package rest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// world is the API as streamctl serve puts it together: a registry, NATS in the process, the service, the gate, and what checks each
// answer against the document.
type world struct {
	t        *testing.T
	registry *registrytest.Registry
	host     string // of the registry
	dir      string // of NATS
	config   Config
	addr     string // that the API is at, from one start to the next

	server *httptest.Server
	svc    *service.Service
	stop   func()

	auditMu sync.Mutex
	audited []map[string]any
}

// token is that of the one who has the role in team/*, and of nobody for None.
func token(r access.Role) string { return "the-secret-token-of-a-" + r.String() }

func newWorld(t *testing.T) *world {
	t.Parallel() // a world waits for its disk most of the time
	w := &world{t: t, registry: registrytest.Start(t, registrytest.Options{}), dir: t.TempDir()}
	w.host = w.registry.Host()
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) start() {
	t := w.t
	t.Helper()
	nats, err := embedded.Start(t.Context(), w.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	registry := service.NewRegistry(w.host, converter.RegistryOptions{}, 0)
	c := service.Config{
		Conn: nats.Conn, Convert: converter.Options{TempDir: t.TempDir()}, Sole: true, Reconcile: time.Hour,
		Registries: []service.Registry{registry, service.NewRegistry("other.example.com", converter.RegistryOptions{}, 0)},
	}
	if w.svc, err = service.New(ctx, c); err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.svc.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	closing := make(chan struct{})
	w.serve(closing)
	w.stop = sync.OnceFunc(func() {
		close(closing)
		w.server.Close()
		cancel()
		running.Wait()
		if err := nats.Close(); err != nil {
			t.Error(err)
		}
	})
}

// serve listens where the last server listened.
func (w *world) serve(closing chan struct{}) {
	t := w.t
	var tokens []access.Token
	for _, r := range []access.Role{access.None, access.Reader, access.Writer, access.Owner, access.Reporter} {
		sum := sha256.Sum256([]byte(token(r)))
		grant := access.Grant{Role: r, Registry: w.host, Repository: "team/*"}
		if r == access.None {
			grant = access.Grant{Role: access.Owner, Registry: "elsewhere.example.com"}
		}
		tokens = append(tokens, access.Token{Name: "a " + r.String(), SHA256: hex.EncodeToString(sum[:]), Grants: []access.Grant{grant}})
	}
	gate, err := access.New(access.Config{Tokens: tokens, Audit: w})
	if err != nil {
		t.Fatal(err)
	}
	w.config = Config{Default: w.host, Audit: gate.Audit, Closing: closing}
	h, err := New(w.svc, w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.server = httptest.NewUnstartedServer(newChecker(t, h.(*api), gate.API(h)))
	if w.addr != "" {
		l, err := net.Listen("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		w.server.Listener.Close()
		w.server.Listener = l
	}
	w.server.Start()
	w.addr = w.server.Listener.Addr().String()
}

// Write takes a line of the audit log.
func (w *world) Write(line []byte) (int, error) {
	var e map[string]any
	if err := json.Unmarshal(line, &e); err != nil {
		w.t.Errorf("audit log: %s: %v", line, err)
	}
	w.auditMu.Lock()
	defer w.auditMu.Unlock()
	w.audited = append(w.audited, e)
	return len(line), nil
}

// lastAudit returns the last entry.
func (w *world) lastAudit() map[string]any {
	w.auditMu.Lock()
	defer w.auditMu.Unlock()
	if len(w.audited) == 0 {
		return nil
	}
	return w.audited[len(w.audited)-1]
}

// client returns one with the rights of role.
func (w *world) client(role access.Role) *client.Client {
	c, err := client.New(client.Config{Server: w.server.URL, Token: func() (string, error) { return token(role), nil }, Agent: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// answer is what a plain request is answered.
type answer struct {
	status int
	header http.Header
	body   string
}

// code is that of an error.
func (a answer) code() string {
	var e struct{ Errors []struct{ Code string } }
	if json.Unmarshal([]byte(a.body), &e) != nil || len(e.Errors) != 1 {
		return ""
	}
	return e.Errors[0].Code
}

// nobody has no token.
const nobody = access.None - 1

// ask sends a request with the rights of role; headers are pairs.
func (w *world) ask(role access.Role, method, path, body string, headers ...string) answer {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.server.URL+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token(role))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		switch headers[i] {
		case "Host":
			r.Host = headers[i+1]
		default:
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	if role < access.None {
		r.Header.Del("Authorization")
	}
	a, err := w.server.Client().Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer a.Body.Close()
	raw, err := io.ReadAll(a.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer{a.StatusCode, a.Header, string(raw)}
}

// read decodes the body into v, and demands the status.
func (a answer) read(t *testing.T, status int, v any) {
	t.Helper()
	if a.status != status {
		t.Fatalf("status %d, want %d: %s", a.status, status, a.body)
	}
	d := json.NewDecoder(bytes.NewReader([]byte(a.body)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		t.Fatalf("%s: %v", a.body, err)
	}
}

// push pushes an image of two small layers for each platform, as an index if there are several.
func (w *world) push(repository, tag string, architectures ...string) service.Image {
	w.t.Helper()
	ref, err := name.ParseReference(w.host + "/" + repository + ":" + tag)
	if err != nil {
		w.t.Fatal(err)
	}
	index := v1.ImageIndex(empty.Index)
	var hash v1.Hash
	for _, arch := range architectures {
		img, err := random.Image(4<<10, 2)
		if err != nil {
			w.t.Fatal(err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			w.t.Fatal(err)
		}
		config.OS, config.Architecture, config.Config.Cmd = "linux", arch, []string{"/bin/app"}
		if img, err = mutate.ConfigFile(img, config); err != nil {
			w.t.Fatal(err)
		}
		if hash, err = img.Digest(); err != nil {
			w.t.Fatal(err)
		}
		if len(architectures) == 1 {
			err = remote.Write(ref, img)
		}
		if err != nil {
			w.t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	if len(architectures) > 1 {
		if err := remote.WriteIndex(ref, index); err != nil {
			w.t.Fatal(err)
		}
		if hash, err = index.Digest(); err != nil {
			w.t.Fatal(err)
		}
	}
	return service.Image{Registry: w.host, Repository: repository, Digest: digest.Digest(hash.String())}
}

// ended waits for the end of an operation.
func (w *world) ended(id string, want service.State) service.Operation {
	w.t.Helper()
	changes, err := w.svc.Watch(w.t.Context(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	var op service.Operation
	for op = range changes {
	}
	if op.State != want {
		w.t.Fatalf("operation %+v, want it %s", op, want)
	}
	return op
}
