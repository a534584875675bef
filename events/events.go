// Package events puts Kubernetes events on the pods whose images are pulled, or turn out to be bad later: what `kubectl describe pod` shows under the kubelet's own.
//
// Which pods: those that the CRI proxy knows the pull to be for, or else the pods of this node that have the image and wait for it. The rights to create events and, without the proxy, to list the node's pods are
// all that it takes; a kubelet's kubeconfig has them.
//
// The principle: an event is a courtesy. Telling of a pull never waits. At most maxQueued pulls wait for their events, and what is more is left out; each request is made once, one after the other; and
// what has been said of a pod is said again only after a while, with how often it came meanwhile. What fails is told once for each place where it does, until all works again, and a namespace that takes no events keeps no other pod from its own, nor what else fails from being told.
package events

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const (
	component = "streaming-snapshotter"

	maxQueued  = 64
	maxPods    = 64   // that one pull is told to
	maxMessage = 1000 // bytes; the API's bound for the newer kind of events is 1024

	quiet   = 10 * time.Minute
	maxTold = 1024
	// given is after how long a failure counts no more that nobody has tried again: its namespace may be gone.
	given = time.Hour
	// another is when to look a second time for the pods of a pull: the API server may have learnt of them after the kubelet, which asked another one.
	another = time.Second

	// mirror is the annotation with which a static pod's object in the API server says what the pod's UID is for its kubelet, and for kubectl when it looks for events.
	mirror = "kubernetes.io/config.mirror"
)

// Pod names a pod.
type Pod struct{ Namespace, Name, UID string }

// Event is what happened to the pull of an image, or to what was pulled.
type Event struct {
	Reason  string // "Streaming": a word for programs
	Code    string // further words for programs: events of a pod that differ in neither are the same
	Message string
	At      time.Time
	Warning bool // whoever sees the pod is to do something
}

// Recorder puts events on pods. It is safe for concurrent use.
type Recorder struct {
	api     *kubeapi.Client
	node    string
	onError func(error)
	queue   chan notice

	mu      sync.Mutex
	pulling map[*pull]bool

	// Of Run:
	failing map[place]time.Time // when it failed last
	told    map[subject]*last
}

// notice is what is to be told of.
type notice struct {
	image string // or what else it is about
	event Event
	pods  []Pod                   // none: those that wait for the image
	has   func(image string) bool // not nil: those that have such an image
}

// pull is one that the CRI proxy sees.
type pull struct {
	image reference
	pod   Pod
}

// subject is what events are counted by. A pod's UID alone does not name it: the annotation mirror is its author's.
type subject struct {
	pod                 Pod
	image, reason, code string
}

// place is what can fail apart from the rest: the events of a namespace, of which this is the name, or one of these.
type place string

const (
	server place = ""
	list   place = "/pods" // no namespace has a slash
)

// last is when that was said, and how often it came since, and first.
type last struct {
	at, since time.Time
	count     int
}

// New returns a Recorder for the pods of a node, with the connection of a kubeconfig. onError is told when events cannot be put on pods, each time that something else begins to fail, and with nil when all can again; it must not block.
func New(kubeconfig, node string, onError func(error)) *Recorder {
	return &Recorder{
		api: kubeapi.New(kubeconfig), node: node, onError: onError, queue: make(chan notice, maxQueued),
		pulling: map[*pull]bool{}, told: map[subject]*last{}, failing: map[place]time.Time{},
	}
}

// Begin notes that an image is pulled for a pod, until done is called.
func (r *Recorder) Begin(image string, pod Pod) (done func()) {
	p := &pull{parse(image), pod}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pulling[p] = true
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.pulling, p)
	}
}

// Tell has e put on the pods that pull an image. It returns at once.
func (r *Recorder) Tell(image string, e Event) {
	n := notice{image: image, event: e}
	of := parse(image)
	r.mu.Lock()
	for p := range r.pulling {
		if of != (reference{}) && p.image == of && !slices.Contains(n.pods, p.pod) {
			n.pods = append(n.pods, p.pod)
		}
	}
	r.mu.Unlock()
	r.enqueue(n)
}

// TellAll has e put on the pods of this node that have an image for which has is true, whether it runs there or is waited for. about names what it is about, as the image does for Tell. has is called later, with
// the pods' own words for their images. TellAll returns at once.
func (r *Recorder) TellAll(about string, has func(image string) bool, e Event) {
	r.enqueue(notice{image: about, event: e, has: has})
}

// enqueue leaves n out if there is too much to tell.
func (r *Recorder) enqueue(n notice) {
	select {
	case r.queue <- n:
	default:
	}
}

// Run sends events until ctx ends.
func (r *Recorder) Run(ctx context.Context) {
	defer r.api.Close()
	for {
		select {
		case n := <-r.queue:
			r.tell(ctx, n)
		case <-ctx.Done():
			return
		}
	}
}

// tell sends what is to be told of a pull, and says what begins to fail, and when all works again that did not.
func (r *Recorder) tell(ctx context.Context, n notice) {
	was := len(r.failing) > 0
	begins := ended(ctx, r.send(ctx, n))
	switch {
	case begins != nil:
		r.onError(begins)
	case was && len(r.failing) == 0:
		r.onError(nil)
	}
}

