package console

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// operationView is an operation as pages show it.
type operationView struct {
	service.Operation
	Name       string // of the image, for people
	Path       string
	Events     string // path of its stream of events
	ImagePath  string
	CancelPath string // "" when it cannot be cancelled, or not by who looks
	Badge      badge
	Took       string // "" as long as it has not begun
	Doing      string // what goes on, in words
	Advice     string // what to do about an error
	Ongoing    bool
	Spoken     int    // percent that was last worth saying aloud: quarters
	From       string // "image" where cancelling goes back to the image
}

func (c *Console) operationView(r *http.Request, o service.Operation) operationView {
	v := operationView{
		Operation: o, Name: imageName(o.Repository, o.Tag, o.Digest), Path: operationPath(o.ID), Events: operationPath(o.ID, "events"),
		ImagePath: imageOf(o), Badge: stateBadge(o), Ongoing: !o.State.Ended(),
		Doing: doing(o), Advice: advice(o), Spoken: o.Progress.Percent / 25 * 25,
	}
	if !o.Start.IsZero() {
		end := o.End
		if end.IsZero() {
			end = c.Now()
		}
		v.Took = took(end.Sub(o.Start))
	}
	if v.Ongoing && !o.Cancel && may(r, access.Writer, place{Registry: o.Registry, Repository: o.Repository}) {
		v.CancelPath = operationPath(o.ID, "cancel")
	}
	return v
}

func stateBadge(o service.Operation) badge {
	if o.Cancel && !o.State.Ended() {
		return badge{"Canceling", "slash", "busy"}
	}
	switch o.State {
	case service.NotStarted:
		return badge{"Not started", "clock", "quiet"}
	case service.Running:
		return badge{"Running", "running", "busy"}
	case service.Succeeded:
		return badge{"Succeeded", "check", "good"}
	case service.Failed:
		return badge{"Failed", "fail", "bad"}
	case service.Canceled:
		return badge{"Canceled", "slash", "quiet"}
	}
	return badge{string(o.State), "info", "quiet"}
}

// doing says in a sentence what an operation does.
func doing(o service.Operation) string {
	p := o.Progress
	switch {
	case o.State == service.NotStarted && o.Position > 1:
		return "Waits in the queue, behind " + plural(o.Position-1, "other") + "."
	case o.State == service.NotStarted && o.Position == 1:
		return "Is the next in the queue."
	case o.State == service.NotStarted:
		return "Waits for a process that has room for it."
	case o.State != service.Running:
		return ""
	case o.Cancel:
		return "Is being stopped."
	case p.Total == 0:
		return "Looks at the image."
	case p.Layers > 0 && p.Platform != "":
		return fmt.Sprintf("Converts layer %d of %d of %s.", p.Layer, p.Layers, p.Platform)
	}
	return "Converts."
}

// advice says what to do about an operation that failed.
func advice(o service.Operation) string {
	if o.State != service.Failed {
		return ""
	}
	switch o.ErrorCode {
	case converter.ResourceNotFound:
		return "The image, or a layer of it, is not in the registry any more. Push it again, and convert it then."
	case converter.UnsupportedPlatform, converter.NoSupportedPlatformFound:
		return "Linux images are converted, of any architecture. Build the image for Linux."
	case converter.UnsupportedMediaType:
		return "OCI and Docker manifests and indexes are converted. Push the image in one of these formats: Docker and BuildKit do by default."
	case converter.UnsupportedArtifactType:
		return "This is a streaming artifact itself. Convert the image that it belongs to."
	case converter.ImageNotRunnable:
		return "This is something other than a container image, such as a chart or a signature: nothing to stream."
	}
	if o.ErrorCode == service.ProcessesDied {
		return "The processes that converted it ended, again and again, for lack of memory perhaps: the log of the machine, or the pod's status, says why. Mend that, and convert it again."
	}
	return "Convert it again: layers that were converted are not converted again. If it fails the same way, the log of the service has more."
}

// filterState is a choice of the filter of operations.
type filterState struct {
	Value, Text string
	Chosen      bool
}

// operationsBody is the list of operations.
type operationsBody struct {
	Operations           []operationView
	States               []filterState
	Registries           []filterState
	Registry, Repository string
	Filtered             bool
	More                 string // path of a longer list
	Ongoing              bool
}

// newest is how many operations the list has first, and grown at most.
const (
	newest = 100
	oldest = 2000
)

