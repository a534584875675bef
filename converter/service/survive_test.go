package service

import (
	"context"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestRestart ends a service with the NATS server in its process in the middle of a conversion, and starts it again: the id answers, and
// the work is finished from the layer that was pushed.
func TestRestart(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	e := &env{t: t, registry: r}
	dir := t.TempDir()
	discard := slog.New(slog.DiscardHandler)
	start := func() (process, *embedded.Server) {
		n, err := embedded.Start(t.Context(), dir, discard)
		if err != nil {
			t.Fatal(err)
		}
		c := shortLease(n.Conn, r.Host())
		c.Lease, c.Sole = time.Hour, true
		return run(t, c), n
	}
	s, n := start()
	if _, err := embedded.Start(t.Context(), dir, discard); err == nil {
		t.Fatal("two servers in one directory")
	}
	img := image(t, "amd64", 100_000, 50_000)
	i := e.push("app", img)
	h := e.hold(reads(layers(t, img)[1]))
	op := submit(t, s.Service, i)
	h.wait(t)
	await(t, s.Service, op.ID, func(op Operation) bool { return op.Progress.Bytes >= 100_000 && op.Progress.Layer == 2 })
	s.stop()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}

	s, n = start()
	defer n.Close()
	defer s.stop()
	h.wait(t)
	if got, err := s.Operation(t.Context(), op.ID); err != nil || got.State.Ended() || !got.Asked.Equal(op.Asked) {
		t.Errorf("after the restart: %s, %v", show(got), err)
	}
	h.release()
	if got := succeed(t, s.Service, op.ID); got.Attempt != 2 {
		t.Error(show(got))
	}
	e.once(layers(t, img)[0], 2)
	e.verify(i, 1)
}

// TestHandBack: what a process that ends hands back goes on in another one at once. The lease is longer than the test.
func TestHandBack(t *testing.T) {
	e := newEnv(t)
	img := image(t, "amd64", 100_000, 50_000)
	i := e.push("app", img)
	first := e.start()
	h := e.hold(reads(layers(t, img)[1]))
	op := submit(t, first.Service, i)
	h.wait(t)
	second := e.start()
	first.stop()
	op = await(t, second.Service, op.ID, func(op Operation) bool { return op.State == Running && op.Worker == second.c.Name })
	h.release()
	if op = succeed(t, second.Service, op.ID); op.Attempt != 2 {
		t.Error(show(op))
	}
	e.once(layers(t, img)[0], 2)
	e.verify(i, 1)
}

// TestKilled kills a process in the middle of a conversion: another one finishes it, from the layer that was pushed.
func TestKilled(t *testing.T) {
	e := newEnv(t)
	img := image(t, "amd64", 100_000, 50_000)
	i := e.push("app", img)
	idle := e.startIdle()
	child := e.startChild()
	h := e.hold(reads(layers(t, img)[1]))
	op := submit(t, idle.Service, i)
	h.wait(t)
	if op = await(t, idle.Service, op.ID, in(Running)); op.Worker != "child" {
		t.Error(show(op))
	}
	child.Process.Kill()
	child.Wait()
	second := e.start(func(c *Config) { c.Lease = 2 * time.Second })
	op = await(t, second.Service, op.ID, func(op Operation) bool { return op.State == Running && op.Worker == second.c.Name })
	h.release()
	if op = succeed(t, second.Service, op.ID); op.Attempt != 2 {
		t.Error(show(op))
	}
	e.once(layers(t, img)[0], 2)
	e.verify(i, 1)
}

