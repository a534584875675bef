// Package rest is the HTTP API of the conversion service: Azure Container Registry's paths for artifact streaming, as az and scripts
// call them, and /v1 for what those have no words for. openapi.json describes both, and is served.
//
// The principle: one table (routes) says of each request its path, the role that it needs in the repository, and what it is called in
// the audit log, and one function (call.run) holds to that before any handler runs. What may not be seen is answered as what is not there.
// Bodies and queries are read strictly: a field that nobody reads is an error and not ignored.
//
// What it does not do: it knows nobody (access puts the identity into the request's context), it decides nothing about conversions, and
// it has no pages for people (console).
package rest

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
)

//go:embed openapi.json
var document []byte

const (
	// requestTimeout bounds what a request asks of the service and of registries; verifications and followed operations have no bound.
	requestTimeout = 90 * time.Second
	maxBody        = 64 << 10 // bytes of a request's body: a page of platforms
	verifications  = 2        // at once: each reads an image and its artifacts whole
)

// Service is what the API asks of *service.Service, where each method is documented. All are called concurrently; the slices that they
// return are the caller's.
type Service interface {
	Submit(ctx context.Context, r service.Request) (op service.Operation, existed bool, err error)
	Operation(ctx context.Context, id string) (service.Operation, error)
	Operations(ctx context.Context, f service.Filter) ([]service.Operation, error)
	Last(ctx context.Context, i service.Image) (service.Operation, error)
	Cancel(ctx context.Context, id, by string) (service.Operation, error)
	Watch(ctx context.Context, id string) (<-chan service.Operation, error)

	Registries() []service.RegistryInfo
	Repositories(ctx context.Context, registry, filter string) ([]service.RepositoryInfo, error)
	Settings(ctx context.Context, registry, repository string) (service.Settings, error)
	AllSettings(ctx context.Context, registry string) ([]service.Settings, error)
	SetSettings(ctx context.Context, s service.Settings, existing bool) (service.Settings, error)
	ForgetSettings(ctx context.Context, registry, repository string) error
	Resolve(ctx context.Context, registry, repository, ref string) (service.Image, error)
	Tags(ctx context.Context, registry, repository string) ([]service.TagInfo, error)
	Image(ctx context.Context, registry, repository, ref string) (service.ImageInfo, error)
	DeleteArtifacts(ctx context.Context, i service.Image, by string) ([]digest.Digest, error)
	Verify(ctx context.Context, i service.Image) ([]converter.Verified, error)
	Storage(ctx context.Context, registry, repository string) (service.StorageInfo, error)

	Report(ctx context.Context, registry, repository string, r starts.Report) (service.Reported, error)
}

// Config of the API.
type Config struct {
	// Default is the registry of a request that names none: of Azure's paths, whose registry is the Host if that is one, and of "_" in
	// ours. "": the only one, if there is only one.
	Default string
	Audit   func(context.Context, access.Entry) // of each change, done or refused; nil: none
	Closing <-chan struct{}                     // closed when the server is about to end: followed operations and verifications end with it
}

// New returns the API over s. It stands behind access.Gate's API.
func New(s Service, c Config) (http.Handler, error) {
	a := &api{Service: s, config: c, verifying: make(chan struct{}, verifications)}
	if c.Default != "" && !a.known(c.Default) {
		return nil, fmt.Errorf("default registry %q is none of the registries of the configuration", c.Default)
	}
	for _, r := range routes() {
		a.routes = append(a.routes, r.compile())
	}
	return a, nil
}

type api struct {
	Service
	config    Config
	routes    []route
	verifying chan struct{} // holds one for each verification that reads
}

func (a *api) known(registry string) bool {
	return slices.ContainsFunc(a.Registries(), func(i service.RegistryInfo) bool { return i.Name == registry })
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{api: a, w: w, r: r, who: access.From(r.Context()), status: http.StatusOK}
	rt, vars, err := a.find(r.Method, r.URL.Path)
	var body any
	if err == nil {
		if !rt.long {
			ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
			defer cancel()
			c.r = r.WithContext(ctx)
		}
		body, err = c.run(rt, vars)
		c.audit(rt, err)
	}
	switch {
	case c.streamed:
	case err != nil:
		p := problemOf(err)
		for k, v := range p.header {
			w.Header().Set(k, v)
		}
		access.WriteError(w, p.status, p.code, p.message)
	default:
		writeJSON(w, c.status, body)
	}
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	raw, ok := body.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			access.WriteError(w, http.StatusInternalServerError, string(converter.Unknown), err.Error())
			return
		}
		raw = append(raw, '\n')
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(raw)
}
