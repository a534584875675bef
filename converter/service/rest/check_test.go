package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/starts"
)

// strict returns the document, which refuses fields that it does not know.
func strict(t testing.TB) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(document)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	no := false
	for _, s := range doc.Components.Schemas {
		if s.Value.Properties != nil {
			s.Value.AdditionalProperties.Has = &no
		}
	}
	return doc
}

// checker holds what is asked and answered against the document.
type checker struct {
	t    *testing.T
	doc  *openapi3.T
	api  *api
	next http.Handler
}

func newChecker(t *testing.T, a *api, next http.Handler) *checker {
	return &checker{t, strict(t), a, next}
}

var registerDecoder = sync.OnceFunc(func() { openapi3filter.RegisterBodyDecoder(eventStream, openapi3filter.PlainBodyDecoder) })

// recorder passes an answer on and keeps it.
type recorder struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	r.body.Write(p)
	return r.ResponseWriter.Write(p)
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (c *checker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	registerDecoder()
	asked, err := io.ReadAll(r.Body)
	if err != nil {
		c.t.Error(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(asked))
	rec := &recorder{ResponseWriter: w, status: http.StatusOK}
	c.next.ServeHTTP(rec, r)
	if err := c.check(r, asked, rec); err != nil {
		c.t.Errorf("%s %s answers %d %s: %v", r.Method, r.URL, rec.status, rec.body.String(), err)
	}
}

func (c *checker) check(r *http.Request, asked []byte, rec *recorder) error {
	rt, vars, err := c.api.find(r.Method, r.URL.Path)
	if err != nil { // of no route
		var body any
		if err := json.Unmarshal(rec.body.Bytes(), &body); err != nil {
			return err
		}
		return c.doc.Components.Schemas["Errors"].Value.VisitJSON(body)
	}
	item := c.doc.Paths.Value(rt.path)
	if item == nil || item.GetOperation(rt.method) == nil {
		return errors.New("is not in the document")
	}
	again := r.Clone(context.WithoutCancel(r.Context()))
	again.Body = io.NopCloser(bytes.NewReader(asked))
	in := &openapi3filter.RequestValidationInput{
		Request: again, PathParams: vars,
		Route:   &routers.Route{Spec: c.doc, Path: rt.path, PathItem: item, Method: rt.method, Operation: item.GetOperation(rt.method)},
		Options: &openapi3filter.Options{AuthenticationFunc: authenticated, IncludeResponseStatus: true},
	}
	if rec.status < 400 {
		if err := openapi3filter.ValidateRequest(again.Context(), in); err != nil {
			return err
		}
	}
	out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: rec.status, Header: rec.Header(), Options: in.Options}
	if err := openapi3filter.ValidateResponse(again.Context(), out.SetBodyBytes(rec.body.Bytes())); err != nil {
		return err
	}
	if rec.Header().Get("X-Ms-Correlation-Request-Id") == "" {
		return errors.New("no correlation id")
	}
	if rec.Header().Get("Content-Type") == eventStream {
		return c.checkEvents(rec.body.String())
	}
	return nil
}

// checkEvents holds events against the schemas that the descriptions name.
func (c *checker) checkEvents(body string) error {
	schemas := map[string]*openapi3.Schema{
		"operation": c.doc.Components.Schemas["Operation"].Value,
		"error":     c.doc.Components.Schemas["Errors"].Value,
		"verified":  c.doc.Paths.Value(ofImage + "/_artifacts:verify").Post.Responses.Status(200).Value.Content["application/json"].Schema.Value,
	}
	for e := range strings.SplitSeq(body, "\n\n") {
		kind, data, ok := strings.Cut(e, "\ndata: ")
		if !ok {
			continue
		}
		s := schemas[strings.TrimPrefix(kind, "event: ")]
		if s == nil {
			return errors.New("unknown event: " + e)
		}
		var v any
		if err := json.Unmarshal([]byte(data), &v); err != nil {
			return err
		}
		if err := s.VisitJSON(v); err != nil {
			return err
		}
	}
	return nil
}

