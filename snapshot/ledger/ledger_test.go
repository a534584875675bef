package ledger

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func key(tar, index string) Key { return Key{digest.FromString(tar), digest.FromString(index)} }

func open(t *testing.T, dir string) *Ledger {
	t.Helper()
	l, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestLedger: what was entered is there after a restart, of the very pair of tar and index.
func TestLedger(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	good, bad := key("tar", "index"), key("tar", "index that lies")
	if err := l.Prove(Proof{Key: good, At: time.Unix(1, 0), Bytes: 3}); err != nil {
		t.Fatal(err)
	}
	if err := l.Quarantine(Quarantine{Key: bad, At: time.Unix(2, 0), Why: "chunk 1"}); err != nil {
		t.Fatal(err)
	}
	if err := l.Quarantine(Quarantine{Key: bad, At: time.Unix(3, 0), Why: "chunk 2"}); err != nil { // the first stands
		t.Fatal(err)
	}
	for range 2 {
		if !l.Proven(good) || l.Proven(bad) || l.Proven(key("tar", "unknown")) || l.Proven(key("another tar", "index")) {
			t.Errorf("proven: %v, %v", l.Proven(good), l.Proven(bad))
		}
		q, ok := l.Quarantined(bad.Index)
		if _, isBad := l.Quarantined(good.Index); !ok || isBad || q.Why != "chunk 1" || q.Key != bad {
			t.Errorf("quarantine %+v, %v", q, ok)
		}
		l = open(t, dir)
	}
	if err := l.Clear(bad.Index); err != nil {
		t.Fatal(err)
	}
	if err := l.Clear(bad.Index); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("cleared twice: %v", err)
	}
	for range 2 {
		if _, ok := l.Quarantined(bad.Index); ok || l.Proven(bad) {
			t.Error("in quarantine after it was cleared, or proven by that")
		}
		l = open(t, dir)
	}
}

// TestQuarantineBeatsProof: what was proven before, by a release with a mistake for example, is not proven while it is in quarantine, and not after it either.
func TestQuarantineBeatsProof(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	k := key("tar", "index")
	if err := errors.Join(l.Prove(Proof{Key: k, At: time.Now()}), l.Quarantine(Quarantine{Key: k})); err != nil {
		t.Fatal(err)
	}
	if l.Proven(k) {
		t.Error("proven, in quarantine")
	}
	if err := l.Clear(k.Index); err != nil {
		t.Fatal(err)
	}
	if l.Proven(k) || open(t, dir).Proven(k) {
		t.Error("proven without a new proof")
	}
}

// TestClearedInPart: of what ends before a quarantine is cleared no proof is left that was known to be wrong, also if the record of the quarantine does not say of which tar it is.
func TestClearedInPart(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	k := key("tar", "index")
	if err := errors.Join(l.Prove(Proof{Key: k, At: time.Now()}), l.Quarantine(Quarantine{Key: k})); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "quarantined", k.Index.Encoded())
	// A directory that is not empty, which is what root cannot remove.
	if err := errors.Join(os.Remove(file), os.MkdirAll(filepath.Join(file, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if err := l.Clear(k.Index); err == nil {
		t.Fatal("cleared")
	}
	if _, ok := l.Quarantined(k.Index); !ok {
		t.Error("not in quarantine")
	}
	if err := os.RemoveAll(file); err != nil { // as if that had been done, and nothing after it
		t.Fatal(err)
	}
	if open(t, dir).Proven(k) {
		t.Error("the wrong proof is left")
	}
	if err := l.Clear(k.Index); err != nil {
		t.Fatal(err)
	}
	if l.Proven(k) {
		t.Error("proven without a new proof")
	}
}

// TestDamaged: what cannot be read is no proof, and is a quarantine.
func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"empty":         func(path string) error { return os.Truncate(path, 0) },
		"half":          func(path string) error { return os.Truncate(path, 20) },
		"newer version": func(path string) error { return os.WriteFile(path, []byte(`{"version":2,"entry":{}}`), 0o600) },
		"another's":     func(path string) error { return os.WriteFile(path, []byte(`{"version":1,"entry":{}}`), 0o600) },
		"a directory":   func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			k, bad := key("tar", "index"), key("tar", "index that lies")
			if err := errors.Join(l.Prove(Proof{Key: k}), l.Quarantine(Quarantine{Key: bad})); err != nil {
				t.Fatal(err)
			}
			proof := filepath.Join(dir, "proven", k.DiffID.Encoded(), k.Index.Encoded())
			quarantine := filepath.Join(dir, "quarantined", bad.Index.Encoded())
			if err := errors.Join(damage(proof), damage(quarantine)); err != nil {
				t.Fatal(err)
			}
			l = open(t, dir)
			if l.Proven(k) {
				t.Error("proven by what cannot be read")
			}
			if _, ok := l.Quarantined(bad.Index); !ok {
				t.Error("free by what cannot be read")
			}
		})
	}
}

