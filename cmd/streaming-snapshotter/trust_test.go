package main

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// pullSigned pushes image ref with an artifact that signer signs, nil does not, and pulls it through sn, which must stream it.
func pullSigned(t *testing.T, sn snapshots.Snapshotter, ref string, signer trust.Signer) {
	t.Helper()
	manifest, diffIDs := push(t, ref)
	p, r, err := converter.Open(ref, converter.OpenOptions{})
	if err == nil {
		_, err = converter.Create(t.Context(), p, r, converter.CreateOptions{Options: converter.Options{Signer: signer}})
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = sn.Prepare(t.Context(), ref, "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: diffIDs[0], snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: manifest,
	}))
	if !errdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: got %v, want ErrAlreadyExists", err)
	}
}

// wantStart tries to make a container of ref; want is part of its error, or "".
func wantStart(t *testing.T, sn snapshots.Snapshotter, ref, name, want string) {
	t.Helper()
	top := ""
	if err := sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		if info.Parent != "" && strings.Contains(info.Name, ref) && info.Kind == snapshots.KindCommitted {
			top = info.Name
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	_, err := sn.Prepare(t.Context(), ref+" "+name, top)
	if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("%s: a container of %s: got %v, want %q", name, ref, err, want)
	}
}

// TestTrustInSafeMode: what a node demands of images that it has holds in safe mode, too, where the configuration cannot be read; and what was trusted before starts with a trust policy that cannot be.
func TestTrustInSafeMode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	t.Cleanup(func() { unix.Unmount(filepath.Join(root, "devices"), unix.MNT_DETACH) })
	ca := trusttest.NewCA(t, "authority", nil)
	files := trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})
	signer := ca.Issue(t, "build", trusttest.Leaf{}).Signer(t, notary.SignOptions{})
	config := writeConfig(t, root, address)
	base, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	configure := func(more string) {
		t.Helper()
		base := string(base) + "stream = ['" + reg.Host() + "/*']\nbackground_bandwidth = '0'\nregistry_wait = '100ms'\nmount_mode = 'file'\n"
		if err := os.WriteFile(config, []byte(base+more), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := func(p *process) {
		t.Helper()
		p.signal(unix.SIGTERM)
		if err := p.wait(); err != nil {
			t.Errorf("%v\n%s", err, &p.stderr)
		}
	}
	unsigned, signed := reg.Host()+"/app", reg.Host()+"/signed"

	configure("")
	p := serving(t, config, address)
	pullSigned(t, connect(t, address), unsigned, nil)
	wantStart(t, connect(t, address), unsigned, "open", "")
	stop(p)

	strict := "trust_default = 'off'\nnotation_dir = '" + files + "'\n[[trust]]\nrepositories = ['" + signed + "']\npolicy = 'signed'\n"
	configure(strict)
	p = serving(t, config, address)
	pullSigned(t, connect(t, address), signed, signer)
	wantStart(t, connect(t, address), signed, "signed", "")
	t.Cleanup(reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))) // what is not trusted cannot be proven
	wantStart(t, connect(t, address), unsigned, "strict", trust.ErrMissing.Error())
	stop(p)

	for name, damage := range map[string]func(){
		"a key": func() { configure("strem = []\n" + strict) },
		"the trust policy": func() {
			configure(strict)
			if err := os.WriteFile(filepath.Join(files, "trustpolicy.json"), []byte("{"), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	} {
		damage()
		for range maxFailedStarts {
			if _, err := readStarts(root).begin(); err != nil {
				t.Fatal(err)
			}
		}
		p = serving(t, config, address)
		if s := askStatus(t, config, func(status) bool { return true }); s.SafeMode == "" {
			t.Errorf("%s: no safe mode", name)
		}
		wantStart(t, connect(t, address), signed, name, "")
		wantStart(t, connect(t, address), unsigned, name, trust.ErrMissing.Error())
		stop(p)
	}
}

// TestWithdrawnFromResumed: a mount that a daemon takes over from its predecessor is no way around the policy of today either.
func TestWithdrawnFromResumed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	reg := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	root, address := filepath.Join(dir, "root"), filepath.Join(dir, "s.sock")
	ca := trusttest.NewCA(t, "authority", nil)
	files := trusttest.NewDir(t, ca, trusttest.Statement{Name: "all"})
	config, ref := writeConfig(t, root, address), reg.Host()+"/app"
	addConfig(t, config, "stream = ['"+reg.Host()+"/*']\nbackground_bandwidth = '0'\nregistry_wait = '100ms'\nmount_mode = 'file'\ntrust_default = 'signed'\nnotation_dir = '"+files+"'")
	s := start(t, "supervise", "--", "serve", "--config", config)
	t.Cleanup(func() {
		s.signal(unix.SIGTERM)
		if err := s.wait(); err != nil {
			t.Errorf("%v\n%s", err, &s.stderr)
		}
	})
	askStatus(t, config, func(s status) bool { return s.Kept })
	pullSigned(t, connect(t, address), ref, ca.Issue(t, "build", trusttest.Leaf{}).Signer(t, notary.SignOptions{}))
	wantStart(t, connect(t, address), ref, "signed", "")
	pid := s.child(0)
	s.signal(unix.SIGHUP)
	s.child(pid)
	if again := askStatus(t, config, func(s status) bool { return s.Kept }); again.Mounts != 1 {
		t.Errorf("mounted at %d places", again.Mounts)
	}
	wantStart(t, connect(t, address), ref, "resumed", "")
	t.Cleanup(reg.Inject(registrytest.Any, -1, registrytest.Status(http.StatusServiceUnavailable))) // or it would be proven
	trusttest.WriteStore(t, files, "default", trusttest.NewCA(t, "new", nil).Root)
	wantStart(t, connect(t, address), ref, "withdrawn", trust.ErrUntrusted.Error())
}

// TestMountByTrust: mount keeps to the trust policy of the image's repository, unless it is told otherwise.
func TestMountByTrust(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	ref := reg.Host() + "/app:v1"
	push(t, ref)
	convert(t, ref)
	dir := t.TempDir()
	config := writeConfig(t, filepath.Join(dir, "root"), filepath.Join(dir, "s.sock"))
	addConfig(t, config, "trust_default = 'off'")
	start(t, "mount", "--config", config, ref, t.TempDir()).wantFailure("is off for " + reg.Host() + "/app")
	p := start(t, "mount", "--config", config, "--untrusted", ref, t.TempDir())
	if line, err := p.stdout.ReadString('\n'); err != nil || !strings.Contains(line, ref) {
		t.Errorf("got %q, %v", line, err)
	}
	p.signal(unix.SIGINT)
	if err := p.wait(); err != nil {
		t.Errorf("%v\n%s", err, &p.stderr)
	}
}
