package kubeapi

import (
	"context"
	"fmt"
	"slices"
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
	}
}

// Container is one of a pod, of whatever kind.
type Container struct{ Name, Image string }

// ContainerStatus says what became of one.
type ContainerStatus struct {
	Name             string
	State, LastState struct{ Running, Terminated *struct{} }
}

// Pods lists the pods of a node, out of the server's memory: one that was bound a moment ago may be missing.
func (c *Client) Pods(ctx context.Context, node string) ([]Pod, error) {
	var l struct{ Items []Pod }
	if err := c.Get(ctx, "pods", map[string]string{"fieldSelector": "spec.nodeName=" + node, "resourceVersion": "0"}, &l); err != nil {
		return nil, fmt.Errorf("list pods of node %s: %w", node, err)
	}
	return l.Items, nil
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
