package service

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestConversions: no more at once than the limit says, whatever waits.
func TestConversions(t *testing.T) {
	e := newEnv(t)
	s := e.start(func(c *Config) { c.Limits.Conversions = 2 })
	var mu sync.Mutex
	repositories := map[string]bool{} // that are being read
	h := e.hold(func(r *http.Request) bool {
		repository, _, blob := strings.Cut(r.URL.Path, "/blobs/sha256")
		mu.Lock()
		defer mu.Unlock()
		if blob && r.Method == http.MethodGet {
			repositories[repository] = true
		}
		return blob && r.Method == http.MethodGet
	})
	idle := e.startIdle()
	var ops []Operation
	for n := range 5 {
		ops = append(ops, asked(t, idle.Service, e.push("app"+string(rune('a'+n)), image(t, "amd64", 10_000))))
	}
	running := 0
	for _, op := range ops[:2] {
		await(t, idle.Service, op.ID, in(Running))
		running++
	}
	h.wait(t)
	for n, op := range ops[2:] {
		if got, err := idle.Operation(t.Context(), op.ID); err != nil || got.State != NotStarted || got.Position != n+1 {
			t.Errorf("%s, %v", show(got), err)
		}
	}
	await(t, s.Service, ops[4].ID, in(NotStarted)) // what another process was asked for is told a moment later
	if st := s.Stats(); st.Running != 2 || st.Slots != 2 || st.Waiting != 3 {
		t.Errorf("%+v", st)
	}
	mu.Lock()
	if len(repositories) > 2 {
		t.Errorf("%v are read", repositories)
	}
	mu.Unlock()
	h.release()
	for _, op := range ops {
		succeed(t, idle.Service, op.ID)
	}
}

// TestDeadlyAlone: an operation over which processes died is converted alone, so that what is converted beside it does not die with the next one; and it is converted,
// also when nothing else comes. While it waits for that it can be cancelled, and a process that has nothing to do can have it.
func TestDeadlyAlone(t *testing.T) {
	t.Parallel() // it waits most of the time
	e := newEnv(t)
	idle := e.startIdle()
	innocent, guilty := image(t, "amd64", 10_000), image(t, "amd64", 10_000)
	first := submit(t, idle.Service, e.push("first", innocent))
	deadly, cancelled := e.dead(idle, "deadly", guilty), e.dead(idle, "cancelled", image(t, "amd64", 10_000))
	h := e.hold(reads(layers(t, innocent)[0]))
	s := e.start(func(c *Config) { c.Limits.Conversions = 3 })
	h.wait(t)
	until(t, "one of them waits until it is alone", func() bool {
		if s.room.beside.TryAcquire(1) { // there are two
			s.room.beside.Release(1)
			return false
		}
		return true
	})
	for _, id := range []string{deadly.ID, cancelled.ID} {
		if op, err := s.Operation(t.Context(), id); err != nil || op.Worker != "dead" {
			t.Errorf("beside another: %s, %v", show(op), err)
		}
	}
	if _, err := s.Cancel(t.Context(), cancelled.ID, "test"); err != nil {
		t.Fatal(err)
	}
	await(t, s.Service, cancelled.ID, in(Canceled))
	alone := e.hold(reads(layers(t, guilty)[0]))
	other := e.start()
	await(t, s.Service, deadly.ID, func(op Operation) bool { return op.State == Running && op.Worker == other.c.Name })
	other.stop()
	await(t, s.Service, deadly.ID, in(NotStarted))
	h.release()
	await(t, s.Service, deadly.ID, func(op Operation) bool { return op.State == Running && op.Worker == s.c.Name })
	if op, err := s.Operation(t.Context(), first.ID); err != nil || !op.State.Ended() {
		t.Errorf("beside another: %s, %v", show(op), err)
	}
	alone.release()
	for _, id := range []string{first.ID, deadly.ID} {
		succeed(t, s.Service, id)
	}
}

// dead makes an operation of a process that was killed over it, as others before.
func (e *env) dead(p process, repository string, img v1.Image, change ...func(*record)) record {
	e.t.Helper()
	r := newRecord(Request{Image: e.push(repository, img), By: "test"})
	r.take("dead")
	r.Deaths = aloneDeaths - 1
	for _, f := range change {
		f(&r)
	}
	if _, err := p.put(e.t.Context(), imageKey(r.Image), r, 0); err != nil {
		e.t.Fatal(err)
	}
	if _, err := p.begin(e.t.Context(), r); err != nil {
		e.t.Fatal(err)
	}
	return r
}

// TestDeadBulk: what a process died over goes on elsewhere also if it was bulk, and nothing else waits.
func TestDeadBulk(t *testing.T) {
	e := newEnv(t)
	r := e.dead(e.startIdle(), "app", image(t, "amd64", 1000), func(r *record) { r.Bulk, r.Deaths = true, 0 })
	succeed(t, e.start().Service, r.ID)
}

