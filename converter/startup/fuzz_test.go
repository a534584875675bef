package startup

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

// roles are files that a start looks into: each with what leads to it.
var roles = []string{"/bin/script", "/srv/main.py", "/srv/main.js", "/srv/package.json", "/usr/bin/program", "/lib/library.so", "/etc/ld.so.cache", "/etc/nginx/nginx.conf",
	localeArchive, "/srv/main.pl", "/usr/lib/python3.9/x.so"}

// FuzzFind puts anything into the place of any file that is looked into: there is no panic, no more work than allowed, and what is found lies on the
// device.
func FuzzFind(f *testing.F) {
	for role := range roles {
		f.Add(uint8(role), []byte("#!/bin/sh\nexec \"$@\" $(a `b`) ${c:-d} 'e' # f\n"))
		f.Add(uint8(role), []byte("from .a import (b,\n c)\nimport x; require('./y'); include z/*;\nuse A::B;\n"))
	}
	for _, name := range []string{"/bin/true", "/etc/ld.so.cache", "/usr/lib/locale/locale-archive"} {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		for role := range roles {
			f.Add(uint8(role), b[:min(len(b), 8<<10)])
		}
	}
	f.Fuzz(func(t *testing.T, role uint8, content []byte) {
		tree := newTree().file("/bin/sh", noELF).file("/usr/bin/node", noELF).file("/usr/bin/python3.9", noELF).file("/usr/bin/perl", noELF).file("/usr/sbin/nginx", noELF).
			file("/usr/lib/python3.9/os.py", "import x")
		for i, name := range roles {
			if i == int(role)%len(roles) {
				tree.file(name, string(content))
			}
		}
		config := ocispec.ImageConfig{
			Cmd: []string{"/bin/sh", "-c", "script; program; python3.9 main.py; node main.js; perl main.pl; nginx"}, WorkingDir: "/srv",
			Env: []string{"PATH=/bin:/usr/bin:/usr/sbin:/lib", "LANG=en_US.utf8"},
		}
		reads := 0
		ranges, err := Find(t.Context(), Image{Config: config, Root: tree.root, ReadAt: func(ctx context.Context, p []byte, off int64) error {
			if reads++; reads > 1<<20 {
				t.Fatal("it reads on and on")
			}
			return tree.readAt(ctx, p, off)
		}})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range ranges {
			if r.Offset < 0 || r.Size <= 0 || r.Offset+r.Size > int64(len(tree.device)) {
				t.Fatalf("range %+v of a device of %d bytes", r, len(tree.device))
			}
		}
	})
}

// TestBounded: images that would keep us busy do not.
func TestBounded(t *testing.T) {
	deep := newTree()
	deep.file("/bin/sh", noELF)
	var calls strings.Builder
	for i := range 26 {
		c := string(rune('a' + i))
		calls.WriteString(c + " x$1; " + c + " $1y\n")
	}
	for i := range 26 { // each runs each, with ever more arguments
		deep.file("/bin/"+string(rune('a'+i)), "#!/bin/sh\n"+calls.String())
	}
	wide := newTree().file("/usr/bin/node", noELF)
	wide.file("/srv/main.js", strings.Repeat("require('./main.js');require('"+strings.Repeat("../", 1000)+"x');", 1000))
	large := newTree()
	large.put("/bin/large", &erofs.Inode{Mode: unix.S_IFREG | 0o755, Size: 1 << 44, Extents: []erofs.Extent{{Size: 1 << 44}}})
	for name, tt := range map[string]struct {
		tree *testTree
		cmd  []string
	}{"scripts that run scripts": {deep, []string{"a", "q"}}, "long paths": {wide, []string{"node", "/srv/main.js"}}, "a huge program": {large, []string{"large"}}} {
		t.Run(name, func(t *testing.T) {
			var bytes int64
			img := Image{Config: ocispec.ImageConfig{Cmd: tt.cmd, Env: []string{"PATH=/bin:/usr/bin"}}, Root: tt.tree.root, ReadAt: func(ctx context.Context, p []byte, off int64) error {
				bytes += int64(len(p))
				if off+int64(len(p)) <= int64(len(tt.tree.device)) {
					return tt.tree.readAt(ctx, p, off)
				}
				return nil
			}}
			ranges, err := Find(t.Context(), img)
			if err != nil && !errors.Is(err, ErrUnknown) {
				t.Fatal(err)
			}
			var found int64
			for _, r := range ranges {
				found += r.Size
			}
			if bytes > maxRead || found > maxTaken || len(ranges) > maxRanges {
				t.Errorf("read %d bytes, found %d in %d ranges", bytes, found, len(ranges))
			}
		})
	}
}
