package fs

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// connect starts a session whose kernel is the test, at the other end of a socket.
func connect(t *testing.T, f filesystem) (*session, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	st, err := newState()
	if err != nil {
		t.Fatal(err)
	}
	s := makeSession("", os.NewFile(uintptr(fds[0]), "device"), f, st, sessionOptions{log: slog.New(slog.DiscardHandler), memory: newMemory()})
	s.readers.Store(1)
	s.work.Go(s.serve)
	t.Cleanup(func() {
		unix.Close(fds[1])
		s.work.Wait()
		s.device.Close()
		st.close()
	})
	return s, fds[1]
}

// send sends a request, whose header it completes.
func send[T any](t *testing.T, kernel int, opcode uint32, unique uint64, in T) {
	t.Helper()
	p := unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in))
	h := header(p)
	h.Length, h.Opcode, h.Unique = uint32(len(p)), opcode, unique
	if _, err := unix.Write(kernel, p); err != nil {
		t.Fatal(err)
	}
}

// receive receives a reply.
func receive(t *testing.T, kernel int) (fuse.OutHeader, []byte) {
	t.Helper()
	p := make([]byte, maxRead+outHeaderSize)
	n, err := unix.Read(kernel, p)
	if err != nil || n < outHeaderSize {
		t.Fatalf("reply of %d bytes, %v", n, err)
	}
	h := *(*fuse.OutHeader)(unsafe.Pointer(&p[0]))
	if int(h.Length) != n {
		t.Errorf("reply of %d bytes says it has %d", n, h.Length)
	}
	return h, p[outHeaderSize:n]
}

func want(t *testing.T, h fuse.OutHeader, unique uint64, errno unix.Errno) {
	t.Helper()
	if h.Unique != unique || h.Status != -int32(errno) {
		t.Errorf("reply to %d is %v, want to %d %v", h.Unique, unix.Errno(-h.Status), unique, errno)
	}
}

func TestProtocol(t *testing.T) {
	dev := &testDevice{data: noise(1, 10_000)}
	st, err := newState()
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	d := newDevices(st)
	if _, err := d.acquire("a", dev); err != nil {
		t.Fatal(err)
	}
	_, kernel := connect(t, d)
	read := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: deviceNode("a")}, Size: 4096}

	send(t, kernel, opInterrupt, 3, fuse.InterruptIn{Unique: 2})
	h, _ := receive(t, kernel)
	want(t, h, 3, unix.EAGAIN) // of a request not yet read

	release := dev.block(t)
	const again = 4 | resent
	send(t, kernel, opRead, again, read) // as after FUSE_NOTIFY_RESEND
	eventually(t, "a read of the device", func() bool { _, running, _ := dev.counts(); return running == 1 })
	send(t, kernel, opInterrupt, 5, fuse.InterruptIn{InHeader: fuse.InHeader{}, Unique: 4}) // of no thread that we see: ignored
	send(t, kernel, 9999, 6, fuse.InHeader{})
	h, _ = receive(t, kernel)
	want(t, h, 6, unix.ENOSYS)
	release()
	h, payload := receive(t, kernel)
	want(t, h, again, 0)
	if string(payload) != string(dev.data[:4096]) {
		t.Error("READ differs")
	}

	dev.fail(errors.New("broken"))
	send(t, kernel, opRead, 8, read)
	h, _ = receive(t, kernel)
	want(t, h, 8, unix.EIO)
	dev.fail(nil)

	read.NodeId = deviceNode("b")
	send(t, kernel, opRead, 10, read)
	h, _ = receive(t, kernel)
	want(t, h, 10, unix.EIO)

	list := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: 1}, Size: 1 << 30} // more than fits
	send(t, kernel, opReadDir, 12, list)
	h, payload = receive(t, kernel)
	want(t, h, 12, 0)
	if entries, err := fuse.ParseDirEntries(payload); len(entries) != 3 || err != nil {
		t.Errorf("READDIR gives %v, %v", entries, err)
	}

	send(t, kernel, 22, 14, fuse.GetXAttrIn{InHeader: fuse.InHeader{NodeId: 1}, Size: 1 << 30}) // go-fuse gives no reply at all
	h, _ = receive(t, kernel)
	want(t, h, 14, unix.EIO)

	send(t, kernel, 2, 16, fuse.ForgetIn{}) // no reply
	send(t, kernel, 3, 18, fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: 1}})
	h, _ = receive(t, kernel)
	want(t, h, 18, 0)
}

func TestMemory(t *testing.T) {
	m := newMemory()
	var held [][]byte
	for range readMemory / maxRead {
		p, err := m.get(t.Context(), maxRead)
		if err != nil || len(p) != maxRead {
			t.Fatalf("buffer of %d bytes, %v", len(p), err)
		}
		held = append(held, p)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.get(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a buffer beyond the budget: %v", err)
	}
	m.put(held[0])
	if p, err := m.get(t.Context(), 5000); err != nil || len(p) != 5000 || cap(p) != 8192 {
		t.Errorf("buffer of %d bytes, capacity %d, %v", len(p), cap(p), err)
	}
}