// TestStopped stops a process by SIGSTOP for longer than its lease, in each phase, and while a manifest is on its way to the registry,
// too. Its operation is cancelled elsewhere meanwhile. When it goes on it leaves nothing attached, and writes nothing.
func TestStopped(t *testing.T) {
	for _, phase := range []struct {
		name  string
		match func(*http.Request) bool
	}{
		{"reading", func(r *http.Request) bool { return r.Method == http.MethodGet && registrytest.Blobs(r) }},
		{"pushing", func(r *http.Request) bool { return r.Method == http.MethodPost }},
		{"attaching", attaches},
	} {
		t.Run(phase.name, func(t *testing.T) {
			t.Parallel() // they wait most of the time
			e := newEnv(t)
			i := e.push("app", image(t, "amd64", 100_000))
			idle := e.startIdle()
			child := e.startChild()
			h := e.hold(phase.match)
			op := asked(t, idle.Service, i)
			h.wait(t)
			await(t, idle.Service, op.ID, in(Running))
			if err := child.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			if _, err := idle.Cancel(t.Context(), op.ID, "tester"); err != nil {
				t.Fatal(err)
			}
			second := e.start(func(c *Config) { c.Lease = 2 * time.Second }) // takes it over, to cancel it
			await(t, second.Service, op.ID, in(Canceled))
			_, before, err := second.get(t.Context(), idPrefix+op.ID)
			if err != nil {
				t.Fatal(err)
			}
			h.release()
			if err := child.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if err := child.Process.Signal(syscall.SIGTERM); err != nil { // it ends when its conversion has
				t.Fatal(err)
			}
			if err := child.Wait(); err != nil {
				t.Errorf("the process that was stopped: %v", err)
			}
			if list := e.artifacts(i); len(list) != 0 {
				t.Errorf("referrers %+v", list)
			}
			if now, err := second.operations.Get(t.Context(), idPrefix+op.ID); err != nil || now.Revision() != before {
				t.Errorf("the record was written again: %v", err)
			}
		})
	}
}