func (c *Console) operations(w http.ResponseWriter, r *http.Request, _ place) error {
	q := r.URL.Query()
	body := operationsBody{Registry: q.Get("registry"), Repository: strings.TrimSpace(q.Get("repository"))}
	f := service.Filter{Registry: body.Registry, Limit: oldest}
	state := q.Get("state")
	for _, s := range []filterState{{"", "All", false}, {"ongoing", "Ongoing", false}, {string(service.Succeeded), "Succeeded", false},
		{string(service.Failed), "Failed", false}, {string(service.Canceled), "Canceled", false}} {
		s.Chosen = s.Value == state
		body.States = append(body.States, s)
		switch {
		case !s.Chosen || s.Value == "":
		case s.Value == "ongoing":
			f.States = []service.State{service.Running, service.NotStarted}
		default:
			f.States = []service.State{service.State(s.Value)}
		}
	}
	for _, reg := range c.Service.Registries() {
		if access.From(r.Context()).MaySome(access.Reader, reg.Name) {
			body.Registries = append(body.Registries, filterState{reg.Name, reg.Name, reg.Name == body.Registry})
		}
	}
	f.May = func(_, repository string) bool { return strings.Contains(repository, body.Repository) }
	list, err := c.mayOperations(r, f)
	if err != nil {
		return err
	}
	body.Filtered = body.Registry != "" || body.Repository != "" || len(f.States) > 0
	if len(list) > newest && q.Get("all") == "" {
		list = list[:newest]
		q.Set("all", "1")
		q.Del("done")
		body.More = "/operations?" + q.Encode()
	}
	for _, o := range list {
		v := c.operationView(r, o)
		body.Ongoing = body.Ongoing || v.Ongoing
		body.Operations = append(body.Operations, v)
	}
	return c.show(w, r, "operations", http.StatusOK, page{Title: "Operations", Section: "operations", Body: body})
}

// mayOperation is an operation that who asks may see.
func (c *Console) mayOperation(r *http.Request, id string) (service.Operation, error) {
	o, err := c.Service.Operation(r.Context(), id)
	if err == nil {
		err = c.exists(r, place{Registry: o.Registry, Repository: o.Repository})
	}
	return o, err
}

func (c *Console) operation(w http.ResponseWriter, r *http.Request, at place) error {
	o, err := c.mayOperation(r, at.ID)
	if err != nil {
		return err
	}
	v := c.operationView(r, o)
	return c.show(w, r, "operation", http.StatusOK, page{
		Title: "Conversion of " + v.Name, Section: "operations", Refresh: v.Ongoing, Body: v,
		Crumbs: []crumb{{"Operations", "/operations"}, {o.ID, ""}},
	})
}

func (c *Console) cancel(w http.ResponseWriter, r *http.Request, at place) error {
	o, err := c.mayOperation(r, at.ID)
	if err != nil {
		return err
	}
	at.Registry, at.Repository = o.Registry, o.Repository
	if err := c.need(r, access.Writer, "cancel", at); err != nil {
		return err
	}
	_, err = c.Service.Cancel(r.Context(), o.ID, access.From(r.Context()).Name)
	c.audit(r, "cancel", at, o.ID, err)
	notice := "canceling"
	if errors.Is(err, service.ErrNotRunning) {
		notice = "ended"
	} else if err != nil {
		return err
	}
	path := operationPath(o.ID)
	if r.PostForm.Get("from") == "image" {
		path = imageOf(o)
	}
	redirect(w, r, done(path, notice))
	return nil
}

// How long a stream of events goes on before the browser asks again, with whatever rights it has then, and how long it is silent at most:
// proxies end what is silent, and somebody who has gone is found out.
const (
	streamFor = 15 * time.Minute
	heartbeat = 15 * time.Second
)

// events is a stream of server-sent events: the part of the page that shows the progress, at each change, until the operation has ended.
func (c *Console) events(w http.ResponseWriter, r *http.Request, at place) error {
	if _, err := c.mayOperation(r, at.ID); err != nil {
		return err
	}
	ctx := r.Context()
	changes, err := c.Service.Watch(ctx, at.ID)
	if err != nil {
		return err
	}
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // nginx
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	beat, end := time.NewTicker(heartbeat), time.NewTimer(streamFor)
	defer beat.Stop()
	defer end.Stop()
	send := func(text string) bool {
		_ = rc.SetWriteDeadline(time.Now().Add(2 * heartbeat)) // where the server cannot, its own holds
		_, err := w.Write([]byte(text))
		return err == nil && rc.Flush() == nil
	}
	defer func() { _ = rc.SetWriteDeadline(time.Time{}) }() // for the next request of the connection
	for ok := send(": hello\n\n"); ok; {
		select {
		case o, more := <-changes:
			if !more {
				send("event: end\ndata: end\n\n")
				return nil
			}
			text, err := c.event(r, o)
			if err != nil {
				c.Log.Error("console", "path", r.URL.Path, "error", err)
				return nil
			}
			ok = send(text)
		case <-beat.C:
			ok = send(": still here\n\n")
		case <-end.C:
			return nil
		case <-c.Closing:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// event is one of the stream: the part "progress" of the page.
func (c *Console) event(r *http.Request, o service.Operation) (string, error) {
	var b bytes.Buffer
	if err := c.pages["operation"].ExecuteTemplate(&b, "progress", c.operationView(r, o)); err != nil {
		return "", err
	}
	var out strings.Builder
	out.WriteString("event: progress\n")
	for line := range strings.SplitSeq(b.String(), "\n") {
		if line = strings.TrimSpace(line); line != "" {
			out.WriteString("data: " + line + "\n")
		}
	}
	out.WriteString("\n")
	return out.String(), nil
}

// imageOf is the path of an operation's image.
func imageOf(o service.Operation) string {
	if o.Tag != "" {
		return imagePath(o.Registry, o.Repository, o.Tag)
	}
	return imagePath(o.Registry, o.Repository, o.Digest.String())
}

// operationsOf is the path of a repository's operations.
func operationsOf(registry, repository string) string {
	return "/operations?" + url.Values{"registry": {registry}, "repository": {repository}}.Encode()
}
