package rest

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// route is a request that is answered.
type route struct {
	method string
	path   string      // as in openapi.json: {repository} stands for a name with its slashes, every other {variable} for what is between two
	role   access.Role // that the repository of the path, or of the operation in the path, is seen and changed with; None where there is none
	action string      // in the audit log; "" of what changes nothing
	query  []string    // parameters; of Azure's paths any are taken, as api-version is
	serve  func(*call) (any, error)

	quiet   bool // only what is refused is in the audit log
	body    bool // is read by serve; the others have none, or an empty object
	pattern bool // {repository} may be a pattern
	long    bool // has no time-out: it lasts as long as somebody reads

	match *regexp.Regexp // of the whole path, a group for each variable
}

const (
	ofRegistry   = "/v1/registries/{registry}"
	ofRepository = ofRegistry + "/repositories/{repository}"
	ofImage      = ofRepository + "/_images/{reference}"
)

func routes() []route {
	return []route{
		{method: "POST", path: "/acr/v1/{repository}/_streaming/{digest}", role: access.Writer, action: "convert", body: true, serve: (*call).azureConvert},
		{method: "GET", path: "/acr/v1/{repository}/_streaming/{digest}", role: access.Reader, serve: (*call).azureLast},
		{method: "GET", path: "/acr/v1/{repository}/_streaming", role: access.Reader, serve: (*call).azureSettings},
		{method: "POST", path: "/acr/v1/{repository}/_streaming", role: access.Owner, action: "settings", body: true, serve: (*call).azureSwitch},
		{method: "GET", path: "/acr/v1/{repository}/_operations/{id}", role: access.Reader, serve: (*call).azureOperation},
		{method: "POST", path: "/acr/v1/{repository}/_operations/{id}:cancel", role: access.Writer, action: "cancel", serve: (*call).azureCancel},

		{method: "GET", path: "/v1/operations", query: []string{"registry", "repository", "digest", "status", "limit"}, serve: (*call).operations},
		{method: "GET", path: "/v1/operations/{id}", role: access.Reader, serve: (*call).operation},
		{method: "GET", path: "/v1/operations/{id}/events", role: access.Reader, long: true, serve: (*call).events},
		{method: "POST", path: "/v1/operations/{id}:cancel", role: access.Writer, action: "cancel", serve: (*call).cancel},

		{method: "GET", path: "/v1/registries", serve: (*call).registries},
		{method: "GET", path: ofRegistry + "/repositories", query: []string{"filter"}, serve: (*call).repositories},
		{method: "GET", path: ofRegistry + "/settings", serve: (*call).allSettings},
		{method: "GET", path: ofRepository + "/_settings", role: access.Reader, pattern: true, serve: (*call).settings},
		{method: "PUT", path: ofRepository + "/_settings", role: access.Owner, action: "settings", query: []string{"existing"}, pattern: true, body: true, serve: (*call).setSettings},
		{method: "DELETE", path: ofRepository + "/_settings", role: access.Owner, action: "settings", pattern: true, serve: (*call).forgetSettings},
		{method: "GET", path: ofRepository + "/_tags", role: access.Reader, serve: (*call).tags},
		{method: "GET", path: ofRepository + "/_storage", role: access.Reader, serve: (*call).storage},

		{method: "GET", path: ofImage, role: access.Reader, serve: (*call).showImage},
		{method: "GET", path: ofImage + "/_digest", role: access.Reader, serve: (*call).resolved},
		{method: "GET", path: ofImage + "/_operation", role: access.Reader, serve: (*call).last},
		{method: "GET", path: ofImage + "/_artifacts", role: access.Reader, query: []string{"artifactType"}, serve: (*call).artifacts},
		{method: "POST", path: ofImage + "/_artifacts", role: access.Writer, action: "convert", body: true, serve: (*call).convert},
		{method: "DELETE", path: ofImage + "/_artifacts", role: access.Owner, action: "delete", serve: (*call).deleteArtifacts},
		{method: "POST", path: ofImage + "/_artifacts:verify", role: access.Writer, long: true, serve: (*call).verify},

		{method: "POST", path: ofRepository + "/_starts", role: access.Reporter, action: "report", quiet: true, body: true, serve: (*call).report},

		{method: "GET", path: "/openapi.json", serve: func(*call) (any, error) { return document, nil }},
	}
}

// compile makes match of path.
func (r route) compile() route {
	var b strings.Builder
	for i, part := range strings.Split(r.path, "{") {
		if i > 0 {
			var name string
			name, part, _ = strings.Cut(part, "}")
			chars := "[^/]+"
			switch name {
			case "repository":
				chars = ".+"
			case "id":
				chars = "[^/:]+" // and then :cancel
			}
			fmt.Fprintf(&b, "(?P<%s>%s)", name, chars)
		}
		b.WriteString(regexp.QuoteMeta(part))
	}
	r.match = regexp.MustCompile("^" + b.String() + "$")
	return r
}

// find returns the route of a request and the variables of its path.
func (a *api) find(method, path string) (*route, map[string]string, error) {
	var others []string
	for i := range a.routes {
		r := &a.routes[i]
		found := r.match.FindStringSubmatch(path)
		if found == nil {
			continue
		}
		if r.method != method {
			others = append(others, r.method)
			continue
		}
		vars := map[string]string{}
		for i, name := range r.match.SubexpNames() {
			if name != "" {
				vars[name] = found[i]
			}
		}
		return r, vars, nil
	}
	if others != nil {
		slices.Sort(others)
		allow := strings.Join(others, ", ")
		return nil, nil, &problem{http.StatusMethodNotAllowed, "UNSUPPORTED", fmt.Sprintf("%s is not answered at %s: it takes %s", method, path, allow), map[string]string{"Allow": allow}}
	}
	return nil, nil, notFound("there is no %s: /openapi.json lists the paths", path)
}
