package notary_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// TestRevocationIsKept: the servers are asked once, by both ways, also by the next process; a forged answer is not kept, and neither is a damaged file.
func TestRevocationIsKept(t *testing.T) {
	for name, leaf := range map[string]trusttest.Leaf{"ocsp": {}, "crl": {CRLOnly: true}} {
		t.Run(name, func(t *testing.T) {
			server := trusttest.NewServer(t)
			ca := trusttest.NewCA(t, "authority", server)
			cache := filepath.Join(t.TempDir(), "revocation")
			o := notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"}), CacheDir: cache}
			v := verifier(t, o)
			e := ca.Issue(t, "build", leaf).Sign(t, target("x"), "jws")
			check := func(when string, v *notary.Verifier, want error, requests int) {
				t.Helper()
				before := len(server.Requests())
				d, err := v.Verify(t.Context(), target("x"), e)
				if !errors.Is(err, want) || want == nil && err != nil {
					t.Errorf("%s: %v, want %v", when, err, want)
				}
				if want == nil && time.Until(d.Until) > time.Hour {
					t.Errorf("%s: the verdict is kept until %v, longer than the answer is good", when, d.Until)
				}
				if got := server.Requests()[before:]; requests >= 0 && len(got) != requests || slices.Contains(got, "") {
					t.Errorf("%s: asked for %v, want %d requests", when, got, requests)
				}
			}
			for _, fault := range []trusttest.Fault{trusttest.Down, trusttest.Forged, trusttest.Old} {
				server.Set(fault)
				check("fault", v, trust.ErrUnchecked, -1)
			}
			server.Set(trusttest.None)
			check("at first", v, nil, 1)
			check("again", v, nil, 0)
			server.Set(trusttest.Down)
			check("the next process, the server is down", verifier(t, o), nil, 0)

			files, err := os.ReadDir(cache)
			if err != nil || len(files) != 1 {
				t.Fatalf("kept: %v, %v", files, err)
			}
			if err := os.WriteFile(filepath.Join(cache, files[0].Name()), []byte(`{"url":`), 0o600); err != nil {
				t.Fatal(err)
			}
			server.Set(trusttest.None)
			check("a damaged file", v, nil, 1)

			memory := verifier(t, notary.Options{Dir: o.Dir})
			check("without a directory", memory, nil, 1)
			check("from memory", memory, nil, 0)
		})
	}
}

// TestRevocationServerIsDown: strict does not let pass what nobody knows, permissive does and says so; and the list counts where the responder is down.
func TestRevocationServerIsDown(t *testing.T) {
	server := trusttest.NewServer(t)
	ca := trusttest.NewCA(t, "authority", server)
	server.Set(trusttest.Down)
	e := ca.Issue(t, "build", trusttest.Leaf{}).Sign(t, target("x"), "jws")
	for level, want := range map[string]error{"strict": trust.ErrUnchecked, "permissive": nil} {
		v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all", Level: level})})
		d, err := v.Verify(t.Context(), target("x"), e)
		if !errors.Is(err, want) || want == nil && (err != nil || len(d.Warnings) != 1 || time.Until(d.Until) > time.Hour) {
			t.Errorf("%s: %+v, %v", level, d, err)
		}
	}
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all", Override: map[string]string{"revocation": "skip"}})})
	before := len(server.Requests())
	if _, err := v.Verify(t.Context(), target("x"), e); err != nil || len(server.Requests()) != before {
		t.Errorf("revocation is not to be asked: %v, asked %v", err, server.Requests()[before:])
	}
}

// TestManyAtOnce: of many images signed by one certificate, one asks.
func TestManyAtOnce(t *testing.T) {
	server := trusttest.NewServer(t)
	ca := trusttest.NewCA(t, "authority", server)
	v := verifier(t, notary.Options{Dir: trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"}), CacheDir: t.TempDir()})
	id := ca.Issue(t, "build", trusttest.Leaf{})
	failed := make(chan error, 16)
	for i := range cap(failed) {
		e := id.Sign(t, target(string(rune('a'+i))), "jws")
		go func() {
			_, err := v.Verify(t.Context(), target(string(rune('a'+i))), e)
			failed <- err
		}()
	}
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	if n := len(server.Requests()); n > 4 { // one that has its answer may not have kept it yet when another begins
		t.Errorf("%d requests of %d", n, cap(failed))
	}
}
