package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
)

// notationFlags say where notation's files are.
type notationFlags struct{ dir, plugins string }

func (f *notationFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dir, "notation-dir", "", "directory of `notation`'s files (default: $NOTATION_CONFIG, or notation in the user's configuration)")
	cmd.Flags().StringVar(&f.plugins, "notation-plugin-dir", "", "directory of its plugins (default: plugins in $NOTATION_LIBEXEC, or in the directory above)")
}

// dirs are the directories, with notation's own defaults.
func (f *notationFlags) dirs() (dir, plugins string, err error) {
	if dir = f.dir; dir == "" {
		dir = os.Getenv("NOTATION_CONFIG")
	}
	if dir == "" {
		if dir, err = os.UserConfigDir(); err != nil {
			return "", "", fmt.Errorf("--notation-dir: %w", err)
		}
		dir = filepath.Join(dir, "notation")
	}
	if plugins = f.plugins; plugins == "" {
		libexec := os.Getenv("NOTATION_LIBEXEC")
		if libexec == "" {
			libexec = dir
		}
		plugins = filepath.Join(libexec, "plugins")
	}
	return dir, plugins, nil
}

// signFlags say what to sign with.
type signFlags struct {
	notationFlags
	name string // of the flag for key
	o    notary.SignOptions
}

func (f *signFlags) add(cmd *cobra.Command, name, help string) {
	f.name = name
	f.notationFlags.add(cmd)
	cmd.Flags().StringVar(&f.o.Key, name, "", help)
	cmd.Flags().StringVar(&f.o.KeyFile, "sign-key", "", "PEM file of a key, instead of a name")
	cmd.Flags().StringVar(&f.o.CertFile, "sign-cert", "", "PEM file of its certificate and of those above, up to a root")
	cmd.Flags().StringVar(&f.o.Format, "signature-format", "jws", "jws or cose")
	cmd.Flags().DurationVar(&f.o.Expiry, "sign-expiry", 0, "how long the signature is good; 0 is as long as the certificate")
	cmd.Flags().StringVar(&f.o.TimestampURL, "timestamp-url", "", "RFC 3161 authority that says when it was signed: then it outlives its certificate")
	cmd.Flags().StringVar(&f.o.TimestampRoot, "timestamp-root-cert", "", "PEM file of the authority's root certificate")
}

// names are the flags, for what cannot be combined with them.
func (f *signFlags) names() []string {
	return []string{f.name, "sign-key", "sign-cert", "signature-format", "sign-expiry", "timestamp-url", "timestamp-root-cert", "notation-dir", "notation-plugin-dir"}
}

// signer is nil if nothing is to be signed: unless a key is named, or must is set, which means the list's default.
func (f *signFlags) signer(cmd *cobra.Command, must bool) (trust.Signer, error) {
	if !must && !cmd.Flags().Changed(f.name) && f.o.KeyFile == "" {
		for _, name := range f.names() {
			if cmd.Flags().Changed(name) {
				return nil, usage("%s: --%s is of a signature: say with which key, --%s or --sign-key", cmd.Name(), name, f.name)
			}
		}
		return nil, nil
	}
	var err error
	if f.o.Dir, f.o.PluginDir, err = f.dirs(); err != nil {
		return nil, err
	}
	f.o.Agent = "streamctl/" + version()
	s, err := notary.NewSigner(cmd.Context(), f.o)
	if err != nil {
		return nil, err // no *Signer that is nil in an interface that is not
	}
	return s, nil
}

