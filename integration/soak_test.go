package integration_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// soakRegistryWait is how long a fault of the registry may last: much less than a read waits, so that no container has a reason to see an error.
const soakRegistryWait = 3 * time.Second

// soakDisk is the size of the cache's disk in bytes, and soakCache what the cache may use of it.
const (
	soakDisk  = 96 << 20
	soakCache = "8MiB"
)

// TestSoak mixes faults at random under containers that read, compare and compile, for as long as FOR says (10 s unless given). SEED reproduces the
// sequence; `make soak` runs it alone. The cache is on a disk of its own, and may use less of it than the containers read. Containers never see an
// error or wrong bytes, and at the end nothing is left and the daemon holds what it held at first.
func TestSoak(t *testing.T) {
	seed, length := uint64(1), 10*time.Second
	if os.Getenv("FULL") != "" {
		length = 5 * time.Minute
	}
	if v := os.Getenv("SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if v := os.Getenv("FOR"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	s := startSoak(t, seed)
	defer s.tell()
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		s.step()
	}
	s.finish()
}

// soak is a run. The random source belongs to the test's goroutine and is asked for nothing else than the next step, so that the seed gives the sequence
// whatever the time that each takes.
type soak struct {
	t             *testing.T
	n             *node.Node
	rand          *rand.Rand
	begin         time.Time
	registry      *registrytest.Registry
	proxy         *lagproxy.Proxy
	seed          uint64
	app, compiler string   // references: the image whose files are compared, and the one that compiles
	heals         []func() // end the faults that last; more than once is as good as once
	watchers      []*watcher
	first         holdings // after an image has come and gone
	requests      int      // to the registry until the last step
	rounds        int      // of watchers that have ended

	mu    sync.Mutex
	steps []string
}

func startSoak(t *testing.T, seed uint64) *soak {
	s := &soak{t: t, seed: seed, rand: rand.New(rand.NewPCG(seed, 3)), begin: time.Now()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to see it again: make soak SEED=%d. The last steps:\n%s", seed, strings.Join(s.steps[max(0, len(s.steps)-20):], "\n"))
		}
	})
	s.registry = goRegistry(t)
	s.startProxy("127.0.0.1:0")
	t.Cleanup(func() { s.proxy.Close() })
	s.app, s.compiler = s.proxy.Addr()+"/app:v1", s.proxy.Addr()+"/go:v1"
	pushSmall(t, s.app, seed)
	run(t, "streamctl", "create", "--record", "", s.app)
	pushGo(t, s.compiler)
	for i := range otherImages {
		pushSmall(t, s.other(i), seed+1+uint64(i))
		run(t, "streamctl", "create", "--record", "", s.other(i))
	}
	mode := modes[seed%uint64(len(modes))]
	s.n = startNode(t, node.Options{
		Mode: mode, Stream: []string{s.proxy.Addr() + "/*"}, Supervise: true, CacheDisk: soakDisk,
		Config: fmt.Sprintf("cache_size = %q\nbackground_bandwidth = %q", soakCache, "1MiB"),
	})
	t.Cleanup(s.heal)
	s.pull(0, 0)
	eventually(t, "the chunks of the image are gone", func() bool { return len(cacheFiles(t, s.n)) == 0 })
	s.first = holdingsOf(t, s.n)
	for _, ref := range []string{s.app, s.compiler} {
		if err := s.n.Pull(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	if status, err := statusOf(t, s.n); err != nil || len(status.Images) != 2 {
		t.Fatalf("%d images are streamed of 2: %+v, %v", len(status.Images), status.NotStreamed, err)
	}
	s.startWatchers()
	s.log("seed %d, mode %s", seed, mode)
	return s
}

// otherImages are those that are pulled and removed.
const otherImages = 2

func (s *soak) other(i int) string { return fmt.Sprintf("%s/other%d:v1", s.proxy.Addr(), i) }

func (s *soak) startProxy(address string) {
	s.t.Helper()
	p, err := lagproxy.ListenOn(address, "tcp", s.registry.Host(), lagproxy.Link{RTT: 2 * time.Millisecond})
	if err != nil {
		s.t.Fatal(err)
	}
	s.proxy = p
}

func (s *soak) log(format string, args ...any) {
	line := fmt.Sprintf("%7.2f s  %s", time.Since(s.begin).Seconds(), fmt.Sprintf(format, args...))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, line)
	s.t.Log(line)
}

// tell adds to the steps of a run that failed what the daemon and the containers say, while they still run.
func (s *soak) tell() {
	if !s.t.Failed() {
		return
	}
	for _, w := range s.watchers {
		n, err := w.passes()
		s.log("container %s, %d lives: %d rounds, %v", w.id, 1+w.lives, n, err)
	}
	tasks, err := s.n.Ctr(s.t.Context(), "tasks", "list")
	s.log("tasks, %v: %s", err, tasks)
	said, err := tryRun(s.t, "streaming-snapshotter", "status", "-o", "json", "--config", filepath.Join(s.n.Dir, "snapshotter.toml"))
	s.log("the daemon, %v: %s", err, said)
}

// check is what every step ends with: no container has seen what it should not.
func (s *soak) check() {
	s.t.Helper()
	for _, w := range s.watchers {
		if _, err := w.passes(); err != nil {
			s.t.Error(err)
		}
	}
	n, _ := s.registry.Count()
	s.requests += n
	s.registry.Reset() // the record of a long run would be large
}

