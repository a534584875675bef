package main

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi/kubeapitest"
)

// TestWatch: the node has the label while its daemon is ready, and for ten seconds more; what cannot be said is tried again, less and less often.
func TestWatch(t *testing.T) {
	server := kubeapitest.Start(t)
	var safe atomic.Bool
	daemon := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if safe.Load() {
			http.Error(w, "safe mode", http.StatusServiceUnavailable)
		}
	}))
	defer daemon.Close()
	w := &nodeWatch{node: "node-1", label: readyLabel, url: daemon.URL + "/readyz", api: kubeapi.New(server.Kubeconfig)}
	defer w.api.Close()
	const yes, no = `{"metadata":{"labels":{"` + readyLabel + `":"true"}}}`, `{"metadata":{"labels":{"` + readyLabel + `":null}}}`
	const ready, refused = true, "403"
	const notReady, notSet = "the daemon is not ready: ", "the node's label " + readyLabel + " could not be set: API server: status 403"
	start := time.Now()
	w.readyAt = start
	for i, step := range []struct {
		after time.Duration
		ready bool
		api   string // what the API server answers
		asked bool
		told  string
		why   string
	}{
		{0, ready, "{}", true, yes, ""},
		{2 * time.Second, ready, "{}", false, "", ""},
		{3 * time.Second, !ready, "{}", false, "", notReady},
		{11 * time.Second, !ready, "{}", false, "", notReady},
		{12 * time.Second, !ready, "{}", true, no, notReady},
		{14 * time.Second, ready, "{}", true, yes, ""},
		{16 * time.Second, !ready, "{}", false, "", notReady},
		{18 * time.Second, ready, "{}", false, "", ""},
		{15*time.Second + sayAgain, ready, refused, true, "", notSet},
		{16*time.Second + sayAgain, ready, refused, false, "", notSet},
		{17*time.Second + sayAgain, ready, refused, true, "", notSet},
		{20*time.Second + sayAgain, ready, refused, false, "", notSet},
		{21*time.Second + sayAgain, ready, "{}", true, yes, ""},
		{22*time.Second + sayAgain, ready, "{}", false, "", ""},
	} {
		safe.Store(!step.ready)
		server.Put("nodes/node-1", step.api)
		w.look(t.Context(), start.Add(step.after))
		why, told := "", ""
		if p := w.why.Load(); p != nil {
			why = *p
		}
		for _, b := range server.Posted() {
			told += string(b)
		}
		if asked := len(server.Requests()) > 0; asked != step.asked || told != step.told || !strings.HasPrefix(why, step.why) || (why == "") != (step.why == "") {
			t.Errorf("step %d: asked %v, told %q, not ready for %q, want %+v", i, asked, told, why, step)
		}
		answer := httptest.NewRecorder()
		w.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		if (answer.Code == http.StatusOK) != (step.why == "") {
			t.Errorf("step %d: /readyz is %d", i, answer.Code)
		}
	}
}

// TestWatchRemoves: the label goes whatever the daemon is, and a server that refuses is an error.
func TestWatchRemoves(t *testing.T) {
	server := kubeapitest.Start(t)
	w := &nodeWatch{node: "node-1", label: readyLabel, api: kubeapi.New(server.Kubeconfig)}
	defer w.api.Close()
	for _, refused := range []bool{true, false} {
		answer := "{}"
		if refused {
			answer = "403"
		}
		server.Put("nodes/node-1", answer)
		if err := w.remove(t.Context()); (err != nil) != refused {
			t.Errorf("refused %v: %v", refused, err)
		}
	}
	if told := server.Posted(); len(told) != 1 || string(told[0]) != `{"metadata":{"labels":{"`+readyLabel+`":null}}}` {
		t.Errorf("told %q", told)
	}
}