// TestDeaths: an operation over which process after process dies is called failed.
func TestDeaths(t *testing.T) {
	e := newEnv(t)
	i := e.push("app", image(t, "amd64", 10_000))
	idle := e.startIdle()
	rec := newRecord(Request{Image: i, By: "test"})
	rec.take("dead")
	rec.Deaths = maxDeaths - 1
	if _, err := idle.put(t.Context(), imageKey(i), rec, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := idle.begin(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	s := e.start()
	op := await(t, s.Service, rec.ID, func(op Operation) bool { return op.State.Ended() })
	if op.State != Failed || op.ErrorCode != ProcessesDied || op.Message == "" || len(e.artifacts(i)) != 0 {
		t.Error(show(op))
	}
}

// TestHeal: a process that dies between the writes of Submit leaves an operation all the same.
func TestHeal(t *testing.T) {
	e := newEnv(t)
	idle := e.startIdle()
	for _, c := range []struct {
		name  string
		again bool // it is asked for again, instead of a process that starts
		died  func(i Image, rec record) error
	}{
		{"before the record", false, func(i Image, rec record) error { return nil }},
		{"before the record, asked again", true, func(i Image, rec record) error { return nil }},
		{"before the message", false, func(i Image, rec record) error {
			_, err := idle.put(t.Context(), idPrefix+rec.ID, rec, 0)
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := e.push("app", image(t, "amd64", 10_000))
			rec := newRecord(Request{Image: i, By: "test"})
			_, err := idle.put(t.Context(), imageKey(i), rec, 0)
			if err == nil {
				err = c.died(i, rec)
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.again {
				op, existed, err := idle.Submit(t.Context(), Request{Image: i})
				if err != nil || !existed || op.ID != rec.ID {
					t.Fatalf("%s, %v, %v", show(op), existed, err)
				}
			}
			s := e.start()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for _, err := s.Operation(ctx, rec.ID); err != nil && sleep(ctx, 10*time.Millisecond); { // until it is there
				_, err = s.Operation(ctx, rec.ID)
			}
			succeed(t, s.Service, rec.ID)
			e.verify(i, 1)
		})
	}
}

// TestWatchAgain: after a NATS server was started again, each process knows what it has, and is told of what becomes of it.
func TestWatchAgain(t *testing.T) {
	addr, err := node.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(addr)
	store := t.TempDir()
	start := func() *server.Server {
		return startServer(t, &server.Options{Host: at.Addr().String(), Port: int(at.Port()), JetStream: true, StoreDir: store, NoSigs: true})
	}
	n := start()
	e := &env{t, registrytest.Start(t, registrytest.Options{}), n.ClientURL()}
	idle, other := e.startIdle(), e.startIdle()
	defer idle.stop() // while there is a server
	defer other.stop()
	op := submit(t, idle.Service, e.push("app", image(t, "amd64", 1000)))
	await(t, other.Service, op.ID, in(NotStarted))
	n.Shutdown()
	n.WaitForShutdown()
	other.view.drop(op.ID, math.MaxUint64) // what it was not told of
	start()
	until(t, "the operation", func() bool {
		_, known := other.view.get(op.ID)
		return known
	})
	if _, err := idle.Cancel(t.Context(), op.ID, "test"); err != nil {
		t.Fatal(err)
	}
	await(t, other.Service, op.ID, in(Canceled))
}

// TestRetention: ended operations go, and nothing of them is left.
func TestRetention(t *testing.T) {
	e := newEnv(t)
	i := e.push("app", image(t, "amd64", 10_000))
	s := e.start(func(c *Config) { c.Lease, c.Retention = time.Second, time.Nanosecond })
	op := submit(t, s.Service, i)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	changes, err := s.Watch(ctx, op.ID)
	for err == nil && ctx.Err() == nil { // the channel is closed when it has ended
		for range changes {
		}
		sleep(ctx, 10*time.Millisecond)
		_, err = s.Operation(ctx, op.ID)
	}
	if ctx.Err() != nil {
		t.Fatal("the operation stays")
	}
	if _, err := s.Last(t.Context(), i); err == nil {
		t.Error("the image's last operation stays")
	}
	keys, err := s.operations.Keys(t.Context())
	if err == nil && len(keys) > 0 {
		t.Errorf("keys %q are left", keys)
	}
	if again := submit(t, s.Service, i, func(r *Request) { r.Force = true }); again.ID == op.ID {
		t.Error(show(again))
	}

	// What another process took away while this one was cut off, for so long that nothing tells of it any more.
	stale := newRecord(Request{Image: i, By: "test"})
	stale.State, stale.End = Succeeded, now().Add(-time.Hour)
	s.view.put(stale, 1<<40)
	until(t, "the end of what is not there", func() bool {
		_, known := s.view.get(stale.ID)
		return !known
	})
}

// TestProgress: an operation says how far it is again and again, also while nothing comes.
func TestProgress(t *testing.T) {
	e := newEnv(t)
	img := image(t, "amd64", 100_000, 3_000_000)
	i := e.push("app", index(img, image(t, "arm64", 50_000)))
	s := e.start()
	big := layers(t, img)[1]
	e.registry.Inject(reads(big), -1, registrytest.Stall(2_000_000))
	op := submit(t, s.Service, i)
	var seen []Progress
	await(t, s.Service, op.ID, func(op Operation) bool {
		p := op.Progress
		if op.State.Ended() {
			t.Fatal(show(op))
		}
		if p.Layer == 2 && p.Bytes > 1_000_000 && (len(seen) == 0 || p.Updated.After(seen[len(seen)-1].Updated)) {
			seen = append(seen, p)
		}
		return len(seen) == 4
	})
	p := seen[3]
	if p.Platform != "linux/amd64" || p.Layers != 2 || p.Digest.String() != big || p.Total < 3_150_000 || p.Percent != int(100*p.Bytes/p.Total) || p.Percent > 99 {
		t.Errorf("%+v", p)
	}
	if !slices.IsSortedFunc(seen, func(a, b Progress) int { return int(a.Bytes - b.Bytes) }) {
		t.Errorf("%+v goes backwards", seen)
	}
}
