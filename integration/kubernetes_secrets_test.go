package integration_test

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// TestKubernetesSecrets: the secrets that a node's pods refer to, got from the API server as the kubelet, and as one who has the rights that docs/operations.md names.
func TestKubernetesSecrets(t *testing.T) {
	if !ownMachine(t) {
		return
	}
	registry, ref, img := private(t, 443)
	n := startKubernetes(t, node.Options{Stream: []string{registry.Host() + "/*"}, Config: "kubeconfig = \"DIR/kubelet.kubeconfig\"\nnode_name = \"" + node.NodeName + "\"\n"})
	user, password, _ := strings.Cut(creds, ":")
	kubectl(t, n, "create", "secret", "docker-registry", "regcred", "--docker-server="+registry.Host(), "--docker-username="+user, "--docker-password="+password)
	pod{Name: "app", Image: ref, Secret: "regcred"}.streams(t, n, registry, img, 443)
	wantAccepted(t, n, registry.Host(), "kubernetes secret")

	s := &secretsTest{T: t, n: n, reader: filepath.Join(tempDir(t), "kubeconfig")}
	s.objects()
	s.offered()
	s.changes()
}

// secretsTest is a cluster with the objects below.
type secretsTest struct {
	*testing.T
	n      *node.Node
	reader string // kubeconfig of the service account reader
}

// secretOf is a secret for a user of a registry's host, with the password "hush".
func secretOf(namespace, name, kind, host, user string) string {
	key, text := ".dockercfg", fmt.Sprintf(`{%q: {"auth": %q}}`, host, base64.StdEncoding.EncodeToString([]byte(user+":hush")))
	if kind == "dockerconfigjson" {
		key, text = ".dockerconfigjson", `{"auths": `+text+`}`
	}
	return fmt.Sprintf("---\n{apiVersion: v1, kind: Secret, type: kubernetes.io/%s, metadata: {namespace: %s, name: %s}, stringData: {%s: %q}}\n", kind, namespace, name, key, text)
}

// objects are three namespaces with a pod each, which never run: their images are in no registry. And the reader.
func (s *secretsTest) objects() {
	s.Helper()
	s.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: one}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: two}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: three}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {namespace: two, name: builder}, imagePullSecrets: [{name: old}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules:
- {apiGroups: [""], resources: [pods], verbs: [list]}
- {apiGroups: [""], resources: [secrets, serviceaccounts], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, namespace: default, name: reader}]
` + secretOf("one", "regcred", "dockerconfigjson", "r.example.com", "a") +
		secretOf("one", "another", "dockerconfigjson", "r.example.com", "nobody's") +
		secretOf("two", "old", "dockercfg", "https://r.example.com/v1/", "b") +
		secretOf("two", "late", "dockerconfigjson", "r.example.com", "c") +
		secretOf("two", "private", "dockerconfigjson", "r.example.com", "nobody's, of another namespace") +
		secretOf("three", "regcred", "dockerconfigjson", "https://index.docker.io/v1/", "d") +
		"---\n{apiVersion: v1, kind: Secret, metadata: {namespace: three, name: none}, stringData: {.dockerconfigjson: hush}}\n")
	for _, namespace := range []string{"one", "two", "three"} {
		kubectl(s.T, s.n, "wait", "--for=create", "serviceaccount/default", "--namespace", namespace, "--timeout=1m")
	}
	s.apply(`apiVersion: v1
kind: Pod
metadata: {namespace: one, name: app}
spec:
  nodeName: ` + node.NodeName + `
  imagePullSecrets: [{name: regcred}, {name: gone}, {name: ../../two/secrets/private}] # the last is no name
  initContainers: [{name: init, image: r.example.com/team/init, imagePullPolicy: Never}]
  containers: [{name: main, image: "r.example.com/team/app:v1", imagePullPolicy: Never}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: two, name: app}
spec:
  nodeName: ` + node.NodeName + `
  serviceAccountName: builder
  containers: [{name: main, image: "r.example.com/team/app@sha256:` + strings.Repeat("0", 64) + `", imagePullPolicy: Never}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: three, name: app}
spec:
  nodeName: ` + node.NodeName + `
  imagePullSecrets: [{name: regcred}, {name: none}]
  containers: [{name: main, image: busybox, imagePullPolicy: Never}]