// TestDiskRefuses: a quarantine counts at once, and is on disk when the disk takes it; a proof does not count before.
func TestDiskRefuses(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	k := key("tar", "index")
	for _, d := range []string{"proven", "quarantined"} { // what root cannot write to either
		if err := errors.Join(os.Remove(filepath.Join(dir, d)), os.WriteFile(filepath.Join(dir, d), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Prove(Proof{Key: k}); err == nil || l.Proven(k) {
		t.Errorf("proven in memory alone: %v", err)
	}
	if err := l.Quarantine(Quarantine{Key: k}); err == nil {
		t.Error("no error of the disk")
	}
	if _, ok := l.Quarantined(k.Index); !ok {
		t.Error("not in quarantine")
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "quarantined")), os.Mkdir(filepath.Join(dir, "quarantined"), 0o700), l.Save()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "quarantined", k.Index.Encoded())); err != nil {
		t.Error(err)
	}
}

func TestRetain(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	used, young, old := key("used", "index"), key("young", "index"), key("old", "index")
	long := time.Now().Add(-2 * unusedFor)
	err := errors.Join(l.Prove(Proof{Key: used, At: long}), l.Prove(Proof{Key: young, At: time.Now()}), l.Prove(Proof{Key: old, At: long}),
		l.Quarantine(Quarantine{Key: key("tar", "liar"), At: long}))
	if err != nil {
		t.Fatal(err)
	}
	l.Retain(func(k Key) bool { return k == used })
	for range 2 {
		if _, bad := l.Quarantined(digest.FromString("liar")); !l.Proven(used) || !l.Proven(young) || l.Proven(old) || !bad {
			t.Errorf("used %v, young %v, old %v, quarantine %v", l.Proven(used), l.Proven(young), l.Proven(old), bad)
		}
		l = open(t, dir)
	}
}

// TestNames: a digest that is none, or of another kind, names no file.
func TestNames(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	for _, d := range []digest.Digest{"", "sha256:../../x", digest.Digest("sha512:" + strings.Repeat("0", 128)), "sha256:" + digest.Digest(make([]byte, 64))} {
		good := digest.FromString("x")
		if l.Prove(Proof{Key: Key{good, d}}) == nil || l.Prove(Proof{Key: Key{d, good}}) == nil || l.Quarantine(Quarantine{Key: Key{good, d}}) == nil {
			t.Errorf("%q was taken", d)
		}
	}
}

// FuzzLedger reads arbitrary files.
func FuzzLedger(f *testing.F) {
	f.Add([]byte(`{"version":1,"entry":{"diffID":"sha256:x","index":"sha256:y","why":"z"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		k := key("tar", "index")
		proofs := filepath.Join(dir, "proven", k.DiffID.Encoded())
		quarantines := filepath.Join(dir, "quarantined")
		if err := errors.Join(os.MkdirAll(proofs, 0o700), os.MkdirAll(quarantines, 0o700),
			os.WriteFile(filepath.Join(proofs, k.Index.Encoded()), b, 0o600), os.WriteFile(filepath.Join(quarantines, k.Index.Encoded()), b, 0o600)); err != nil {
			t.Fatal(err)
		}
		l := open(t, dir)
		if _, ok := l.Quarantined(k.Index); !ok {
			t.Error("no quarantine")
		}
		l.List()
	})
}
