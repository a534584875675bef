package fs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// direct writes the data device as two files, and the metadata image for them.
func (m *image) direct(t testing.TB) *Direct {
	t.Helper()
	half := int64(0) // a place between two files
	for _, e := range m.root.Entries {
		for _, x := range e.Inode.Extents {
			if x.DeviceOffset > int64(len(m.dev.data))/2 {
				half = x.DeviceOffset
			}
		}
	}
	parts := []int64{0}
	if half > 0 {
		parts = append(parts, half)
	}
	d := &Direct{Metadata: m.metadata(t, parts)}
	for i, at := range parts {
		path := filepath.Join(t.TempDir(), "part")
		if err := os.WriteFile(path, m.dev.data[at:append(parts, int64(len(m.dev.data)))[i+1]], 0o600); err != nil {
			t.Fatal(err)
		}
		d.Files = append(d.Files, path)
	}
	return d
}

func inDirectModes(t *testing.T, f func(t *testing.T, mode Mode)) {
	for _, mode := range []Mode{ModeFile, ModeLoop} {
		t.Run(string(mode), func(t *testing.T) { f(t, mode) })
	}
}

func filesImage() *image {
	m := newImage()
	for i := range 20 {
		m.file(fmt.Sprintf("file%02d", i), noise(byte(i), 100+i*i*5000))
	}
	return m
}