// watcher is a container that tests itself round after round.
type watcher struct {
	id, log, want string // want is what it prints after each round
	lives, before int    // starts but the first, and rounds of former lives
}

// passes counts the rounds; the error is the first line that is something else.
func (w *watcher) passes() (n int, err error) {
	b, err := os.ReadFile(w.log)
	if err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	n = w.before
	text := string(b)
	text = text[:strings.LastIndex(text, "\n")+1]
	for l := range strings.Lines(text) {
		if l = strings.TrimSuffix(l, "\n"); !strings.HasPrefix(l, w.want) {
			return n, fmt.Errorf("container %s printed %q, want %q", w.id, l, w.want)
		}
		n++
	}
	return n, nil
}

// smallSum is what `guest watch /data` prints in a container of Small's image.
func smallSum(seed uint64) string {
	sums := ociimage.SmallSums(seed)
	// In the order of a walk: names, directory by directory.
	paths := slices.SortedFunc(maps.Keys(sums), func(a, b string) int {
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	})
	h := sha256.New()
	for _, p := range paths {
		fmt.Fprintln(h, sums[p], p)
	}
	return fmt.Sprintf("pass %x", h.Sum(nil))
}

func (s *soak) startWatchers() {
	s.t.Helper()
	g, err := guest()
	if err != nil {
		s.t.Fatal(err)
	}
	program := filepath.Join(s.n.Dir, "guest")
	if err := os.WriteFile(program, g, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.watch(s.app, smallSum(s.seed), nil, "/guest", "watch", "/data")
	s.watch(s.compiler, "pass hello: compiled and run by", []string{"--mount", "type=bind,src=" + program + ",dst=/guest,options=rbind:ro"},
		"/guest", "every", "/usr/local/go/pkg", "go", "run", ".")
}

func (s *soak) watch(ref, want string, flags []string, args ...string) {
	s.t.Helper()
	s.watchers = append(s.watchers, startWatcher(s.t, s.n, fmt.Sprintf("watch%d", len(s.watchers)), ref, want, flags, args...))
}

// startWatcher runs a watcher of ref with args, and flags of `ctr run`.
func startWatcher(t *testing.T, n *node.Node, id, ref, want string, flags []string, args ...string) *watcher {
	t.Helper()
	id = n.ID(id)
	w := &watcher{id: id, want: want, log: filepath.Join(n.Dir, "logs", id+".out")}
	a := append([]string{"run", "--detach", node.NoShares, "--snapshotter", n.Snapshotter(), "--log-uri", "file://" + w.log}, flags...)
	if _, err := n.Ctr(t.Context(), append(append(a, ref, id), args...)...); err != nil {
		t.Fatal(err)
	}
	return w
}

// end is for what is killed next: what it prints from here on counts for nothing.
func (w *watcher) end() (err error) {
	w.before, err = w.passes()
	return err
}

// startAgain starts the container of w again, which has ended.
func (w *watcher) startAgain(ctx context.Context, n *node.Node) error {
	w.lives++
	w.log = filepath.Join(n.Dir, "logs", fmt.Sprintf("%s.%d.out", w.id, w.lives))
	_, err := n.Ctr(ctx, "tasks", "start", "--detach", "--log-uri", "file://"+w.log, w.id)
	return err
}

// awaitPass waits until the container has begun and finished a round from here on, and returns how many that makes.
func (w *watcher) awaitPass(t *testing.T) (now int) {
	t.Helper()
	first, err := w.passes()
	for end := time.Now().Add(2 * time.Minute); err == nil; time.Sleep(20 * time.Millisecond) {
		if now, err = w.passes(); now >= first+2 {
			return now
		}
		if time.Now().After(end) {
			err = fmt.Errorf("container %s hangs after %d rounds", w.id, now)
		}
	}
	t.Error(err)
	return now
}

// stopWatchers lets each container finish a round first.
func (s *soak) stopWatchers() {
	s.t.Helper()
	ctx := context.WithoutCancel(s.t.Context())
	for _, w := range s.watchers {
		s.rounds += w.awaitPass(s.t)
		if _, err := s.n.Ctr(ctx, "tasks", "delete", "--force", w.id); err != nil {
			s.t.Error(err)
		}
		if _, err := s.n.Ctr(ctx, "containers", "delete", w.id); err != nil {
			s.t.Error(err)
		}
	}
	s.watchers = nil
}

// finish heals everything, and looks for what is left behind.
func (s *soak) finish() {
	t := s.t
	s.heal()
	s.restartDaemon(true, none) // it counts from its start, and only files that nobody has deleted
	eventually(t, "the cache gives back what containers read", func() bool {
		status, err := statusOf(t, s.n)
		return err == nil && status.Cache.Evicted > 0
	})
	s.stopWatchers()
	for _, ref := range []string{s.app, s.compiler} {
		if err := s.n.Pull(t.Context(), ref); err != nil { // a restarted containerd has it
			t.Error(err)
		}
	}
	sumIn(t, s.n, s.app, s.seed, "/data")
	s.check()
	for _, ref := range append([]string{s.app, s.compiler}, s.others()...) {
		if _, err := s.n.Crictl(t.Context(), "rmi", ref); err != nil && !strings.Contains(err.Error(), "no such image") {
			t.Error(err)
		}
	}
	wantNoMoreThan(t, s.n, s.first)
	s.log("done: %d requests to the registry, %d rounds in containers", s.requests, s.rounds)
}

func (s *soak) others() (refs []string) {
	for i := range otherImages {
		refs = append(refs, s.other(i))
	}
	return refs
}