func newSign() *cobra.Command {
	var (
		image  imageFlags
		key    signFlags
		output outputFlag
		adopt  bool
	)
	cmd := &cobra.Command{
		Use:   "sign REF",
		Short: "Sign the streaming artifacts of an image",
		Long: `Sign the streaming artifacts of an image, as the notation command signs: with a key of its list, of a file, or of a plugin.

What has a signature by the same certificate that is good for a while yet is left alone. The image itself is not signed.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if adopt {
				for _, name := range key.names() {
					if cmd.Flags().Changed(name) {
						return usage("sign --adopt signs nothing: --%s is of a signature", name)
					}
				}
				return adoptSignatures(cmd, args, &image)
			}
			signer, err := key.signer(cmd, true)
			if err != nil {
				return err
			}
			p, ref, platforms, err := image.open(cmd, args)
			if err != nil {
				return err
			}
			done, err := converter.Sign(cmd.Context(), p, ref, platforms, signer)
			if output.json() && (err == nil || len(done) > 0) {
				return errors.Join(err, writeJSON(cmd.OutOrStdout(), map[string]any{"signed": done}))
			}
			for _, s := range done {
				warn(cmd, s.Warnings)
				printSigned(cmd.OutOrStdout(), s)
			}
			return err
		},
	}
	image.add(cmd)
	output.add(cmd)
	key.add(cmd, "key", "name of a key in notation's signingkeys.json (default: its default)")
	cmd.Flags().BoolVar(&adopt, "adopt", false, "sign nothing: have the profiles of the image say where the newest signature is, whoever made it, so that nodes need not ask")
	return cmd
}

func adoptSignatures(cmd *cobra.Command, args []string, image *imageFlags) error {
	p, ref, platforms, err := image.open(cmd, args)
	if err != nil {
		return err
	}
	warnings, err := converter.Adopt(cmd.Context(), p, ref, platforms)
	warn(cmd, warnings)
	return err
}

func warn(cmd *cobra.Command, warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "streamctl: warning: %s\n", w)
	}
}

func printSigned(w io.Writer, s converter.Signed) {
	verb := "signed by"
	if s.Status == converter.StatusExists {
		verb = "was signed before by"
	}
	fmt.Fprintf(w, "%s %s: %s %s\n", s.Platform, s.Artifact, verb, s.Signature)
}

// judgeFlags say whose signatures count.
type judgeFlags struct {
	notationFlags
	signed bool
	scope  string
}

func (f *judgeFlags) add(cmd *cobra.Command) {
	f.notationFlags.add(cmd)
	cmd.Flags().BoolVar(&f.signed, "signed", false, "each artifact must have a signature that notation's trust policy accepts")
	cmd.Flags().StringVar(&f.scope, "scope", "", "repository whose statement of the trust policy counts (default: that of the image; an OCI layout has none)")
}

// judge checks signatures if that is asked for, and says what they say of themselves otherwise.
func (f *judgeFlags) judge(p converter.Place) (converter.Judge, error) {
	if !f.signed {
		return describeSignature, nil
	}
	dir, plugins, err := f.dirs()
	if err != nil {
		return nil, err
	}
	cache, err := os.UserCacheDir()
	if err == nil {
		cache = filepath.Join(cache, "streamctl", "revocation")
	}
	v, err := notary.NewVerifier(notary.Options{Dir: dir, PluginDir: plugins, CacheDir: cache})
	if err != nil {
		return nil, err
	}
	scope := f.scope
	if scope == "" {
		scope = scopeOf(p)
	}
	return func(ctx context.Context, t trust.Target, e trust.Envelope) (trust.Verdict, error) {
		t.Repository = scope
		return v.Verify(ctx, t, e)
	}, nil
}

// scopeOf is a place as trust policies name repositories: Docker Hub is docker.io there.
func scopeOf(p converter.Place) string {
	if rest, ok := strings.CutPrefix(p.String(), "index.docker.io/"); ok {
		return "docker.io/" + rest
	}
	return p.String()
}

func describeSignature(_ context.Context, _ trust.Target, e trust.Envelope) (trust.Verdict, error) {
	return notary.Describe(e)
}

// printSignature prints a signature in one line; checked says that a trust policy was asked.
func printSignature(s converter.Signature, checked bool) string {
	switch {
	case s.Error != "":
		return fmt.Sprintf("%s: %s", short(s.Digest), s.Error)
	case !checked:
		return fmt.Sprintf("%s: by %q%s, not checked", short(s.Digest), s.Identity, until(s.Expires))
	}
	return fmt.Sprintf("%s: by %q, whom the trust policy trusts%s", short(s.Digest), s.Identity, until(s.Expires))
}

func until(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return ", until " + t.Format(time.RFC3339)
}
