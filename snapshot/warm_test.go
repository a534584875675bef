package snapshot

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// resident counts the pages of a file that the kernel has, by mincore(2), and all.
func resident(t *testing.T, name string) (have, all int) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	pages := make([]byte, (len(mem)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		have += int(p & 1)
	}
	return have, len(pages)
}

// heldWriter waits for hold when it has written so many bytes.
type heldWriter struct {
	http.ResponseWriter
	first int64
	hold  <-chan struct{}
}

func (w *heldWriter) Write(p []byte) (n int, err error) {
	if w.first > 0 {
		n, err = w.ResponseWriter.Write(p[:min(w.first, int64(len(p)))])
		w.first -= int64(n)
		if err != nil || n == len(p) {
			return n, err
		}
	}
	http.NewResponseController(w.ResponseWriter).Flush()
	<-w.hold
	k, err := w.ResponseWriter.Write(p[n:])
	return n + k, err
}

// TestWarm: what a recorded or learned profile lists, and nothing else, is in the kernel's cache soon after the root of a container is mounted, be that before or after the hot blob has come.
// What a static one lists is not: see hotFetch.fill. Nor is anything if what is read is to be seen.
func TestWarm(t *testing.T) {
	for _, c := range []struct {
		name, source string
		late, never  bool // the hot blob comes after the mount; nothing is read ahead
	}{{"recorded", artifact.ProfileRecorded, false, false}, {"late", artifact.ProfileLearned, true, false}, {"static", artifact.ProfileStatic, false, true}, {"off", artifact.ProfileRecorded, true, true}} {
		t.Run(c.name, func(t *testing.T) {
			n := newTestNode(t)
			if n.noReadAhead = c.name == "off"; n.noReadAhead {
				n.restart()
			}
			img, files := pushHot(n)
			p := n.hotProfile(img)
			hot := n.attachProfile(img, p, c.source, time.Unix(1e9, 0))
			hold := make(chan struct{})
			if c.late {
				n.reg.Inject(func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, hot.Hot.String()) }, -1, func(_ *registrytest.Registry, next http.Handler) http.Handler {
					return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						next.ServeHTTP(&heldWriter{w, hot.Size - n.framesOf(img, p), hold}, r)
					})
				})
			} else {
				close(hold)
			}
			arrived := func() bool { return n.chunks.Stats().Hot == int64(len(p.Chunks)) }
			id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
			if err != nil {
				t.Fatal(err)
			}
			if !c.late {
				n.poll("hot chunks", arrived)
			}
			target := t.TempDir()
			if err := n.images.Mount(testContext(), id, 2, target); err != nil {
				t.Fatal(err)
			}
			defer n.unmount(target)
			if c.late {
				close(hold)
				n.poll("hot chunks", arrived)
			}
			if !c.never {
				n.poll("the hot files are in the kernel's cache", func() bool {
					have0, all0 := resident(t, filepath.Join(target, "hot0"))
					have1, all1 := resident(t, filepath.Join(target, "hot1"))
					return have0 == all0 && have1 == all1
				})
				misses := n.chunks.Stats().Misses
				hits := n.chunks.Stats().Hits
				wantFiles(t, target, map[string]string{"hot0": files["hot0"], "hot1": files["hot1"]})
				if s := n.chunks.Stats(); s.Hits != hits || s.Misses != misses {
					t.Errorf("reading took %d reads of chunks, %d misses", s.Hits-hits, s.Misses-misses)
				}
			} else {
				n.images.EndSearches() // and what goes on after them
				n.poll("end of the read-ahead", noChild)
				if have, _ := resident(t, filepath.Join(target, "hot0")); have > 0 {
					t.Errorf("%d pages of what the profile lists are in the kernel's cache", have)
				}
			}
			if have, _ := resident(t, filepath.Join(target, "cold1")); have > 0 {
				t.Errorf("%d pages of what no profile lists are in the kernel's cache", have)
			}
		})
	}
}

// noChild reports that this process has no child that reads ahead.
func noChild() bool {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	return !slices.ContainsFunc(lists, func(list string) bool {
		children, _ := os.ReadFile(list)
		return len(children) > 0
	})
}

// What the cache had no room for, or has given back before the mount, is not fetched to be read ahead.
func TestWarmIsOfWhatIsHere(t *testing.T) {
	for _, evicted := range []bool{false, true} {
		n := newTestNode(t)
		n.limit = 3_600_000 // a quarter of which is more than hot1 and less than all
		n.restart()
		img, files := pushHot(n)
		p := n.hotProfile(img)
		n.attachProfile(img, p, artifact.ProfileRecorded, time.Unix(1e9, 0))
		id, _, err := n.images.Find(testContext(), img.ref, img.manifest)
		if err != nil {
			t.Fatal(err)
		}
		n.poll("some hot chunks", func() bool { return n.chunks.Stats().Hot > 4 })
		if evicted {
			n.evict(img)
		}
		m := n.artifactOf(img)
		data := func() int { // its indexes are in the hot blob
			first, _ := n.blobRequests(m.Layers[0].Digest)
			second, _ := n.blobRequests(m.Layers[1].Digest)
			return first + second
		}
		before := data()
		target := n.mountAt(id)
		if !evicted {
			n.poll("what is here is in the kernel's cache", func() bool {
				have, all := resident(t, filepath.Join(target, "hot1"))
				return have == all
			})
		}
		n.images.EndSearches()
		n.poll("end of the read-ahead", noChild)
		if got := data() - before; got != 0 {
			t.Errorf("evicted %v: %d requests for what nobody has read", evicted, got)
		}
		wantFiles(t, target, files)
	}
}

// evict reads another image, which there is room for but not for img beside it.
func (n *testNode) evict(img testImage) {
	n.t.Helper()
	other := map[string]string{"a": noise(21, 1_600_000), "b": noise(22, 1_600_000)}
	img2 := n.push("app:other", tarOf(n.t, file{"a", other["a"]}), tarOf(n.t, file{"b", other["b"]}))
	n.convert(img2)
	id, _, err := n.images.Find(testContext(), img2.ref, img2.manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	m := n.artifactOf(img)
	used := func() int64 {
		used, err := n.chunks.Usage(m.Layers[0].IndexDigest, m.Layers[1].IndexDigest)
		if err != nil {
			n.t.Fatal(err)
		}
		return used
	}
	before := used()
	n.poll("eviction", func() bool {
		n.wantMounted(id, other)
		return used() < before/2
	})
}
