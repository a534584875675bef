package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streamctl/serve"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// scraped is how AgentBaker's tests find an operation in what create prints.
var scraped = regexp.MustCompile(`--id\s+([0-9a-fA-F-]{36})`)

// startService serves with a configuration until the test ends, and returns its URL. DATA in the configuration is a directory.
func startService(t *testing.T, config string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "serve.toml")
	text := "listen = '127.0.0.1:0'\ndata_dir = 'DATA'\naudit_log = ''\n" + config
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, "DATA", t.TempDir())), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := serve.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ready, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- serve.Run(ctx, c, serve.Options{Version: "test", Stdout: io.Discard, Log: slog.New(slog.DiscardHandler), Ready: func(a net.Addr) { ready <- a }})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
		ended <- nil
	})
	select {
	case a := <-ready:
		return "http://" + a.String()
	case err := <-ended:
		ended <- nil
		t.Fatalf("serve: %v", err)
	}
	return ""
}

// TestServiceCommands goes through an image's life with every command, as it is with the conversion service.
func TestServiceCommands(t *testing.T) {
	host := registrytest.Start(t, registrytest.Options{}).Host()
	image := host + "/team/app:v1"
	subject := putImage(t, image, "linux/amd64")
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("0123456789abcdefghij\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := startService(t, fmt.Sprintf("[[registry]]\nname = %q\n[[token]]\nname = 'me'\nfile = %q\ngrants = [{role = 'owner'}]\n", host, token))
	t.Setenv("STREAMCTL_SERVER", server)
	if status, _, stderr := streamctl(t, "create", image); status != 1 || !strings.Contains(stderr, "401") && !strings.Contains(strings.ToLower(stderr), "unauthor") && !strings.Contains(stderr, "token") {
		t.Errorf("without a token: status %d, %s", status, stderr)
	}
	t.Setenv("STREAMCTL_TOKEN_FILE", token)

	stdout, stderr := succeed(t, "create", "-n", host, "-t", "team/app:v1", "-o", "json")
	var created submitted
	if err := json.Unmarshal([]byte(stdout), &created); err != nil || created.Status != service.Succeeded || len(created.Artifacts) != 1 || created.Image != image {
		t.Fatalf("create -o json: %v\n%s", err, stdout)
	}
	if m := scraped.FindStringSubmatch(stderr); m == nil || m[1] != created.ID {
		t.Errorf("create says %q, want --id %s in it", stderr, created.ID)
	}
	stdout, stderr = succeed(t, "create", image)
	if want := "The streaming artifact for image '" + image + "' already exists. Skipping request.\n"; stderr != want || stdout != "" {
		t.Errorf("create again says %q and prints %q, want %q", stderr, stdout, want)
	}
	checkOperations(t, host, created.ID, subject.String())
	checkSame(t, image)
	checkSettings(t, host)

	if stdout, _ = succeed(t, "delete", image); !strings.Contains(stdout, created.Artifacts[0].Digest.String()) {
		t.Errorf("delete prints %s", stdout)
	}
	if stdout, _ = succeed(t, "list-referrers", image, "-o", "json"); !strings.Contains(stdout, `"manifests": []`) {
		t.Errorf("after delete: %s", stdout)
	}
	if status, _, stderr := streamctl(t, "create", host+"/team/none:v1"); status != 1 || !strings.Contains(stderr, "Could not find image '"+host+"/team/none:v1'.") {
		t.Errorf("create of nothing: status %d, %s", status, stderr)
	}
}

// TestServiceFailure: what cannot be converted says so in the same words, with a service and without.
func TestServiceFailure(t *testing.T) {
	host := registrytest.Start(t, registrytest.Options{}).Host()
	image := host + "/app:v1"
	putImage(t, image, "windows/amd64")
	server := startService(t, fmt.Sprintf("[[registry]]\nname = %q\n", host))
	for _, s := range []string{"", server} {
		status, stdout, stderr := streamctl(t, "create", image, "-o", "json", "--server", s)
		var res createResult
		if err := json.Unmarshal([]byte(stdout), &res); err != nil {
			t.Fatalf("%v\n%s", err, stdout)
		}
		if status != 1 || res.Status != "Failed" || res.ErrorCode != converter.UnsupportedPlatform || res.Image != image || !strings.Contains(stderr, converter.UnsupportedPlatform.Message()) {
			t.Errorf("--server %q: status %d, %s, %+v", s, status, stderr, res)
		}
	}
}

// checkOperations: Azure's keys of an operation, and Azure's words where there is none.
func checkOperations(t *testing.T, host, id, subject string) {
	t.Helper()
	for _, args := range [][]string{{"-n", host, "-t", "team/app:v1"}, {"--repository", "team/app", "--id", id}, {host + "/team/app:v1"}} {
		stdout, _ := succeed(t, append([]string{"operation", "show", "-o", "json"}, args...)...)
		var op map[string]any
		if err := json.Unmarshal([]byte(stdout), &op); err != nil {
			t.Fatalf("%v\n%s", err, stdout)
		}
		for key, want := range map[string]string{"id": id, "name": "ArtifactStreamingConversion", "resource": "team/app@" + subject, "status": "Succeeded", "progress": "100%", "requestedBy": "me"} {
			if op[key] != want {
				t.Errorf("operation show %q: %s is %v, want %s", args, key, op[key], want)
			}
		}
		for _, key := range []string{"startTime", "endTime", "details"} {
			if op[key] == nil || op[key] == "" {
				t.Errorf("operation show %q has no %s", args, key)
			}
		}
	}
	if stdout, _ := succeed(t, "operation", "show", "--id", id); !strings.Contains(stdout, id) || !strings.Contains(stdout, "Succeeded") {
		t.Errorf("operation show prints %s", stdout)
	}
	for want, args := range map[string][]string{
		"does not have any ongoing operation. Operation ID: " + id: {"operation", "cancel", "-n", host, "-t", "team/app:v1"},
		"No operation found for image '" + host + "/team/app@":     {"operation", "show", host + "/team/app@" + lastArtifact(t, host)},
		"is of repository team/app, not of team/other":             {"operation", "show", "--repository", "team/other", "--id", id},
	} {
		if status, _, stderr := streamctl(t, args...); status != 1 || !strings.Contains(stderr, want) {
			t.Errorf("streamctl %q: status %d, %q, want %q", args, status, stderr, want)
		}
	}
	var list struct{ Operations []map[string]any }
	for n, args := range map[int][]string{1: {"-n", host, "-t", "team/app:v1"}, 0: {"--state", "running"}} {
		stdout, _ := succeed(t, append([]string{"operation", "list", "-o", "json"}, args...)...)
		if err := json.Unmarshal([]byte(stdout), &list); err != nil || len(list.Operations) != n {
			t.Errorf("operation list %q: %v\n%s", args, err, stdout)
		}
	}
	if stdout, _ := succeed(t, "operation", "list"); !strings.Contains(stdout, id) || !strings.Contains(stdout, host+"/team/app:v1") {
		t.Errorf("operation list prints %s", stdout)
	}
}

func lastArtifact(t *testing.T, host string) string {
	t.Helper()
	stdout, _ := succeed(t, "list-referrers", host+"/team/app:v1", "-o", "json")
	var list struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal([]byte(stdout), &list); err != nil || len(list.Manifests) == 0 {
		t.Fatalf("%v\n%s", err, stdout)
	}
	return list.Manifests[0].Digest
}

// checkSame: what the service says of an image is what this process finds out.
func checkSame(t *testing.T, image string) {
	t.Helper()
	for _, args := range [][]string{{"show"}, {"list-referrers"}, {"verify"}} {
		var got [2]map[string]any
		for i, server := range [][]string{nil, {"--server", ""}} {
			stdout, _ := succeed(t, slices.Concat(args, []string{image, "-o", "json"}, server)...)
			if err := json.Unmarshal([]byte(stdout), &got[i]); err != nil {
				t.Fatalf("streamctl %q: %v\n%s", args, err, stdout)
			}
			delete(got[i], "operation") // which only the service knows
		}
		a, _ := json.Marshal(got[0])
		b, _ := json.Marshal(got[1])
		if !bytes.Equal(a, b) {
			t.Errorf("streamctl %q: the service says\n%s\nand the registry\n%s", args, a, b)
		}
	}
	if stdout, _ := succeed(t, "show", image); !strings.Contains(stdout, "linux/amd64") || !strings.Contains(stdout, "operation ") {
		t.Errorf("show prints %s", stdout)
	}
	// What nodes report is in integration, TestServiceReadme.
	if stdout, _ := succeed(t, "show", "--starts", image); !strings.Contains(stdout, "No node has reported a start of "+image[:strings.Index(image, "/")]) {
		t.Errorf("show --starts prints %s", stdout)
	}
}

func checkSettings(t *testing.T, host string) {
	t.Helper()
	want := func(stdout string, active bool, status any, keep, minSize float64) {
		t.Helper()
		var got map[string]any
		if err := json.Unmarshal([]byte(stdout), &got); err != nil {
			t.Fatalf("%v\n%s", err, stdout)
		}
		rules, _ := got["rules"].(map[string]any)
		number := func(key string) float64 { n, _ := rules[key].(float64); return n }
		if got["convertPushedImages"] != active || got["status"] != status || got["conversionFormat"] == nil || got["conversionVersion"] == nil || number("keep") != keep || number("minSize") != minSize {
			t.Errorf("settings are %s", stdout)
		}
	}
	settings := []string{"-n", host, "--repository", "team/app", "-o", "json"}
	stdout, _ := succeed(t, append([]string{"show"}, settings...)...)
	want(stdout, false, nil, 0, 0)
	stdout, _ = succeed(t, append([]string{"update", "--enable-streaming", "True", "--keep", "3", "--min-size", "1MiB"}, settings...)...)
	want(stdout, true, "Succeeded", 3, 1<<20)
	// What is not given stays.
	stdout, _ = succeed(t, append([]string{"update", "--enable-streaming", "true", "--min-size", "0"}, settings...)...)
	want(stdout, true, "Succeeded", 3, 0)
	stdout, _ = succeed(t, append([]string{"update", "--enable-streaming", "false"}, settings...)...)
	want(stdout, false, "Succeeded", 3, 0)
	if stdout, _ = succeed(t, "show", "-n", host, "--repository", "team/app"); !strings.Contains(stdout, "Inactive") {
		t.Errorf("show --repository prints %s", stdout)
	}
}

// TestWaiting: who does not wait, or not long enough, is told how to go on; cancelling ends what was begun.
func TestWaiting(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	image := r.Host() + "/app:v1"
	putImage(t, image, "linux/amd64")
	last := lastLayer(t, image).String()
	release := r.Inject(func(q *http.Request) bool { return q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, last) }, -1, registrytest.Stall(1000))
	defer release()
	t.Setenv("STREAMCTL_SERVER", startService(t, fmt.Sprintf("[[registry]]\nname = %q\n", r.Host())))

	stdout, stderr := succeed(t, "create", image, "--no-wait", "-o", "json")
	id := scraped.FindStringSubmatch(stderr)
	if id == nil || !strings.Contains(stdout, id[1]) {
		t.Fatalf("create --no-wait prints %s and %s", stdout, stderr)
	}
	status, _, stderr := streamctl(t, "create", image, "--wait-timeout", "1ms")
	if again := scraped.FindStringSubmatch(stderr); status != 1 || !strings.Contains(stderr, "the conversion goes on; it has not ended within 1ms") || again == nil || again[1] != id[1] {
		t.Errorf("create --wait-timeout: status %d, %s; want the operation %s", status, stderr, id[1])
	}
	if stdout, _ = succeed(t, "operation", "cancel", "--id", id[1]); !strings.Contains(stdout, "Canceled") {
		t.Errorf("operation cancel prints %s", stdout)
	}
	if stdout, _ = succeed(t, "list-referrers", image, "-o", "json"); !strings.Contains(stdout, `"manifests": []`) {
		t.Errorf("attached: %s", stdout)
	}
	// Somebody waits, and somebody else cancels.
	waiting := make(chan string, 1)
	go func() {
		var out, errs bytes.Buffer
		status := run(t.Context(), []string{"create", image}, &out, &errs)
		waiting <- fmt.Sprint(status, " ", errs.String())
	}()
	for done := false; !done; {
		select {
		case s := <-waiting:
			t.Fatalf("create ended: %s", s)
		default:
			status, _, _ := streamctl(t, "operation", "cancel", "-n", r.Host(), "-t", "app:v1")
			done = status == 0
		}
	}
	if s := <-waiting; !strings.HasPrefix(s, "1 ") || !strings.Contains(s, "was canceled by loopback") {
		t.Errorf("who waited is told %s", s)
	}
}

