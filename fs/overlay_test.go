package fs

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs/erofstest"
)

// mountOverlay mounts an overlay on lower until the end of the test.
func mountOverlay(t testing.TB, lower string) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	for _, name := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Errorf("unmount overlay: %v", err)
		}
	})
	return merged
}

// TestPosixIn runs go-fuse's POSIX tests in the directory $FS_TEST_POSIX_DIR. It is run by TestPosix, in another process, because a
// test cannot look on while another one fails.
func TestPosixIn(t *testing.T) {
	dir := os.Getenv("FS_TEST_POSIX_DIR")
	if dir == "" {
		return
	}
	for name, test := range posixtest.All {
		t.Run(name, func(t *testing.T) {
			sub := filepath.Join(dir, name)
			if err := os.Mkdir(sub, 0o755); err != nil {
				t.Fatal(err)
			}
			test(t, sub)
		})
	}
}

// posixFailures returns the POSIX tests that fail in dir.
func posixFailures(t *testing.T, dir string) map[string]bool {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestPosixIn$", "-test.v")
	cmd.Env = append(os.Environ(), "FS_TEST_POSIX_DIR="+dir)
	out, _ := cmd.CombinedOutput()
	failed, passed := map[string]bool{}, 0
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		verdict, name, _ := strings.Cut(strings.TrimSpace(lines.Text()), " TestPosixIn/")
		name, _, _ = strings.Cut(name, " ")
		switch verdict {
		case "--- FAIL:":
			failed[name] = true
		case "--- PASS:":
			passed++
		}
	}
	if passed < 20 {
		t.Fatalf("POSIX tests in %s:\n%s", dir, out)
	}
	return failed
}

func TestPosix(t *testing.T) {
	plain := posixFailures(t, t.TempDir())
	m := madeImage(func(m *erofstest.Maker) *erofs.Inode { return m.Tree(300) })
	m.root.Mode = unix.S_IFDIR | 0o755
	inModes(t, func(t *testing.T, s *Server) {
		merged := mountOverlay(t, mountImage(t, s, m.write(t, "image")))
		for name := range posixFailures(t, merged) {
			if !plain[name] {
				t.Errorf("%s fails on an overlay of the mount, and not on a plain directory", name)
			}
		}
	})
}

// fromMount is a command that runs a program which may be on a mount of this process. A shell executes it: until a child of this process
// has executed its program, which has to be read, this process cannot collect garbage, and so may not answer.
func fromMount(name string, args ...string) *exec.Cmd {
	return exec.Command("sh", append([]string{"-c", `exec "$0" "$@"`, name}, args...)...)
}

// asUser runs a program as user and group uid.
func asUser(uid uint32, name string, args ...string) (string, error) {
	cmd := fromMount(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

const nobody, somebody = 65534, 12345 // users

// TestPermissions checks what programs of users get, on the mount and on an overlay of it.
func TestPermissions(t *testing.T) {
	m := newImage()
	secret := m.file("secret", []byte("for nobody"))
	secret.Mode = unix.S_IFREG | 0o640
	secret.Xattrs = []erofs.Xattr{{Name: "system.posix_acl_access", Value: erofstest.ACL(nobody)}}
	private := m.file("private", []byte("for root"))
	private.Mode = unix.S_IFREG | 0o600
	cat := readProgram(t, "cat")
	m.file("cat-with-capability", cat).Mode = unix.S_IFREG | 0o755
	m.root.Entries[len(m.root.Entries)-1].Inode.Xattrs = []erofs.Xattr{{Name: "security.capability", Value: erofstest.Capability(1 << unix.CAP_NET_RAW)}}
	m.file("id-suid", readProgram(t, "id")).Mode = unix.S_IFREG | 0o4755
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		for p := target; p != "/"; p = filepath.Dir(p) { // let users reach it
			if p != target && strings.HasPrefix(p, os.TempDir()+"/") {
				if err := os.Chmod(p, 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		check := func(name, dir string) {
			t.Run(name, func(t *testing.T) { checkPermissions(t, dir) })
		}
		check("mount", target)
		merged := mountOverlay(t, target)
		for p := merged; strings.HasPrefix(p, os.TempDir()+"/"); p = filepath.Dir(p) {
			if err := os.Chmod(p, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		check("overlay", merged)
	})
}

func readProgram(t *testing.T, name string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func checkPermissions(t *testing.T, dir string) {
	if out, err := asUser(nobody, "cat", dir+"/secret"); out != "for nobody" {
		t.Errorf("the user named in an ACL reads %q, %v", out, err)
	}
	if out, err := asUser(somebody, "cat", dir+"/secret"); err == nil {
		t.Errorf("another user reads %q", out)
	}
	if out, err := asUser(nobody, "cat", dir+"/private"); err == nil {
		t.Errorf("a user reads %q of a file of mode 0600", out)
	}
	if out, err := exec.Command("getfacl", "-nc", dir+"/secret").CombinedOutput(); !strings.Contains(string(out), "user:65534:r-x") {
		t.Errorf("getfacl: %s, %v", out, err)
	}
	out, err := asUser(nobody, dir+"/cat-with-capability", "/proc/self/status")
	if !strings.Contains(out, "CapEff:\t0000000000002000") {
		t.Errorf("a program with cap_net_raw=ep runs with %s, %v", out, err)
	}
	if out, err := asUser(nobody, dir+"/id-suid", "-u"); strings.TrimSpace(out) != "0" {
		t.Errorf("a set-user-ID program runs as %s, %v", out, err)
	}
}

// TestIDMapped makes an ID-mapped mount of the mount, as container runtimes do for user namespaces.
func TestIDMapped(t *testing.T) {
	m := newImage()
	m.file("file", []byte("content")).UID = 7
	inModes(t, func(t *testing.T, s *Server) {
		target := mountImage(t, s, m.write(t, "image"))
		ns := userNamespace(t, 100_000)
		fd, err := unix.OpenTree(unix.AT_FDCWD, target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			t.Fatalf("map IDs: %v", err)
		}
		var st unix.Stat_t
		if err := unix.Fstatat(fd, "file", &st, 0); err != nil || st.Uid != 100_007 {
			t.Errorf("owner %d, %v; want 100007", st.Uid, err)
		}
		f, err := unix.Openat(fd, "file", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(f)
		p := make([]byte, 100)
		if n, err := unix.Read(f, p); string(p[:max(n, 0)]) != "content" {
			t.Errorf("read %q, %v", p[:max(n, 0)], err)
		}
	})
}

// userNamespace makes a user namespace whose IDs begin at base outside.
func userNamespace(t *testing.T, base int) *os.File {
	t.Helper()
	cmd := exec.Command("cat")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: base, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	in, err := cmd.StdinPipe() // cat lives until it is closed
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
