package serve

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
)

// signing says what artifacts are signed with; nothing in it is not at all.
type signing struct {
	Key           string            `toml:"key" comment:"Name of a key in notation's signingkeys.json, in notation_dir; or"`
	KeyFile       string            `toml:"key_file" comment:"PEM file of a key that others than its owner and group cannot read, with cert_file. Nothing of both: artifacts are not signed."`
	CertFile      string            `toml:"cert_file" comment:"PEM file of the certificate of key_file, and of those above up to a root."`
	Format        string            `toml:"format" comment:"jws or cose."`
	Expiry        tomlfile.Duration `toml:"expiry" comment:"How long a signature is good; 0 is as long as the certificate."`
	NotationDir   string            `toml:"notation_dir" comment:"Directory with signingkeys.json."`
	PluginDir     string            `toml:"plugin_dir" comment:"Directory of notation's plugins, for keys that are not in files; empty runs none."`
	TimestampURL  string            `toml:"timestamp_url" comment:"RFC 3161 authority that says when it was signed; empty for none."`
	TimestampRoot string            `toml:"timestamp_root_cert" comment:"PEM file of the authority's root certificate."`
	Required      bool              `toml:"required" comment:"Whether a conversion fails whose artifact cannot be signed. Otherwise that is a warning."`
}

func (s signing) validate() error {
	switch {
	case s.Format != "jws" && s.Format != "cose":
		return fmt.Errorf("signing.format = %q: want jws or cose", s.Format)
	case s.Expiry.D < 0:
		return fmt.Errorf("signing.expiry = %q: want 0 or more", s.Expiry.D)
	case (s.KeyFile == "") != (s.CertFile == ""):
		return errors.New("signing: key_file and cert_file go together")
	case s.Key != "" && s.KeyFile != "":
		return errors.New("signing: key or key_file, not both")
	case s.Key != "" && s.NotationDir == "":
		return errors.New("signing: key is a name in notation_dir, which is empty")
	}
	for key, path := range map[string]string{"key_file": s.KeyFile, "cert_file": s.CertFile, "notation_dir": s.NotationDir, "plugin_dir": s.PluginDir, "timestamp_root_cert": s.TimestampRoot} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("signing.%s = %q: want an absolute path", key, path)
		}
	}
	return nil
}

// signer is nil if nothing is signed. That the key is there, or that its plugin answers, is known when it returns.
func (s signing) signer(ctx context.Context, version string) (trust.Signer, error) {
	if s.Key == "" && s.KeyFile == "" {
		return nil, nil
	}
	signer, err := notary.NewSigner(ctx, notary.SignOptions{
		Dir: s.NotationDir, PluginDir: s.PluginDir, Key: s.Key, KeyFile: s.KeyFile, CertFile: s.CertFile, Format: s.Format, Expiry: s.Expiry.D,
		TimestampURL: s.TimestampURL, TimestampRoot: s.TimestampRoot, Agent: "streamctl/" + version,
	})
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return signer, nil
}