// TestFair: who asks for very many conversions is not before everybody else with all of them.
func TestFair(t *testing.T) {
	e := newEnv(t)
	idle := e.startIdle()
	var many []Operation
	for n := range bulkAfter + 8 {
		many = append(many, submit(t, idle.Service, e.push(fmt.Sprint("many", n), image(t, "amd64", 1000))))
	}
	few := submit(t, idle.Service, e.push("few", image(t, "amd64", 1000)), func(r *Request) { r.By = "somebody else" })
	if few = await(t, idle.Service, few.ID, in(NotStarted)); few.Position >= len(many) {
		t.Errorf("%d have asked, and the last is number %d", len(many)+1, few.Position)
	}
	s := e.start(func(c *Config) { c.Limits.Conversions = 1 })
	few = succeed(t, s.Service, few.ID)
	last := succeed(t, s.Service, many[len(many)-1].ID)
	if few.Start.After(last.Start) {
		t.Errorf("%s began after %s", show(few), show(last))
	}
	for _, op := range many {
		succeed(t, s.Service, op.ID)
	}
}

// TestDisk: layers are converted as there is room for them; one that is larger than all of it fails.
func TestDisk(t *testing.T) {
	e := newEnv(t)
	i := e.push("app", image(t, "amd64", 100_000, 101_000, 102_000, 103_000))
	s := e.start(func(c *Config) {
		c.Convert.Jobs = 8
		c.Limits.Disk = 300_000 // two of the smaller ones
	})
	var mu sync.Mutex
	most := int64(0)
	two := make(chan struct{}, 10)
	h := e.hold(func(r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		mu.Lock()
		most = max(most, s.Stats().Disk)
		mu.Unlock()
		two <- struct{}{}
		return true
	})
	op := submit(t, s.Service, i)
	<-two
	<-two
	h.release()
	succeed(t, s.Service, op.ID)
	e.verify(i, 1)
	large := submit(t, s.Service, e.push("large", image(t, "amd64", 500_000)))
	if got := await(t, s.Service, large.ID, in(Failed, Succeeded)); got.State != Failed || !strings.Contains(got.Message, "300000 bytes") {
		t.Errorf("%s", show(got))
	}
	mu.Lock()
	defer mu.Unlock()
	if most < 200_000 || most > 300_000 {
		t.Errorf("%d bytes were reserved at once", most)
	}
	if n := s.Stats().Disk; n != 0 {
		t.Errorf("%d bytes stay reserved", n)
	}
}

// TestVerifyTakesRoom: what is verified has its place in the memory that there is, and waits for it as layers that are converted do.
func TestVerifyTakesRoom(t *testing.T) {
	r := newRoom(Limits{Conversions: 1, Memory: 250 << 20}, false) // four layers
	jobs, release, err := r.verify(t.Context())
	if err != nil || jobs != verifying {
		t.Fatal(jobs, err)
	}
	for range 2 {
		if _, _, err := r.reserve(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.verify(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("there was room: %v", err)
	}
	release()
	if jobs, _, err := r.verify(t.Context()); err != nil || jobs != verifying {
		t.Error(jobs, err)
	}
	small := newRoom(Limits{Conversions: 1, Memory: 1}, false)
	if jobs, _, err := small.verify(t.Context()); err != nil || jobs != 1 {
		t.Error(jobs, err)
	}
}

// TestMemory: what the limit leaves of conversions and layers.
func TestMemory(t *testing.T) {
	for _, c := range []struct {
		limits      Limits
		static      bool
		conversions int
		layers      int64
	}{
		{Limits{Conversions: 4}, true, 4, 0},
		{Limits{Conversions: 4, Memory: 1}, true, 1, 1},
		{Limits{Conversions: 4, Memory: 1 << 30}, false, 4, 20},
		{Limits{Conversions: 4, Memory: 1 << 30}, true, 4, 13},
		{Limits{Conversions: 4, Memory: 288 << 20}, true, 2, 2},
	} {
		if conversions, layers := split(c.limits, c.static); conversions != c.conversions || layers != c.layers {
			t.Errorf("%+v, static %v: %d conversions, %d layers, want %d and %d", c.limits, c.static, conversions, layers, c.conversions, c.layers)
		}
	}
	e := newEnv(t)
	i := e.push("app", image(t, "amd64", 10_000, 10_001, 10_002))
	s := e.start(func(c *Config) {
		c.Convert.Jobs = 8
		c.Limits.Memory = 1
	})
	var mu sync.Mutex
	reading, most := 0, 0
	e.registry.Inject(func(r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
			reading++
		case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/uploads/"):
			reading = 0
		}
		most = max(most, reading)
		return false
	}, -1, nil)
	succeed(t, s.Service, asked(t, s.Service, i).ID)
	if most != 2 { // the config, and the first layer
		t.Errorf("%d blobs were read before one was pushed", most)
	}
}