// contents compares the files in the root of an image with those at dir, which may be an overlay of it.
func (m *image) contents(t *testing.T, dir string) {
	t.Helper()
	for _, e := range m.root.Entries {
		want := m.dev.data[e.Inode.Extents[0].DeviceOffset:][:e.Inode.Size]
		if got, err := os.ReadFile(filepath.Join(dir, e.Name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s differs, %v", e.Name, err)
		}
	}
}

// A direct mount asks its Server for nothing, and what uses it does not notice the Server's end.
func TestDirect(t *testing.T) {
	inDirectModes(t, func(t *testing.T, mode Mode) {
		m := filesImage()
		img := m.write(t, "image")
		img.Direct = m.direct(t)
		if len(img.Direct.Files) != 2 {
			t.Fatalf("parts %v", img.Direct.Files)
		}
		s := newServer(t, Options{Mode: mode})
		target := t.TempDir()
		if err := s.Mount(t.Context(), img, target); err != nil {
			t.Fatal(err)
		}
		if !s.Mounted(target) || len(s.At(img.Metadata)) != 0 {
			t.Errorf("mounted: %v, through the Server: %q", s.Mounted(target), s.At(img.Metadata))
		}
		if got := s.Mounts(); len(got) != 1 || got[0] != (MountedImage{img.ID, target, true}) {
			t.Errorf("mounts: %+v", got)
		}
		m.compare(t, target)
		other := t.TempDir()
		if err := s.Mount(t.Context(), img, other); err != nil {
			t.Fatal(err)
		}
		merged := mountOverlay(t, other)
		if err := s.Unmount(target); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if entries, err := os.ReadDir(other); err != nil || len(entries) > 0 {
			t.Errorf("%d entries at the target of a Server that has ended: %v", len(entries), err)
		}
		m.contents(t, merged)
		if reads, _, _ := m.dev.counts(); reads != 0 {
			t.Errorf("%d reads of the Device", reads)
		}
	})
}

// What cannot be mounted directly is mounted as ever; mode tree has no such mounts.
func TestDirectFails(t *testing.T) {
	for _, mode := range modes {
		for name, spoil := range map[string]func(d *Direct){
			"no file":     func(d *Direct) { d.Files[1] += "-gone" },
			"no metadata": func(d *Direct) { d.Metadata += "-gone" },
			"one file":    func(d *Direct) { d.Files = d.Files[:1] },
			"many files":  func(d *Direct) { d.Files = make([]string, 100) },
		} {
			t.Run(string(mode)+" "+name, func(t *testing.T) {
				m := filesImage()
				img := m.write(t, "image")
				img.Direct = m.direct(t)
				spoil(img.Direct)
				s := newServer(t, Options{Mode: mode})
				target := mountImage(t, s, img)
				m.compare(t, target)
				if reads, _, _ := m.dev.counts(); reads == 0 {
					t.Error("it is mounted directly")
				}
				if _, err := s.Replace(img, target); err == nil {
					t.Error("it was replaced")
				}
				m.compare(t, target)
			})
		}
	}
}

// Replace takes the place of a mount in use: its users go on with it, others have the new one, and at no time is there none.
func TestReplace(t *testing.T) {
	inDirectModes(t, func(t *testing.T, mode Mode) {
		m := filesImage()
		img := m.write(t, "image")
		s := newServer(t, Options{Mode: mode})
		target := mountImage(t, s, img)
		if got := s.At(img.Metadata); len(got) != 1 || got[0] != target {
			t.Fatalf("mounted through the Server: %q", got)
		}
		if got := s.Mounts(); len(got) != 1 || got[0] != (MountedImage{img.ID, target, false}) {
			t.Errorf("mounts: %+v", got)
		}
		user, err := os.Open(filepath.Join(target, "file19"))
		if err != nil {
			t.Fatal(err)
		}
		defer user.Close()

		var looking sync.WaitGroup
		stop, begun := make(chan struct{}), make(chan struct{})
		looking.Go(func() {
			for n := 0; ; n++ {
				if n == 1000 {
					close(begun)
				}
				select {
				case <-stop:
					return
				default:
				}
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(target, "file00"), &st); err != nil {
					t.Errorf("look %d: %v", n, err)
					return
				}
			}
		})
		<-begun
		img.Direct = m.direct(t)
		gone, err := s.Replace(img, target)
		close(stop)
		looking.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if !s.Mounted(target) || len(s.At(img.Metadata)) != 0 {
			t.Errorf("mounted: %v, through the Server: %q", s.Mounted(target), s.At(img.Metadata))
		}
		if again, err := s.Replace(img, target); err != nil {
			t.Errorf("a direct mount replaced: %v", err)
		} else {
			<-again
		}
		before, _, _ := m.dev.counts()
		m.compare(t, target)
		if reads, _, _ := m.dev.counts(); reads != before {
			t.Errorf("%d reads of the Device by the new mount", reads-before)
		}
		select {
		case <-gone:
			t.Error("the old mount is gone, and has a user")
		default:
		}
		got := make([]byte, 1000)
		if _, err := user.ReadAt(got, 1_000_000); err != nil {
			t.Errorf("who uses the old mount: %v", err)
		}
		if reads, _, _ := m.dev.counts(); reads == before {
			t.Error("who used the old mount uses the new one")
		}
		user.Close()
		eventually(t, "the old mount gone", func() bool {
			select {
			case <-gone:
				return true
			default:
				return false
			}
		})
		m.contents(t, mountOverlay(t, target))
	})
}

// A direct mount goes on without a daemon, is the next one's, and whoever keeps releases it.
func TestDirectResumed(t *testing.T) {
	inDirectModes(t, func(t *testing.T, mode Mode) {
		for _, released := range []bool{false, true} {
			k := newKeeper(t, daemonArgs{Mode: mode}, 2)
			k.args.Direct = k.m.direct(t)
			k.start()
			k.ready()
			k.kill()
			startComparing(t, k.args.Targets[0]).finish(t)
			if !released {
				k.start() // whose mounts find those of the last
				k.ready()
				k.stdin.Close()
				if err := k.ended(); err != nil || len(k.kept) > 0 {
					t.Errorf("the last daemon: %v; still kept: %v", err, k.kept)
				}
			} else if err := Release(dropping{&socketKeeper{kept: k.kept}}); err != nil {
				t.Error(err)
			}
			for _, target := range k.args.Targets {
				if entries, err := os.ReadDir(target); err != nil || len(entries) > 0 {
					t.Errorf("%d entries at %s in the end: %v", len(entries), target, err)
				}
			}
		}
	})
}
