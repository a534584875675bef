package cache

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestMain runs the child of TestKilledProcessLeavesAGoodCache, if this is it.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CACHE_TEST_FILL"); dir != "" {
		fillUntilKilled(dir)
	}
	os.Exit(m.Run())
}

// killAt is the environment of TestKilledAtEachOperation's child: the operation's number, a space, the cache's directory.
const killAt = "CACHE_TEST_KILL_AT"

// A process is killed at each operation on the disk in turn, in the middle of writes and of holes: while it reads, flushes, evicts, and removes a
// layer. What it leaves is true, whether it began with nothing or with what others had left that died before it.
func TestKilledAtEachOperation(t *testing.T) {
	ly := newLayer(t, 4<<10, 40_000, 100, 9000)
	if v := os.Getenv(killAt); v != "" {
		at, dir, _ := strings.Cut(v, " ")
		n, err := strconv.ParseInt(at, 10, 64)
		must(t, err)
		c, err := open(dir, Options{}, &faultyDisk{disk: osDisk{}, at: n, kill: true})
		must(t, err)
		evictingScenario(t, c, ly)
		return
	}
	step := int64(7)
	if os.Getenv("FULL") != "" {
		step = 1
	}
	for _, fresh := range []bool{true, false} {
		t.Run(fmt.Sprintf("fresh=%v", fresh), func(t *testing.T) {
			dir := t.TempDir()
			claimed, verified := 0, int64(0)
			for at := int64(0); ; at += step {
				if fresh {
					dir = t.TempDir()
				}
				cmd := exec.Command(os.Args[0], "-test.run=^TestKilledAtEachOperation$")
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", killAt, at, dir))
				out, err := cmd.CombinedOutput()
				if err == nil {
					if t.Logf("%d operations", at); at < 100 {
						t.Error("the scenario is too short")
					}
					break
				}
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Fatalf("operation %d: %v\n%s", at, err, out)
				}
				claimed += checkMap(t, (&Cache{dir: dir}).layerDir(ly.dgst), ly)
				if !fresh {
					continue
				}
				c := openCache(t, dir)
				readAll(t, openLayer(t, c, ly, ly.serve()), ly, 6000)
				if n := c.Stats().DamagedChunks; n != 0 {
					t.Errorf("operation %d: %d chunks damaged", at, n)
				}
				verified += c.Stats().Verified
				must(t, c.Close())
			}
			if claimed == 0 || fresh && verified == 0 {
				t.Errorf("%d chunks claimed and %d used: the test has tested nothing", claimed, verified)
			}
		})
	}
}

// evictingScenario is scenario with evictions, and the layer is made whole and removed at the end.
func evictingScenario(t *testing.T, c *Cache, ly *layer) {
	t.Helper()
	for k := range 2 {
		l := openLayer(t, c, ly, ly.serve())
		for range 2 {
			readAll(t, l, ly, 10_000)
			poll(t, "end of the fills", l.store.idle)
			c.flush()
			l.store.evict(func(i int) bool { return (i+k)%6 < 4 }) // runs, or no block would be free
		}
		readAll(t, l, ly, 10_000)
		poll(t, "end of the fills", l.store.idle)
		if k == 1 {
			whole(t, l)
		}
		must(t, l.Close())
	}
	must(t, c.Retain(func(digest.Digest) bool { return false }))
	must(t, c.Close())
}

// fillUntilKilled is the child of TestKilledProcessLeavesAGoodCache: it reads and flushes without end, and says so.
func fillUntilKilled(dir string) {
	t := &testing.T{}
	ly := killedLayer(t)
	c, err := Open(dir, Options{})
	if err != nil {
		panic(err)
	}
	l, err := c.Layer(ly.dgst, ly.index, ly.serve())
	if err != nil {
		panic(err)
	}
	read := func() {
		p := make([]byte, 10_000)
		if _, err := l.ReadAt(context.Background(), p, rand.Int64N(int64(len(ly.tar)-len(p)))); err != nil {
			panic(err)
		}
	}
	go func() {
		for {
			read()
		}
	}()
	for {
		for range 5 {
			read()
		}
		c.flush()
		fmt.Println("flushed")
	}
}

func killedLayer(t testing.TB) *layer { return newLayer(t, 4<<10, 4<<20) }

func TestKilledProcessLeavesAGoodCache(t *testing.T) {
	ly := killedLayer(t)
	dir := t.TempDir()
	claimed := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "CACHE_TEST_FILL="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		t.Cleanup(func() { cmd.Process.Kill() })
		sc := bufio.NewScanner(out)
		for n := 0; n <= round && sc.Scan(); {
			if sc.Text() == "flushed" {
				n++
			}
		}
		must(t, cmd.Process.Kill())
		cmd.Wait()

		c := &Cache{dir: dir}
		claimed += checkMap(t, c.layerDir(ly.dgst), ly)
		must(t, sc.Err())
	}
	if claimed == 0 {
		t.Error("no map claimed anything: the test has tested nothing")
	}
	c := openCache(t, dir)
	readAll(t, openLayer(t, c, ly, ly.serve()), ly, 100_000)
	if c.Stats().Verified == 0 || c.Stats().DamagedChunks != 0 {
		t.Errorf("%d chunks came from the killed processes, %d of them damaged", c.Stats().Verified, c.Stats().DamagedChunks)
	}
}