`)
	kubectl(s.T, s.n, "patch", "serviceaccount", "builder", "--namespace=two", "--patch={\"imagePullSecrets\": [{\"name\": \"late\"}]}") // its pod has only the other
	s.login()
}

func (s *secretsTest) apply(manifest string) {
	s.Helper()
	if err := s.n.Kubernetes.Apply(s.Context(), manifest); err != nil {
		s.Fatal(err)
	}
}

// login makes the reader, and its kubeconfig.
func (s *secretsTest) login() {
	s.Helper()
	kubectl(s.T, s.n, "create", "serviceaccount", "reader")
	loginAs(s.T, s.n.Kubernetes, s.reader, "reader")
}

// What is wrong with two of the secrets.
const (
	missing   = `secrets one/gone: API server: status 404: secrets "gone" not found`
	malformed = "secrets three/none: malformed"
)

// offered: an image is offered what its own pods refer to. The kubelet may have no other secret, and the reader may not list any: so no other is asked for.
func (s *secretsTest) offered() {
	s.Helper()
	for kubeconfig, late := range map[string][]string{s.n.Kubernetes.KubeletKubeconfig(): nil, s.reader: {"c"}} {
		for image, want := range map[string]struct {
			users []string
			err   string
		}{
			"r.example.com/team/app":   {append([]string{"a", "b"}, late...), missing},
			"r.example.com/team/init":  {[]string{"a"}, missing},
			busybox:                    {[]string{"d"}, malformed},
			"r.example.com/team/other": {},
		} {
			source := credentials.NewKubernetes(kubeconfig, node.NodeName)
			users, err := lookup(s.T, source, image)
			if said := fmt.Sprint(err); !slices.Equal(users, want.users) || said != cmp.Or(want.err, "<nil>") {
				s.Errorf("%s, %s: got %q, %v, want %+v", filepath.Base(kubeconfig), image, users, err, want)
			}
			if err := source.Close(); err != nil {
				s.Error(err)
			}
		}
	}
	elsewhere := credentials.NewKubernetes(s.reader, "node2")
	defer elsewhere.Close()
	if users, err := lookup(s.T, elsewhere, busybox); len(users) > 0 || err != nil {
		s.Errorf("another node: got %q, %v", users, err)
	}
}

// changes: what is renewed is got anew; what an image was pulled with serves it when its pod is gone, or the API server.
func (s *secretsTest) changes() {
	s.Helper()
	source := credentials.NewKubernetes(s.reader, node.NodeName)
	defer source.Close()
	wait := func(what, image, user, errHas string) {
		s.Helper()
		var users []string
		var err error
		defer func() {
			if s.Failed() {
				s.Logf("got %q, %v", users, err)
			}
		}()
		eventually(s.T, what, func() bool {
			users, err = lookup(s.T, source, image)
			return slices.Equal(users, strings.Fields(user)) && strings.Contains(fmt.Sprint(err), errHas)
		})
	}
	wait("a secret", busybox, "d", malformed)
	s.apply(secretOf("three", "regcred", "dockerconfigjson", "https://index.docker.io/v1/", "e"))
	wait("a secret that was renewed", busybox, "e", malformed)
	kubectl(s.T, s.n, "delete", "pod", "app", "--namespace=three", "--force")
	if users, err := lookup(s.T, source, "r.example.com/team/other"); len(users) > 0 || err != nil { // which lists pods anew
		s.Errorf("got %q, %v", users, err)
	}
	wait("the secret of a pod that is gone", busybox, "e", malformed)
	kubectl(s.T, s.n, "delete", "serviceaccount", "reader")
	wait("what there was, of one whom the API server does not know any more", busybox, "e", "status 401")
	s.login()
	wait("the same with the next kubeconfig", busybox, "e", malformed)
	kubectl(s.T, s.n, "delete", "secret", "regcred", "--namespace=three")
	wait("nothing of a secret that is gone", busybox, "", "status 404")
	wait("another secret", "r.example.com/team/init", "a", "")
	if err := s.n.Kubernetes.Close(); err != nil {
		s.Fatal(err)
	}
	wait("what there was, without an API server", "r.example.com/team/init", "a", "connection refused")
}

const busybox = "docker.io/library/busybox"

// lookup returns the users whose credentials an image is offered, sorted.
func lookup(t *testing.T, source credentials.Source, image string) (users []string, err error) {
	r := registryclient.Repository(image)
	logins, err := source.Lookup(t.Context(), registryclient.Place{Image: r, Names: []registryclient.Repository{r}})
	for _, l := range logins {
		users = append(users, l.User)
	}
	slices.Sort(users)
	return users, err
}