// fails notes where err is, unless it is no answer: then no place has one. begins is err, if nothing failed there before.
func (r *Recorder) fails(at place, err error) (answered bool, begins error) {
	var status *kubeapi.StatusError
	if answered = errors.As(err, &status); !answered {
		at = server
	}
	if _, known := r.failing[at]; !known {
		begins = err
	}
	r.failing[at] = time.Now()
	return answered, begins
}

// send puts the event on the pods, and returns what begins to fail. A pod that is refused is no reason to leave out the others.
func (r *Recorder) send(ctx context.Context, n notice) (begins error) {
	listed := len(n.pods) == 0
	if listed {
		var err error
		if n.pods, err = r.find(ctx, n); err != nil {
			_, begins = r.fails(list, err)
			return begins
		}
	}
	var errs []error
	for _, p := range inTurn(n.pods)[:min(len(n.pods), maxPods)] {
		put, err := r.put(ctx, p, n)
		if err != nil {
			answered, begins := r.fails(place(p.Namespace), fmt.Errorf("pod %s/%s: %w", p.Namespace, p.Name, err))
			errs = append(errs, begins)
			if !answered {
				break
			}
		}
		if put {
			delete(r.failing, server)
			delete(r.failing, place(p.Namespace))
			if listed {
				delete(r.failing, list)
			}
			maps.DeleteFunc(r.failing, func(_ place, at time.Time) bool { return time.Since(at) > given })
		}
	}
	return errors.Join(errs...)
}

// inTurn has namespaces take turns, in their order: no tenant's pods, however many, keep another's from being told.
func inTurn(pods []Pod) []Pod {
	turn := map[Pod]int{}
	had := map[string]int{}
	for _, p := range pods {
		turn[p] = had[p.Namespace]
		had[p.Namespace]++
	}
	return slices.SortedStableFunc(slices.Values(pods), func(a, b Pod) int { return cmp.Compare(turn[a], turn[b]) })
}

// ended is err, unless it is because Run is to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// find returns the pods that n is for.
func (r *Recorder) find(ctx context.Context, n notice) (pods []Pod, err error) {
	of := parse(n.image)
	if n.has == nil && of == (reference{}) {
		return nil, nil
	}
	is := func(p *kubeapi.Pod) bool {
		return p.WaitsFor(func(image string) bool { return parse(image) == of })
	}
	if n.has != nil {
		is = func(p *kubeapi.Pod) bool { return p.Has(n.has) }
	}
	for again := false; ; again = true {
		all, err := r.api.Pods(ctx, r.node)
		if err != nil {
			return nil, err
		}
		for _, p := range all {
			if !is(&p) {
				continue
			}
			uid := p.Metadata.UID
			if static := p.Metadata.Annotations[mirror]; static != "" {
				uid = static
			}
			pods = append(pods, Pod{p.Metadata.Namespace, p.Metadata.Name, uid})
		}
		if len(pods) > 0 || again || n.has != nil {
			return pods, nil
		}
		select {
		case <-time.After(another):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// put puts an event on a pod, unless the same was said a while ago: then it is counted.
func (r *Recorder) put(ctx context.Context, p Pod, n notice) (put bool, err error) {
	e := n.event
	about := subject{p, n.image, e.Reason, e.Code}
	count, since := 1, e.At
	if l := r.told[about]; l != nil {
		if l.count++; l.count == 1 {
			l.since = e.At
		}
		if e.At.Sub(l.at) < quiet {
			return false, nil
		}
		count, since = l.count, l.since
	}
	if err := r.api.Create(ctx, "namespaces/"+p.Namespace+"/events", r.object(p, e, count, since)); err != nil {
		return false, err
	}
	if len(r.told) >= maxTold {
		clear(r.told) // some are said again too early
	}
	r.told[about] = &last{at: e.At}
	return true, nil
}

// object is the event as the API has it.
func (r *Recorder) object(p Pod, e Event, count int, since time.Time) any {
	kind := "Normal" // of a pull: a container runs either way
	if e.Warning {
		kind = "Warning"
	}
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	return map[string]any{
		"apiVersion":     "v1",
		"kind":           "Event",
		"metadata":       map[string]any{"generateName": p.Name + ".", "namespace": p.Namespace},
		"involvedObject": map[string]any{"apiVersion": "v1", "kind": "Pod", "namespace": p.Namespace, "name": p.Name, "uid": p.UID},
		"type":           kind,
		"reason":         e.Reason,
		"message":        e.Message[:min(len(e.Message), maxMessage)],
		"firstTimestamp": at(since), "lastTimestamp": at(e.At), "count": count,
		"source":             map[string]any{"component": component, "host": r.node},
		"reportingComponent": component,
		"reportingInstance":  r.node,
	}
}

// reference is an image's, as containerd's CRI reads it. The zero value is none.
type reference struct {
	repo registryclient.Repository
	tag  string
	dgst digest.Digest
}

func parse(image string) reference {
	repo, tag, dgst, err := registryclient.ParseReference(image)
	if err != nil {
		return reference{}
	}
	return reference{repo, tag, dgst}
}