// TestDaemonSet: what deploy/daemonset says to this program it takes, its configurations are some, and what its kustomizations name is there. integration's test has kubectl apply it.
func TestDaemonSet(t *testing.T) {
	const top = "../../deploy/daemonset"
	type patchOp struct {
		Op, Path string
		Value    any
	}
	type container struct {
		Args            []string
		SecurityContext struct {
			Privileged bool
			RunAsUser  int
		}
	}
	const own = 64738 // the node's processes are in sight, and who has the user of some can signal them
	var kustomizations, configs, commands int
	var installs []string // the arguments of install
	var more []patchOp
	takes := func(args []string) {
		t.Helper()
		commands++
		cmd, rest, err := newCommand().Find(args)
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err == nil && (cmd.RunE == nil || cmd.Flags().NArg() != 0) {
			err = fs.ErrInvalid
		}
		if err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if filepath.Ext(path) == ".toml" {
			configs++
			c, err := loadConfig(path)
			if err == nil {
				_, err = readyURL(c.Metrics)
			}
			if err != nil {
				t.Error(err)
			}
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for doc := range strings.SplitSeq(string(b), "\n---\n") {
			var o struct {
				Kind                  string
				Resources, Components []string
				ConfigMapGenerator    []struct{ Files []string }
				Patches               []struct{ Patch string }
				Spec                  struct {
					Template struct {
						Spec struct{ InitContainers, Containers []container }
					}
				}
			}
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			if o.Kind == "Kustomization" || o.Kind == "Component" {
				kustomizations++
			}
			named := slices.Concat(o.Resources, o.Components)
			for _, g := range o.ConfigMapGenerator {
				named = append(named, g.Files...)
			}
			for _, name := range named {
				if _, err := os.Stat(filepath.Join(filepath.Dir(path), name)); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
			for _, p := range o.Patches {
				var ops []patchOp
				if err := yaml.Unmarshal([]byte(p.Patch), &ops); err != nil {
					t.Errorf("%s: %v", path, err)
				}
				more = append(more, ops...)
			}
			for _, c := range slices.Concat(o.Spec.Template.Spec.InitContainers, o.Spec.Template.Spec.Containers) {
				takes(c.Args)
				if user := c.SecurityContext.RunAsUser; user != own && !c.SecurityContext.Privileged {
					t.Errorf("%s: %q runs as user %d, want one of its own, %d", path, c.Args, user, own)
				}
				if c.Args[0] == "install" {
					installs = c.Args
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range more {
		switch value := op.Value.(type) {
		case map[string]any: // a container
			if list, ok := value["args"].([]any); ok {
				takes(stringsOf(list))
				if c, _ := value["securityContext"].(map[string]any); c["runAsUser"] != float64(own) {
					t.Errorf("%v runs as user %v, want %d", value["name"], c["runAsUser"], own)
				}
			}
		case []any: // all arguments
			if strings.HasSuffix(op.Path, "/args") {
				takes(stringsOf(value))
			}
		case string:
			if strings.HasSuffix(op.Path, "/initContainers/0/args/-") {
				takes(append(slices.Clone(installs), value))
			}
		}
	}
	if kustomizations != 6 || configs != 2 || commands != 5 {
		t.Errorf("looked at %d kustomizations, %d configurations and %d commands", kustomizations, configs, commands)
	}
	for metrics, want := range map[string]string{"": "", "127.0.0.1:9465": "http://127.0.0.1:9465/readyz", ":9465": "http://127.0.0.1:9465/readyz", "0.0.0.0:1": "http://127.0.0.1:1/readyz", "[::]:1": "http://127.0.0.1:1/readyz", "[::1]:1": "http://[::1]:1/readyz"} {
		if got, err := readyURL(metrics); got != want || (err == nil) != (want != "") {
			t.Errorf("metrics %q: %q, %v", metrics, got, err)
		}
	}
}

func stringsOf(list []any) (all []string) {
	for _, v := range list {
		all = append(all, v.(string))
	}
	return all
}
