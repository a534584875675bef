package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const (
	podsFresh    = 5 * time.Second  // a list of pods is good for so long
	secretsFresh = 30 * time.Second // and a secret or service account
	maxFormer    = 1024             // images whose secrets are remembered when their pods are gone
	formerOfOne  = 4                // of a namespace's pods with one image
	formerOfAll  = 64               // and of all namespaces'
)

// Kubernetes is the kubernetes.io/dockerconfigjson and dockercfg secrets that pods of this node refer to, themselves or by their service accounts. An image is
// offered the secrets of the pods that have it, and of those that had it since the daemon's start, by name: each secret is got from the API server when it is
// wanted, and none is listed or watched. Namespaces, and the pods of each, take turns: a pod with many secrets, or its owner with many pods, does not keep
// another's from being tried.
//
// So what it takes is: list pods with the field selector spec.nodeName, get secrets, and, for the secrets of service accounts (the pods have those already that
// there were when they were made), get serviceaccounts. The kubelet's own kubeconfig has these rights for the secrets of its own pods and for no others; that it may
// not get service accounts is no error.
//
// While the API server is away, what was got before is offered.
type Kubernetes struct {
	node  string
	calls *calls
	api   *kubeapi.Client

	mu     sync.Mutex
	pods   []pod
	listed time.Time
	got    map[object]*got
	former map[registryclient.Repository][][]object // refs of pods, newest first
}

// object is a secret or a service account.
type object struct{ kind, namespace, name string }

func (o object) String() string { return o.kind + " " + o.namespace + "/" + o.name }

const (
	secrets         = "secrets"
	serviceAccounts = "serviceaccounts"
)

// got is what was said of an object.
type got struct {
	auths auths    // of a secret
	refs  []object // of a service account
	at    time.Time
}

// pod is what of a pod matters here.
type pod struct {
	refs   []object
	images []registryclient.Repository
}

// NewKubernetes returns a source of the secrets for the pods of a node, got with a kubeconfig, which is read again when it changes. Nothing is read before the first Lookup.
func NewKubernetes(kubeconfig, node string) *Kubernetes {
	return &Kubernetes{
		node: node, calls: newCalls(), api: kubeapi.New(kubeconfig),
		got: map[object]*got{}, former: map[registryclient.Repository][][]object{},
	}
}

// Close ends what is asked of the API server.
func (s *Kubernetes) Close() error {
	s.calls.close()
	s.api.Close()
	return nil
}

// Name implements Source.
func (s *Kubernetes) Name() string { return "kubernetes secret" }

// Lookup implements Source.
func (s *Kubernetes) Lookup(ctx context.Context, p registryclient.Place) (list []Login, err error) {
	update := func(fresh time.Duration) error {
		_, err := s.calls.once(ctx, "pods", func(ctx context.Context) (any, error) { return nil, s.list(ctx, fresh) })
		return err
	}
	begin := time.Now()
	errs := []error{update(podsFresh)}
	pods := s.of(p.Image)
	if pods == nil {
		errs[0] = update(time.Since(begin)) // its pod may be newer than the list
		pods = s.of(p.Image)
	}
	found, err := s.follow(ctx, slices.Concat(pods...), false)
	errs = append(errs, err)
	var more []object // secrets, of service accounts too
	for i, refs := range pods {
		for _, o := range refs {
			if g := found[o]; g != nil {
				more = append(more, g.refs...)
				pods[i] = append(slices.Clip(pods[i]), g.refs...)
			}
		}
	}
	others, err := s.follow(ctx, more, true) // what a pod has not itself, its kubelet may not have
	errs = append(errs, err)
	maps.Copy(found, others)
	var namespaces [][][]Login // of each its pods'
	index := map[string]int{}
	said := map[object][]Login{}
	for _, refs := range pods {
		var logins []Login
		for _, o := range refs {
			of, was := said[o]
			if g := found[o]; g != nil && !was {
				for _, name := range p.Names {
					l, err := g.auths.lookup(name)
					of, errs = append(of, l...), append(errs, err)
				}
				said[o] = of
			}
			logins = append(logins, of...)
		}
		i, ok := index[refs[0].namespace]
		if !ok {
			i = len(namespaces)
			index[refs[0].namespace] = i
			namespaces = append(namespaces, nil)
		}
		namespaces[i] = append(namespaces[i], logins)
	}
	lists := make([][]Login, len(namespaces))
	for i, n := range namespaces {
		lists[i] = turns(n)
	}
	return turns(lists), errors.Join(errs...)
}

// turns takes from each list one after the other, and nothing twice.
func turns(lists [][]Login) (all []Login) {
	seen := map[Login]bool{}
	for i, more := 0, true; more; i++ {
		more = false
		for _, l := range lists {
			if i >= len(l) {
				continue
			}
			more = true
			if !seen[l[i]] {
				seen[l[i]] = true
				all = append(all, l[i])
			}
		}
	}
	return all
}

// of returns what pods with the image refer to, and those that had it: not empty, and each list once.
func (s *Kubernetes) of(image registryclient.Repository) (pods [][]object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	add := func(refs []object) {
		if len(refs) > 0 && !slices.ContainsFunc(pods, func(other []object) bool { return slices.Equal(other, refs) }) {
			pods = append(pods, refs)
		}
	}
	for _, p := range s.pods {
		if slices.Contains(p.images, image) {
			add(p.refs)
		}
	}
	for _, refs := range s.former[image] {
		add(refs)
	}
	return pods
}

