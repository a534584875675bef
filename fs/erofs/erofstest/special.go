package erofstest

import (
	"bytes"
	"fmt"
	"math"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"golang.org/x/sys/unix"
)

// Special makes a tree of what is rare but allowed: the limits of every field, and the sizes at which the layout of an image changes.
func (m *Maker) Special() *erofs.Inode {
	return dir(0o755,
		named("empty", dir(0o1777)),
		named("deep", m.deep(120)),
		named("names", m.names()),
		named("sizes", m.sizes()),
		named("symlinks", m.symlinks()),
		named("sparse", m.sparse()),
		named("xattrs", m.manyXattrs()),
		named("times", times()),
		named("owners", owners()),
		named("devices", devices()),
		named("links", m.links()),
	)
}

// Wide makes a directory of n files whose names have nameLen bytes.
func (m *Maker) Wide(n, nameLen int) *erofs.Inode {
	root := dir(0o755)
	for i := range n {
		name := fmt.Sprintf("%0*d", nameLen, i*7919%n)
		root.Entries = append(root.Entries, named(name, &erofs.Inode{Mode: unix.S_IFREG | 0o644, Mtime: int64(i)}))
	}
	return root
}

func named(name string, ino *erofs.Inode) erofs.Dirent { return erofs.Dirent{Name: name, Inode: ino} }

func dir(perm uint32, entries ...erofs.Dirent) *erofs.Inode {
	return &erofs.Inode{Mode: unix.S_IFDIR | perm, Mtime: 1e9, Entries: entries}
}

func (m *Maker) piece(off, size int64) *erofs.Inode {
	return &erofs.Inode{Mode: unix.S_IFREG | 0o644, Mtime: 1e9, Size: size, Extents: []erofs.Extent{{DeviceOffset: off, Size: size}}}
}

// deep nests n directories with long names: the path at the bottom is too long for a system call.
func (m *Maker) deep(n int) *erofs.Inode {
	d := dir(0o755, named("bottom", m.piece(0, 10)))
	for i := range n {
		d = dir(0o755, named(strings.Repeat(string(rune('a'+i%26)), 100), d))
	}
	return d
}

func (m *Maker) names() *erofs.Inode {
	d := dir(0o755, named(strings.Repeat("x", 255), dir(0o755)), named(strings.Repeat("\xff", 255), m.piece(0, 1)), named("new\nline", dir(0)))
	for c := 1; c < 256; c++ { // names before ".", between "." and "..", and after
		if c != '/' && c != '.' {
			d.Entries = append(d.Entries, named(string([]byte{byte(c)}), m.piece(0, 1)), named(string([]byte{'.', byte(c)}), m.piece(0, 1)))
		}
	}
	d.Entries = append(d.Entries, named("...", m.piece(0, 1)))
	return d
}

// sizes has directories, embedded data and files in one piece of the sizes around the block's.
func (m *Maker) sizes() *erofs.Inode {
	d := dir(0o755)
	add := func(kind string, n int64, ino *erofs.Inode) {
		d.Entries = append(d.Entries, named(fmt.Sprintf("%s-%d", kind, n), ino))
	}
	bs := m.BlockSize
	for _, n := range []int64{0, 1, 200, 256, bs - 65, bs - 64, bs - 63, bs - 1, bs, bs + 1, 2*bs - 1, 2 * bs, 2*bs + 100, 10*bs + 7} {
		add("embedded", n, &erofs.Inode{Mode: unix.S_IFREG | 0o600, Size: n, Data: bytes.Repeat([]byte("embedded"), int(n/8+1))[:n]})
		if n > 0 {
			add("piece", n, m.piece(m.DeviceSize-(n+4095)&^4095, n))
			add("hole", n, &erofs.Inode{Mode: unix.S_IFREG | 0o600, Size: n})
		}
	}
	add("piece", m.DeviceSize, m.piece(0, m.DeviceSize))
	for n := range int64(12) { // names that fill blocks to the byte, and not
		sub := dir(0o755)
		for i := range 2 + n*bs/512 {
			sub.Entries = append(sub.Entries, named(fmt.Sprintf("%0*d", 10+int(n), i), dir(0o700)))
		}
		add("dir", n, sub)
	}
	return d
}

func (m *Maker) symlinks() *erofs.Inode {
	d := dir(0o755)
	for _, n := range []int{1, 100, 431, 432, 447, 448, 449, 511, 512, 513, 1024, 4031, 4032, 4033, 4095} {
		ino := &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: bytes.Repeat([]byte("../"), n/3+1)[:n]}
		if n%2 == 0 {
			ino.Xattrs = []erofs.Xattr{{Name: "trusted.link", Value: bytes.Repeat([]byte("l"), 3*n%300)}}
		}
		d.Entries = append(d.Entries, named(fmt.Sprint(n), ino))
	}
	return d
}

