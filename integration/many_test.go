package integration_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestManyAtOnce pulls and starts many images at the same time: each twice at once; with removals and killed clients in between; and with a
// containerd that is killed meanwhile. Everything ends, with an error only where something was taken away, and is there when it is tried again.
func TestManyAtOnce(t *testing.T) {
	images, containers, inModes := 4, 12, modes[:1]
	if os.Getenv("FULL") != "" {
		images, containers, inModes = 10, 50, modes[:]
	}
	registry := startRegistry(t, registrytest.Options{})
	proxy, err := lagproxy.Listen("tcp", registry.Host(), lagproxy.Link{RTT: 20 * time.Millisecond}) // so that a pull has a middle
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	refs := make([]string, images)
	for i := range refs {
		refs[i] = fmt.Sprintf("%s/app%d:v1", proxy.Addr(), i)
		pushSmall(t, refs[i], 80+uint64(i))
		run(t, "streamctl", "create", "--record", "", refs[i])
	}
	for _, mode := range inModes {
		t.Run(mode, func(t *testing.T) {
			m := &many{t: t, n: startNode(t, node.Options{Mode: mode, Stream: []string{proxy.Addr() + "/*"}}), refs: refs}
			pullTwice := func(ctx context.Context) []error {
				return atOnce(ctx, 2*images, func(ctx context.Context, i int) error { return m.n.Pull(ctx, refs[i%images]) })
			}
			// start is what has to work when nothing is in the way.
			start := func(containers int) {
				t.Helper()
				if err := errors.Join(pullTwice(t.Context())...); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(atOnce(t.Context(), containers, m.run)...); err != nil {
					t.Fatal(err)
				}
			}
			start(containers)

			m.remove()
			errs := atOnce(t.Context(), 3*images, func(ctx context.Context, i int) error {
				ref := refs[i%images]
				switch i / images {
				case 0:
					return m.n.Pull(ctx, ref)
				case 1:
					killed, cancel := context.WithTimeout(ctx, time.Duration(i)*30*time.Millisecond)
					defer cancel()
					return m.n.Pull(killed, ref)
				default:
					_, err := m.n.Crictl(ctx, "rmi", ref)
					for ; err != nil && ctx.Err() == nil; time.Sleep(10 * time.Millisecond) { // until there is something to remove
						_, err = m.n.Crictl(ctx, "rmi", ref)
					}
					return err
				}
			})
			noneHung(t, "removed and killed while pulling", errs)
			start(images)

			m.remove()
			done := make(chan []error)
			before := proxy.Count()
			go func() { done <- pullTwice(t.Context()) }()
			m.restart(func() bool { return proxy.Count().Sub(before).Requests > 0 })
			noneHung(t, "pulls, containerd killed", <-done)
			start(images)
			idle := m.snapshots()
			go func() { done <- atOnce(t.Context(), containers, m.run) }()
			m.restart(func() bool { return m.snapshots() > idle })
			noneHung(t, "starts, containerd killed", <-done)
			start(images)
		})
	}
}

// many is a node with images that are used at the same time.
type many struct {
	t    *testing.T
	n    *node.Node
	refs []string
}

// run runs a container of image i and compares what it reads.
func (m *many) run(ctx context.Context, i int) error {
	i %= len(m.refs)
	out, err := m.n.Run(ctx, m.refs[i], nil, "/guest", "sum", "/data/small")
	if err != nil {
		return err
	}
	checkSumsBelow(m.t, out, 80+uint64(i), "/data/small")
	return nil
}

// remove removes all images.
func (m *many) remove() {
	m.t.Helper()
	for _, ref := range m.refs {
		if _, err := m.n.Crictl(m.t.Context(), "rmi", ref); err != nil {
			m.t.Fatal(err)
		}
	}
}

// restart kills containerd in the middle of what goes on, once something has begun, and starts it again. It returns also if it fails, so that
// what goes on is waited for.
func (m *many) restart(begun func() bool) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); !begun(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			m.t.Error("nothing has begun within a minute")
			break
		}
	}
	if err := m.n.RestartContainerd(m.t.Context(), true); err != nil {
		m.t.Error(err)
	}
}

// snapshots counts the directories of snapshots.
func (m *many) snapshots() int {
	m.t.Helper()
	entries, err := os.ReadDir(filepath.Join(m.n.Dir, "s/snapshots"))
	if err != nil {
		m.t.Error(err)
	}
	return len(entries)
}

// errHung is what atOnce makes of what had not ended after two minutes.
var errHung = errors.New("does not end")

// atOnce does n things at the same time and returns how each ended.
func atOnce(ctx context.Context, n int, do func(ctx context.Context, i int) error) []error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			if errs[i] = do(ctx, i); ctx.Err() != nil {
				errs[i] = fmt.Errorf("%w: %w", errHung, errs[i])
			}
		})
	}
	wg.Wait()
	return errs
}

// noneHung reports how things ended that were allowed to fail.
func noneHung(t *testing.T, what string, errs []error) {
	t.Helper()
	var failed []error
	for _, err := range errs {
		if errors.Is(err, errHung) {
			t.Error(err)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	t.Logf("%s: %d of %d failed", what, len(failed), len(errs))
	if len(failed) > 0 {
		t.Logf("the first: %v", failed[0])
	}
}
