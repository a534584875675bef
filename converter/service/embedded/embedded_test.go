package embedded

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
)

// TestDiskFull: a server whose disk is full says that it has failed, and one that is started when there is room goes on with all that was answered. By itself it
// would not: NATS keeps the error of a store's file.
func TestDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	open := func() (*Server, jetstream.KeyValue) {
		t.Helper()
		s, err := Start(t.Context(), filepath.Join(disk, "nats"), slog.New(slog.NewTextHandler(t.Output(), nil)))
		if err != nil {
			t.Fatal(err)
		}
		js, err := jetstream.New(s.Conn)
		if err != nil {
			t.Fatal(err)
		}
		kv, err := js.CreateOrUpdateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "test"})
		if err != nil {
			t.Fatal(err)
		}
		return s, kv
	}
	value := make([]byte, 64<<10)
	s, kv := open()
	if _, err := kv.Put(t.Context(), "key0", value); err != nil || s.Err() != nil {
		t.Fatal(err, s.Err())
	}
	f, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(value)
	}
	n := 0
	for err = nil; err == nil; {
		n++
		_, err = kv.Put(t.Context(), fmt.Sprint("key", n), value)
	}
	<-s.Failed
	if s.Err() == nil {
		t.Error("it says not why")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	s, kv = open()
	if _, err := kv.Put(t.Context(), "after", value); err != nil {
		t.Error(err)
	}
	for i := range n {
		if _, err := kv.Get(t.Context(), fmt.Sprint("key", i)); err != nil {
			t.Errorf("key%d: %v", i, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