// sparse has files with holes at every place, and pieces out of order. Logical sizes go to the gigabytes.
func (m *Maker) sparse() *erofs.Inode {
	bs := m.BlockSize
	file := func(size int64, x ...erofs.Extent) *erofs.Inode {
		return &erofs.Inode{Mode: unix.S_IFREG | 0o644, Size: size, Extents: x}
	}
	largest := int64(1 << 50)
	if bs == 4096 {
		largest = math.MaxInt64 // with smaller blocks its indexes would be 64 MiB
	}
	return dir(0o755,
		named("front", file(3*bs+5, erofs.Extent{FileOffset: 2 * bs, DeviceOffset: 8 * bs, Size: bs + 5})),
		named("end", file(7*bs+5, erofs.Extent{FileOffset: 0, DeviceOffset: 9 * bs, Size: 3 * bs})),
		named("middle", file(9*bs, erofs.Extent{Size: bs}, erofs.Extent{FileOffset: 8 * bs, DeviceOffset: 3 * bs, Size: bs})),
		named("swapped", file(2*bs, erofs.Extent{DeviceOffset: bs, Size: bs}, erofs.Extent{FileOffset: bs, DeviceOffset: 0, Size: bs})),
		named("joined", file(5*bs+1, erofs.Extent{DeviceOffset: bs, Size: bs}, erofs.Extent{FileOffset: bs, DeviceOffset: 2 * bs, Size: 4*bs + 1})),
		named("large", file(5<<30, erofs.Extent{FileOffset: 1 << 32, DeviceOffset: 4096, Size: 1 << 16})),
		named("hole", file(largest)),
	)
}

func (m *Maker) manyXattrs() *erofs.Inode {
	many := m.piece(0, 5000)
	for i := range 60 {
		many.Xattrs = append(many.Xattrs, erofs.Xattr{Name: fmt.Sprintf("user.many-%d", i), Value: bytes.Repeat([]byte{byte(i)}, i*7)})
	}
	shared := []erofs.Xattr{{Name: "user.shared", Value: bytes.Repeat([]byte("s"), 1000)}, {Name: "trusted.empty"}}
	for i := range 300 { // more than an inode can share
		shared = append(shared, erofs.Xattr{Name: fmt.Sprintf("user.s%d", i), Value: []byte("x")})
	}
	with := func(ino *erofs.Inode, xattrs ...erofs.Xattr) *erofs.Inode {
		ino.Xattrs = xattrs
		return ino
	}
	return dir(0o755,
		named("many", many),
		named("shared1", with(m.piece(0, 4097), shared...)),
		named("shared2", with(dir(0o755, named("x", m.piece(0, 1))), shared...)),
		named("empty", with(m.piece(4096, 100), erofs.Xattr{Name: "user.empty"})),
		named("large", with(m.piece(4096, 100), erofs.Xattr{Name: "user.large", Value: bytes.Repeat([]byte("large"), 13107)})),
		named("name", with(m.piece(4096, 100), erofs.Xattr{Name: "user." + strings.Repeat("n", 250), Value: []byte{0}})),
		named("capability", with(m.piece(0, 12), erofs.Xattr{Name: "security.capability", Value: Capability(1 << 13)})),
		named("acl", with(dir(0o750), erofs.Xattr{Name: "system.posix_acl_access", Value: ACL(1000)}, erofs.Xattr{Name: "system.posix_acl_default", Value: ACL(70000)})),
		named("char", with(&erofs.Inode{Mode: unix.S_IFCHR}, erofs.Xattr{Name: "trusted.dev", Value: []byte("v")})),
	)
}

func times() *erofs.Inode {
	d := dir(0o755)
	for i, sec := range []int64{math.MinInt64, -1 << 40, -1 << 31, -1, 0, 1, 1<<31 - 1, 1 << 31, 1<<32 + 5, 1 << 34, 1 << 50, math.MaxInt64} {
		d.Entries = append(d.Entries, named(fmt.Sprint(sec), &erofs.Inode{Mode: unix.S_IFREG, Mtime: sec, MtimeNsec: []uint32{0, 1, 999999999}[i%3]}))
	}
	return d
}

func owners() *erofs.Inode {
	d := dir(0o755)
	for _, id := range []uint32{0, 65535, 65536, 1 << 31, 4294967294} {
		d.Entries = append(d.Entries, named(fmt.Sprint(id), &erofs.Inode{Mode: unix.S_IFREG | 0o7777, UID: id, GID: 4294967294 - id}))
	}
	return d
}

func devices() *erofs.Inode {
	return dir(0o755,
		named("null", &erofs.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: EncodeDev(1, 3)}),
		named("whiteout", &erofs.Inode{Mode: unix.S_IFCHR}),
		named("largest", &erofs.Inode{Mode: unix.S_IFBLK | 0o600, Rdev: EncodeDev(1<<12-1, 1<<20-1)}),
		named("fifo", &erofs.Inode{Mode: unix.S_IFIFO | 0o600}),
		named("socket", &erofs.Inode{Mode: unix.S_IFSOCK | 0o700}),
	)
}

// links has files with names in several directories.
func (m *Maker) links() *erofs.Inode {
	file, device, link := m.piece(0, 9000), &erofs.Inode{Mode: unix.S_IFCHR, Rdev: 5}, &erofs.Inode{Mode: unix.S_IFLNK | 0o777, Data: []byte("f")}
	file.Xattrs = []erofs.Xattr{{Name: "user.one", Value: []byte("1")}}
	return dir(0o755,
		named("a", dir(0o755, named("f", file), named("g", file), named("dev", device))),
		named("b", dir(0o755, named("f", file), named("dev", device), named("link", link))),
		named("link", link), named("f", file),
		named("hidden", &erofs.Inode{Mode: unix.S_IFREG | 0o644, Nlink: 70000}), // names that the tree has not
	)
}
