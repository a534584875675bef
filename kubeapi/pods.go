package kubeapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"
)

// maxPods bounds those of a node, of which Kubernetes recommends 110: in memory an empty one takes a hundred times its bytes in the answer.
const maxPods = 4096

var (
	errTooMany = fmt.Errorf("the API server's answer has more than %d pods", maxPods)
	errNoList  = errors.New("no list")
)

// Pod is what of a pod matters here.
type Pod struct {
	Metadata struct {
		Namespace, Name, UID string
		Annotations          map[string]string
	}
	Spec struct {
		ServiceAccountName                              string
		ImagePullSecrets                                []struct{ Name string }
		Containers, InitContainers, EphemeralContainers []Container
		Volumes                                         []struct{ Image *struct{ Reference string } }
	}
	Status struct {
		Phase                                                                string
		ContainerStatuses, InitContainerStatuses, EphemeralContainerStatuses []ContainerStatus
		Conditions                                                           []struct {
			Type, Status       string
			LastTransitionTime time.Time
		}
	}
}

// Container is one of a pod, of whatever kind.
type Container struct {
	Name, Image                  string
	ReadinessProbe, StartupProbe *struct{}
}

// ContainerStatus says what became of one.
type ContainerStatus struct {
	Name             string
	State, LastState struct {
		Running    *struct{ StartedAt time.Time }
		Terminated *struct{}
	}
}

// Pods lists the pods of a node, out of the server's memory: one that was bound a moment ago may be missing. More than maxPods are an error.
func (c *Client) Pods(ctx context.Context, node string) (pods []Pod, err error) {
	query := map[string]string{"fieldSelector": "spec.nodeName=" + node, "resourceVersion": "0"}
	err = c.do(ctx, http.MethodGet, "pods", query, "", nil, func(d *json.Decoder) error {
		return eachItem(d, func() error {
			if len(pods) == maxPods {
				return errTooMany
			}
			pods = append(pods, Pod{})
			return d.Decode(&pods[len(pods)-1])
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list pods of node %s: %w", node, err)
	}
	return pods, nil
}

// eachItem calls decode for each item of a list, which is an object with the array "items", or null.
func eachItem(d *json.Decoder, decode func() error) error {
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return errors.Join(err, errNoList)
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if key != "items" {
			if err := d.Decode(new(json.RawMessage)); err != nil {
				return err
			}
			continue
		}
		t, err := d.Token()
		if err != nil || t != nil && t != json.Delim('[') {
			return errors.Join(err, errNoList)
		}
		for t != nil && d.More() {
			if err := decode(); err != nil {
				return err
			}
		}
		if t != nil {
			if _, err := d.Token(); err != nil {
				return err
			}
		}
	}
	_, err := d.Token()
	return err
}

// Images lists the references of the pod's images, of volumes too.
func (p *Pod) Images() (list []string) {
	for _, c := range slices.Concat(p.Spec.Containers, p.Spec.InitContainers, p.Spec.EphemeralContainers) {
		list = append(list, c.Image)
	}
	for _, v := range p.Spec.Volumes {
		if v.Image != nil {
			list = append(list, v.Image.Reference)
		}
	}
	return list
}

// Has reports whether the pod is not over, and has an image that is wanted.
func (p *Pod) Has(wanted func(image string) bool) bool {
	return p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed" && slices.ContainsFunc(p.Images(), wanted)
}

// WaitsFor reports whether a container of the pod with an image that is wanted has never started, or, of a volume's image, the pod has not.
func (p *Pod) WaitsFor(wanted func(image string) bool) bool {
	started := map[string]bool{} // names are a pod's own, whatever the kind of container
	for _, s := range slices.Concat(p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses) {
		started[s.Name] = s.State.Running != nil || s.State.Terminated != nil || s.LastState.Terminated != nil
	}
	for _, c := range slices.Concat(p.Spec.Containers, p.Spec.InitContainers, p.Spec.EphemeralContainers) {
		if !started[c.Name] && wanted(c.Image) {
			return true
		}
	}
	for _, v := range p.Spec.Volumes {
		if v.Image != nil && p.Status.Phase == "Pending" && wanted(v.Image.Reference) {
			return true
		}
	}
	return false
}

// Ready returns since when the pod is ready, if a container of it with an image that is wanted has started since then and has a probe that says when it is ready. Known is false if there is no such container; a zero
// time is a pod that is not ready. Kubernetes knows times to the second.
func (p *Pod) Ready(wanted func(image string) bool, since time.Time) (at time.Time, known bool) {
	for _, c := range p.Spec.Containers {
		i := slices.IndexFunc(p.Status.ContainerStatuses, func(s ContainerStatus) bool { return s.Name == c.Name })
		if i < 0 || c.ReadinessProbe == nil && c.StartupProbe == nil || !wanted(c.Image) {
			continue
		}
		s := p.Status.ContainerStatuses[i].State
		known = known || s.Running != nil && !s.Running.StartedAt.Before(since.Truncate(time.Second))
	}
	if !known {
		return at, false
	}
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" && c.Status == "True" {
			at = c.LastTransitionTime
		}
	}
	return at, true
}
