// Package notary checks and makes Notary Project signatures of streaming artifacts, by the files of the `notation` command: its trust policy, trust store,
// signing keys and plugins, unchanged.
//
// The principle: notation-go decides, and this package makes its answers safe to act on. It is the only package that knows that library, and adds what a node
// needs: each failure has its class, found by types and never by texts; a statement that does not enforce authenticity is none; revocation is asked once and kept
// for as long as the answer says; files are read again when they change; plugins are those of one directory. All text of its errors is plain.
//
// It stores and fetches no signatures: trust says how they are stored, and who asks registries for other things asks for them, too.
package notary

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/notaryproject/notation-core-go/revocation/purpose"
	"github.com/notaryproject/notation-core-go/signature/cose"
	"github.com/notaryproject/notation-core-go/signature/jws"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/plugin"
	"github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	framework "github.com/notaryproject/notation-plugin-framework-go/plugin"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// Options say where the files are.
type Options struct {
	Dir       string        // as notation's NOTATION_CONFIG: trustpolicy.json, truststore/, signingkeys.json
	PluginDir string        // as notation's NOTATION_LIBEXEC/plugins; "" runs none
	CacheDir  string        // answers about revocation are kept here; "" keeps them in memory
	Timeout   time.Duration // of one check, with revocation and plugins; 0 is 10 s
	HTTP      *http.Client  // asks about revocation; nil is one of the environment's proxy. Its Timeout is not used: OCSP has 2 s, a list of revoked certificates 5 s
	Log       *slog.Logger  // nil is silent
}

// Verifier checks signatures. It is a trust.Verifier.
type Verifier struct {
	o       Options
	plugins plugin.Manager // nil: none
	answers *answers
	epochs  epochs

	// LOCK ORDER: mu before that of epochs.
	mu   sync.Mutex
	last *trusted // what the files said when they were read last
}

// trusted is what the files of one moment say.
type trusted struct {
	epoch    string
	document *trustpolicy.Document
	store    truststore.X509TrustStore
	verifier notation.Verifier
	signers  notation.Verifier // of signersAlone
	err      error             // why the others are nil
}

// NewVerifier reads the trust policy. Its error says what is wrong with it; what is wrong with it later is ErrUnchecked of Verify and Trusts, as with the verifier that is returned
// beside an error.
func NewVerifier(o Options) (*Verifier, error) {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	v := &Verifier{o: o, answers: newAnswers(o.CacheDir, o.HTTP)}
	if o.PluginDir != "" {
		v.plugins = pluginsOf(o.PluginDir)
	}
	return v, v.now().err
}

// Epoch is another one with other content of the trust policy or the trust store.
func (v *Verifier) Epoch() string { return v.epochs.of(v.o.Dir) }

// ArtifactType is that of Notary Project signatures.
func (v *Verifier) ArtifactType() string { return trust.SignatureType }

// MediaTypes are those of JWS and COSE envelopes.
func (v *Verifier) MediaTypes() []string {
	return []string{jws.MediaTypeEnvelope, cose.MediaTypeEnvelope}
}

// now is what the files say now: they are read if they have changed.
func (v *Verifier) now() *trusted {
	v.mu.Lock()
	defer v.mu.Unlock()
	epoch := v.Epoch()
	if v.last != nil && v.last.epoch == epoch {
		return v.last
	}
	t := &trusted{epoch: epoch}
	if err := t.read(v); err != nil {
		*t = trusted{epoch: epoch, err: err}
	}
	if v.last != nil {
		v.o.Log.Info("trust policy read again", "dir", v.o.Dir, "error", t.err)
	}
	v.last = t
	return t
}

func (t *trusted) read(v *Verifier) (err error) {
	if t.document, err = readPolicy(v.o.Dir); err != nil {
		return err
	}
	t.store = truststore.NewX509TrustStore(dir.NewSysFS(v.o.Dir))
	code, err := v.answers.validator(purpose.CodeSigning)
	if err != nil {
		return err
	}
	stamping, err := v.answers.validator(purpose.Timestamping)
	if err != nil {
		return err
	}
	t.verifier, err = verifier.NewWithOptions(t.document, t.store, v.plugins, verifier.VerifierOptions{
		RevocationCodeSigningValidator: code, RevocationTimestampingValidator: stamping,
	})
	if err != nil {
		return err
	}
	t.signers, err = verifier.NewWithOptions(signersAlone(t.document), t.store, v.plugins, verifier.VerifierOptions{
		RevocationCodeSigningValidator: code, RevocationTimestampingValidator: stamping, // neither is asked
	})
	return err
}

// Check returns what is wrong with the statements of the trust policy that may apply to a repository for which applies is true: those that do not enforce
// authenticity, and those whose trust stores cannot be read or are empty.
func (v *Verifier) Check(applies func(repository string) bool) (problems []error) {
	t := v.now()
	if t.err != nil {
		return []error{t.err}
	}
	for i := range t.document.TrustPolicies {
		s := &t.document.TrustPolicies[i]
		if !mayApply(s, applies) {
			continue
		}
		problems = append(problems, enforces(s))
		for _, name := range s.TrustStores {
			problems = append(problems, t.checkStore(s, name))
		}
	}
	return notNil(problems)
}

func notNil(all []error) (some []error) {
	for _, err := range all {
		if err != nil {
			some = append(some, err)
		}
	}
	return some
}

// plugins are those of one directory. The name of a plugin comes out of envelopes, before anybody has checked them, and notation-go makes a path of it.
type plugins struct {
	dir string
	*plugin.CLIManager
}

func pluginsOf(directory string) plugins {
	return plugins{directory, plugin.NewCLIManager(dir.NewSysFS(directory))}
}

// Get is called by notation-go.
func (p plugins) Get(ctx context.Context, name string) (framework.Plugin, error) {
	if name == "." || !filepath.IsLocal(name) || filepath.Base(name) != name {
		return nil, fmt.Errorf("plugin %q: %w", name, errors.ErrUnsupported)
	}
	if _, err := os.Lstat(filepath.Join(p.dir, name)); err != nil {
		return nil, err
	}
	return p.CLIManager.Get(ctx, name)
}
