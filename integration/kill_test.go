package integration_test

import (
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// TestKillable: the registry accepts requests and answers none. What waits for it, in a system call, a page fault or an execve, dies when it is killed, by a signal or by
// those who stop containers, can be removed, and holds up nobody's end.
func TestKillable(t *testing.T) {
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			registry := startRegistry(t, registrytest.Options{})
			k := &killable{t: t, registry: registry, seed: 900 + 100*uint64(i)}
			pause := registry.Host() + "/pause:1"
			pushPause(t, pause)
			k.n = startNode(t, node.Options{Mode: mode, Pause: pause, Stream: []string{registry.Host() + "/*"}, Supervise: true})
			sumIn(t, k.n, k.image(), k.seed, "/data/small") // the guest, which all images share

			kill := func(pid int, _ string) error { return syscall.Kill(pid, syscall.SIGKILL) }
			k.dies("read", 0, kill, "/guest", "sum", "/data/big")
			k.dies("page-fault", 0, kill, "/guest", "map", "/data/big")
			if mode == "tree" { // with O_DIRECT the others give EINVAL (file) or a block device's read, which the kernel lets end first (loop)
				k.dies("direct", 0, kill, "/guest", "direct", "/data/big")
			}
			k.dies("execve", 0, kill, "/program", "pause")
			k.dies("text", 1, kill, "/program", "pause")
			k.dies("ctr-kill", 0, func(_ int, id string) error {
				_, err := k.n.Ctr(t.Context(), "tasks", "kill", "--signal", "SIGKILL", id)
				return err
			}, "/guest", "sum", "/data/big")
			k.pod()
			k.shutdown()
		})
	}
}

// killable is a node with images of each of which nothing is on the node but the guest.
type killable struct {
	t        *testing.T
	n        *node.Node
	registry *registrytest.Registry
	seed     uint64 // of the last image
}

// image pulls a new image: Small, and a program.
func (k *killable) image() string {
	k.t.Helper()
	k.seed++
	ref := fmt.Sprintf("%s/app%d:v1", k.registry.Host(), k.seed)
	push(k.t, ref, func(dir string, guest []byte) (v1.Image, error) {
		img, err := ociimage.Small(dir, guest, k.seed)
		if err != nil {
			return nil, err
		}
		l, err := ociimage.Layer(dir, func(t *ociimage.Tar) error {
			return t.File("program", 0o755, fmt.Appendf(guest[:len(guest):len(guest)], "%d", k.seed))
		})
		if err != nil {
			return nil, err
		}
		return mutate.AppendLayers(img, l)
	})
	run(k.t, "streamctl", "create", "--record", "", ref)
	pullStreamed(k.t, k.registry, k.n, ref)
	return ref
}

// stall lets pass reads of blobs through, and the registry answer none after. waits waits for one of these.
func (k *killable) stall(pass int64) (waits, answer func()) {
	var asked atomic.Int64
	answer = k.registry.Inject(func(r *http.Request) bool { return ranged(r) && asked.Add(1) > pass }, -1, registrytest.Stall(-1))
	k.t.Cleanup(answer)
	return func() {
		k.t.Helper()
		eventually(k.t, "a read asks the registry", func() bool { return asked.Load() > pass })
	}, answer
}

// start runs a container.
func (k *killable) start(ref, id string, args ...string) (pid int) {
	k.t.Helper()
	ctr(k.t, k.n, append([]string{"run", "--detach", "--snapshotter", k.n.Snapshotter(), ref, id}, args...)...)
	return k.pid(id)
}

func (k *killable) pid(id string) int {
	k.t.Helper()
	pid, err := k.n.PID(id)
	if err != nil {
		k.t.Fatal(err)
	}
	return pid
}

// dies starts a container of a new image that waits for the registry after pass answers, kills it and removes it.
func (k *killable) dies(id string, pass int64, kill func(pid int, id string) error, args ...string) {
	k.t.Helper()
	ref := k.image()
	waits, answer := k.stall(pass)
	defer answer()
	pid := k.start(ref, id, args...)
	waits()
	k.gone(id, func() error { return kill(pid, id) }, pid)
	ctr(k.t, k.n, "containers", "delete", id)
}

// gone does what is to end processes that wait, and waits until they are gone, with all their threads.
func (k *killable) gone(what string, end func() error, pids ...int) {
	k.t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err != nil {
			k.t.Fatalf("%s: the process did not wait: %v", what, err)
		}
	}
	begin := time.Now()
	if err := end(); err != nil {
		k.t.Fatal(err)
	}
	for _, pid := range pids {
		eventually(k.t, what, func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	}
	k.t.Logf("%s: gone after %v", what, time.Since(begin).Round(time.Millisecond))
}

// pod has CRI stop and remove a container that waits.
func (k *killable) pod() {
	k.t.Helper()
	ref := k.image()
	waits, answer := k.stall(0)
	defer answer()
	c, err := k.n.RunPod(k.t.Context(), ref)
	if err != nil {
		k.t.Fatal(err)
	}
	waits()
	k.gone("crictl stop", func() error {
		_, err := k.n.Crictl(k.t.Context(), "stop", "--timeout", "0", c.ID)
		return err
	}, k.pid(c.ID))
	if err := c.Remove(k.t.Context()); err != nil {
		k.t.Fatal(err)
	}
}

// shutdown ends the daemons as a node's shutdown does while containers wait, and then these.
func (k *killable) shutdown() {
	k.t.Helper()
	refs := []string{k.image(), k.image()}
	waits, answer := k.stall(0)
	defer answer()
	// Nobody deletes these, and runc's state outlives the node: their names are used once.
	pids := []int{k.start(refs[0], fmt.Sprintf("reads%d", k.seed), "/guest", "sum", "/data/big"), k.start(refs[1], fmt.Sprintf("maps%d", k.seed), "/guest", "map", "/data/big")}
	waits()
	k.gone("shutdown", func() error {
		if err := errors.Join(k.n.StopContainerd(), k.n.StopSnapshotter()); err != nil {
			return err
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
				return err
			}
		}
		return nil
	}, pids...)
}