// follow gets refs, all at once, and returns what there is of them. With lenient, what is forbidden is no error.
func (s *Kubernetes) follow(ctx context.Context, refs []object, lenient bool) (map[object]*got, error) {
	found := map[object]*got{}
	refs = slices.DeleteFunc(slices.Clone(refs), func(o object) bool {
		_, was := found[o]
		found[o] = nil
		return was
	})
	errs := make([]error, len(refs))
	var g errgroup.Group
	g.SetLimit(8)
	for i, o := range refs {
		g.Go(func() error {
			_, err := s.calls.once(ctx, o.String(), func(ctx context.Context) (any, error) { return nil, s.get(ctx, o) })
			var status *kubeapi.StatusError
			if !lenient || !errors.As(err, &status) || status.Code != http.StatusForbidden {
				errs[i] = err
			}
			return nil
		})
	}
	g.Wait() // they return nil
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range refs {
		found[o] = s.got[o]
	}
	return found, errors.Join(errs...)
}

// list gets the node's pods, if the last list is older than fresh.
func (s *Kubernetes) list(ctx context.Context, fresh time.Duration) error {
	s.mu.Lock()
	age := time.Since(s.listed)
	s.mu.Unlock()
	if age < fresh {
		return nil
	}
	items, err := s.api.Pods(ctx, s.node)
	if err != nil {
		return err
	}
	pods := make([]pod, len(items))
	for i, item := range items {
		p, namespace := &pods[i], item.Metadata.Namespace
		p.refs = secretsOf(namespace, item.Spec.ImagePullSecrets)
		if name := item.Spec.ServiceAccountName; name != "" {
			p.refs = append(p.refs, object{serviceAccounts, namespace, name})
		}
		for _, image := range item.Images() {
			if repo, _, _, err := registryclient.ParseReference(image); err == nil {
				p.images = append(p.images, repo)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remember()
	s.pods, s.listed = pods, time.Now()
	return nil
}

// remember keeps what the pods refer to for when they are gone: their image may stay, and be read. The caller holds mu.
func (s *Kubernetes) remember() {
	for _, p := range s.pods {
		for _, image := range p.images {
			if len(s.former) >= maxFormer && s.former[image] == nil {
				clear(s.former) // the pods that there are come again
			}
			s.former[image] = newest(s.former[image], p.refs)
		}
	}
}

// newest puts the refs of a pod in front of those of others, and drops the oldest: of a namespace that has too many, so that it drops no other's.
func newest(former [][]object, refs []object) (list [][]object) {
	had := map[string]int{}
	for _, f := range append([][]object{refs}, former...) {
		if len(f) == 0 || len(list) > 0 && slices.Equal(f, list[0]) {
			continue
		}
		if n := f[0].namespace; had[n] < formerOfOne && len(list) < formerOfAll {
			had[n]++
			list = append(list, f)
		}
	}
	return list
}

// secretsOf are those of a namespace that are referred to by names that secrets can have: of others the API server does not say a word to whoever writes them, and the kubelet takes none.
func secretsOf(namespace string, refs []struct{ Name string }) (list []object) {
	for _, r := range refs {
		if kubeapi.IsName(r.Name) {
			list = append(list, object{secrets, namespace, r.Name})
		}
	}
	return list
}

// get gets o into s.got. What is gone or forbidden goes from there, and what cannot be asked for stays.
func (s *Kubernetes) get(ctx context.Context, o object) error {
	s.mu.Lock()
	old := s.got[o]
	s.mu.Unlock()
	if old != nil && time.Since(old.at) < secretsFresh {
		return nil
	}
	g := &got{at: time.Now()}
	var r struct {
		Data             map[string][]byte // of a secret
		ImagePullSecrets []struct{ Name string }
	}
	err := s.api.Get(ctx, "namespaces/"+o.namespace+"/"+o.kind+"/"+o.name, nil, &r)
	var status *kubeapi.StatusError
	refused := errors.As(err, &status) && (status.Code == http.StatusNotFound || status.Code == http.StatusForbidden)
	if refused && o.kind == serviceAccounts {
		err = nil // most have no secrets
	}
	if err != nil && !refused {
		return fmt.Errorf("%s: %w", o, err)
	}
	g.refs = secretsOf(o.namespace, r.ImagePullSecrets)
	if err == nil && o.kind == secrets {
		g.auths, err = parseSecret(r.Data)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.got) > maxFormer {
		clear(s.got)
	}
	s.got[o] = g
	if err != nil {
		return fmt.Errorf("%s: %w", o, err)
	}
	return nil
}

// parseSecret reads a secret of one of the two types.
func parseSecret(data map[string][]byte) (auths, error) {
	var entries map[string]json.RawMessage
	var err error
	switch {
	case data[".dockerconfigjson"] != nil:
		var c struct{ Auths map[string]json.RawMessage }
		err = json.Unmarshal(data[".dockerconfigjson"], &c)
		entries = c.Auths
	case data[".dockercfg"] != nil:
		err = json.Unmarshal(data[".dockercfg"], &entries)
	default:
		return nil, errors.New("neither of type kubernetes.io/dockerconfigjson nor kubernetes.io/dockercfg")
	}
	if err != nil {
		return nil, errors.New("malformed") // the text of err may show some of a secret
	}
	return parseAuths(entries), nil
}