// TestCompletion: what a shell is told at Tab.
func TestCompletion(t *testing.T) {
	host := registrytest.Start(t, registrytest.Options{}).Host()
	putImage(t, host+"/team/app:v1", "linux/amd64")
	t.Setenv("STREAMCTL_SERVER", startService(t, fmt.Sprintf("[[registry]]\nname = %q\n", host)))
	_, stderr := succeed(t, "create", host+"/team/app:v1")
	id := scraped.FindStringSubmatch(stderr)[1]
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"cre"}, "create"}, {[]string{"create", "-o", ""}, "json"}, {[]string{"update", "--enable-streaming", ""}, "true"},
		{[]string{"create", "-n", ""}, host}, {[]string{"update", "-n", host, "--repository", "te"}, "team/app"},
		{[]string{"create", "-n", host, "-t", "te"}, "team/app:"}, {[]string{"create", "-n", host, "-t", "team/app:"}, "team/app:v1"},
		{[]string{"create", host[:4]}, host + "/"}, {[]string{"verify", host + "/team/app:"}, host + "/team/app:v1"},
		{[]string{"operation", "show", "--id", ""}, id}, {[]string{"operation", "list", "--state", "Su"}, "Succeeded"},
	} {
		stdout, _ := succeed(t, append([]string{"__complete"}, c.args...)...)
		if words := strings.FieldsFunc(stdout, func(r rune) bool { return r == '\n' || r == '\t' }); !slices.Contains(words, c.want) {
			t.Errorf("%q completes to %q, want %q", c.args, words, c.want)
		}
	}
	if stdout, _ := succeed(t, "__complete", "operation", "cancel", "--id", ""); strings.Contains(stdout, id) {
		t.Errorf("an operation that has ended is offered to cancel: %s", stdout)
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if stdout, _ := succeed(t, "completion", shell); !strings.Contains(stdout, "streamctl") {
			t.Errorf("completion %s prints %q", shell, stdout)
		}
	}
}