// authenticated holds the credentials of a request that was let in against the scheme.
func authenticated(_ context.Context, in *openapi3filter.AuthenticationInput) error {
	header := in.RequestValidationInput.Request.Header.Get("Authorization")
	kind, _, _ := strings.Cut(header, " ")
	if in.SecurityScheme.Type != "http" || !strings.EqualFold(kind, in.SecurityScheme.Scheme) {
		return in.NewError(errors.New("let in with Authorization: " + kind))
	}
	return nil
}

// TestDocument holds openapi.json against the table of routes, and its schemas against the types.
func TestDocument(t *testing.T) {
	doc := strict(t)
	described := map[string]*openapi3.Operation{}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			described[method+" "+path] = op
		}
	}
	for _, r := range routes() {
		op := described[r.method+" "+r.path]
		if op == nil {
			t.Errorf("%s %s is not in the document", r.method, r.path)
			continue
		}
		delete(described, r.method+" "+r.path)
		if says := strings.Contains(op.Description, "Takes the role "+r.role.String()+" in"); says != (r.role != 0) {
			t.Errorf("%s: %q, and it takes the role %s", op.OperationID, op.Description, r.role)
		}
		if (op.RequestBody != nil) != r.body {
			t.Errorf("%s: has a body: %t", op.OperationID, r.body)
		}
		var query []string
		for _, p := range op.Parameters {
			if p.Value.In == "query" {
				query = append(query, p.Value.Name)
			}
		}
		if !slices.Equal(query, r.query) {
			t.Errorf("%s: the document has the parameters %v, the route %v", op.OperationID, query, r.query)
		}
		if r.long && op.Responses.Status(200).Value.Content[eventStream] == nil {
			t.Errorf("%s takes long and has no events", op.OperationID)
		}
	}
	for name := range described {
		t.Errorf("%s is in the document and not answered", name)
	}

	answered := map[string]any{
		"State": nil, "Errors": nil, "AzureState": azureState{}, "AzureSettings": service.AzureSettings{}, "AzureOperation": service.AzureOperation{},
		"Operation": service.Operation{}, "Progress": service.Progress{}, "Artifact": service.Artifact{},
		"Registry": service.RegistryInfo{}, "Repository": service.RepositoryInfo{}, "Settings": service.Settings{}, "Rules": service.Rules{},
		"Image": service.Image{}, "Tag": service.TagInfo{}, "ImageInfo": service.ImageInfo{}, "Platform": service.PlatformInfo{}, "Layer": service.LayerInfo{},
		"Referrer": service.ReferrerInfo{}, "Manifest": manifest{}, "Streaming": service.StreamingInfo{}, "LayerMap": service.LayerMap{}, "Span": service.Span{},
		"Verified": converter.Verified{}, "Signature": converter.Signature{}, "Profile": converter.Profile{}, "Storage": service.StorageInfo{},
		"Starts": service.StartsInfo{}, "StartsOfOne": service.StartsOfOne{}, "StartTimes": service.StartTimes{}, "StartBucket": starts.Bucket{}, "Reported": service.Reported{},
	}
	asked := map[string]any{"AzureFormat": azureFormat{}, "AzureChange": azureChange{}, "Conversion": conversion{}, "SettingsChange": change{}, "StartsReport": starts.Report{}, "Start": starts.Start{}}
	for name, s := range doc.Components.Schemas {
		v, known := answered[name]
		request := !known
		if request {
			v, known = asked[name]
		}
		if !known {
			t.Errorf("no type is known to be the schema %s", name)
		}
		if v == nil {
			continue
		}
		fields := map[string]bool{}
		jsonFields(reflect.TypeOf(v), fields)
		for field, always := range fields {
			switch _, has := s.Value.Properties[field]; {
			case !has:
				t.Errorf("schema %s lacks %s", name, field)
			case !request && always != slices.Contains(s.Value.Required, field):
				t.Errorf("schema %s: %s is always there: %t", name, field, always)
			}
		}
		for field := range s.Value.Properties {
			if _, has := fields[field]; !has {
				t.Errorf("schema %s has %s, which %T does not", name, field, v)
			}
		}
	}
}

// jsonFields notes the names that a struct's fields have in JSON, and whether they are always there.
func jsonFields(t reflect.Type, fields map[string]bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" {
			jsonFields(f.Type, fields)
			continue
		}
		if !f.IsExported() {
			continue
		}
		fields[name] = !strings.Contains(options, "omit")
	}
}
