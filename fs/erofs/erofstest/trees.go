package erofstest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"golang.org/x/sys/unix"
)

// Device makes a data device of size random bytes, removed after the test. No two blocks of it are equal.
func Device(tb testing.TB, size int) *os.File {
	tb.Helper()
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(b)
	name := filepath.Join(tb.TempDir(), "device")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return f
}

// Maker makes trees for images with blocks of BlockSize and a data device of DeviceSize, which is a multiple of 4096.
type Maker struct {
	Rand       *rand.Rand
	BlockSize  int64
	DeviceSize int64
	NoHoles    bool // random files get none
}

// Tree makes a random tree with n names: all types, odd names, hard links across directories, sparse files, attributes.
func (m *Maker) Tree(n int) *erofs.Inode {
	root := m.inode(unix.S_IFDIR)
	dirs := []*erofs.Inode{root}
	names := map[*erofs.Inode]map[string]bool{root: {}}
	var files []*erofs.Inode
	for range n {
		dir := dirs[max(0, len(dirs)-1-int(m.Rand.ExpFloat64()*8))]
		name := m.name()
		if names[dir][name] {
			continue
		}
		names[dir][name] = true
		var ino *erofs.Inode
		switch k := m.Rand.IntN(20); {
		case k == 0 && len(files) > 0:
			ino = files[m.Rand.IntN(len(files))]
		case k < 4:
			ino = m.inode(unix.S_IFDIR)
			dirs = append(dirs, ino)
			names[ino] = map[string]bool{}
		default:
			ino = m.inode([]uint32{unix.S_IFREG, unix.S_IFREG, unix.S_IFREG, unix.S_IFREG, unix.S_IFREG, unix.S_IFLNK, unix.S_IFLNK,
				unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK}[m.Rand.IntN(11)])
			files = append(files, ino)
		}
		dir.Entries = append(dir.Entries, erofs.Dirent{Name: name, Inode: ino})
	}
	return root
}

func (m *Maker) name() string {
	n := 1 + m.Rand.IntN(12)
	if m.Rand.IntN(10) == 0 {
		n = 200 + m.Rand.IntN(56)
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = "abcdefghijklmnopqrstuvwxyz.-_!~ \x01\x7f\xff\xc3"[m.Rand.IntN(36)]
	}
	if s := string(b); s != "." && s != ".." {
		return s
	}
	return "dots"
}

// inode makes an inode of the type typ, without entries.
func (m *Maker) inode(typ uint32) *erofs.Inode {
	ino := &erofs.Inode{
		Mode: typ | m.Rand.Uint32()&0o7777, UID: m.id(), GID: m.id(),
		Mtime: m.Rand.Int64N(4e9) - 1e9, MtimeNsec: m.Rand.Uint32N(1e9),
	}
	switch typ {
	case unix.S_IFREG:
		m.data(ino)
	case unix.S_IFLNK:
		ino.Mode = typ | 0o777
		ino.Data = bytes.Repeat([]byte{'t', 'a', '/'}, 1+m.Rand.IntN(1+1<<m.Rand.IntN(11)))
		ino.Data = ino.Data[:min(len(ino.Data), 4095)]
	case unix.S_IFCHR, unix.S_IFBLK:
		ino.Rdev = EncodeDev(m.Rand.Uint32N(1<<12), m.Rand.Uint32N(1<<20))
	}
	if m.Rand.IntN(3) == 0 {
		m.xattrs(ino)
	}
	return ino
}

func (m *Maker) id() uint32 {
	return []uint32{0, 0, 0, 1, 1000, 65534, 65536, 4294967294}[m.Rand.IntN(8)]
}

// data gives a regular file its content: none, embedded, in one piece, or sparse.
func (m *Maker) data(ino *erofs.Inode) {
	switch m.Rand.IntN(6) {
	case 0:
	case 1:
		ino.Data = make([]byte, m.Rand.IntN(3*int(m.BlockSize)))
		for i := range ino.Data {
			ino.Data[i] = byte(m.Rand.Uint32())
		}
		ino.Size = int64(len(ino.Data))
	case 2:
		ino.Size = m.Rand.Int64N(1 << 20)
		for off := int64(0); off < ino.Size; {
			size := (1 + m.Rand.Int64N(8)) * m.BlockSize << m.Rand.IntN(4)
			if size = min(size, ino.Size-off); m.NoHoles || m.Rand.IntN(3) > 0 {
				ino.Extents = append(ino.Extents, erofs.Extent{FileOffset: off, DeviceOffset: m.deviceOffset(size), Size: size})
			}
			off += size
		}
	default:
		ino.Size = 1 + m.Rand.Int64N(min(m.DeviceSize, 1<<m.Rand.IntN(18)))
		ino.Extents = []erofs.Extent{{DeviceOffset: m.deviceOffset(ino.Size), Size: ino.Size}}
	}
}

// deviceOffset returns where size bytes may lie.
func (m *Maker) deviceOffset(size int64) int64 {
	return m.Rand.Int64N(m.DeviceSize-size+1) &^ (m.BlockSize - 1)
}

// xattrs gives ino attributes that Linux shows for its type.
func (m *Maker) xattrs(ino *erofs.Inode) {
	add := func(name string, value []byte) {
		ino.Xattrs = append(ino.Xattrs, erofs.Xattr{Name: name, Value: value})
	}
	typ := ino.Mode & unix.S_IFMT
	for i := range m.Rand.IntN(3) {
		add(fmt.Sprintf("trusted.%d", i), []byte{byte(m.Rand.IntN(2))})
	}
	if m.Rand.IntN(2) == 0 {
		add("security.selinux", []byte("system_u:object_r:usr_t:s0\x00"))
	}
	if typ == unix.S_IFREG || typ == unix.S_IFDIR {
		for i := range m.Rand.IntN(4) {
			add(fmt.Sprintf("user.%d", i), bytes.Repeat([]byte{byte(i)}, m.Rand.IntN(1<<m.Rand.IntN(11))))
		}
	}
	if typ == unix.S_IFREG && m.Rand.IntN(2) == 0 {
		add("security.capability", Capability(m.Rand.Uint32()&0xff))
	}
	if typ != unix.S_IFLNK && m.Rand.IntN(4) == 0 {
		add("system.posix_acl_access", ACL(m.Rand.Uint32N(70000)))
	}
	if typ == unix.S_IFDIR && m.Rand.IntN(4) == 0 {
		add("system.posix_acl_default", ACL(m.Rand.Uint32N(70000)))
	}
}

// Capability is a valid value of security.capability that permits caps.
func Capability(caps uint32) []byte {
	b := make([]byte, 20)
	binary.LittleEndian.PutUint32(b, 0x02000001) // VFS_CAP_REVISION_2, effective
	binary.LittleEndian.PutUint32(b[4:], caps)
	return b
}

// ACL is a valid value of a POSIX ACL that names the user uid.
func ACL(uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2) // version
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, math.MaxUint32}, {2, 5, uid}, {4, 5, math.MaxUint32}, {0x10, 5, math.MaxUint32}, {0x20, 0, math.MaxUint32}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}
