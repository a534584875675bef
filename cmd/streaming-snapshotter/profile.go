package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// profilesSocket is the path of the third socket: who writes the digest of an image's platform manifest and a newline to it gets a profileAnswer.
func profilesSocket(root string) string { return filepath.Join(root, "profiles.sock") }

// profileAnswer is what the daemon has recorded of an image's first start, or why not.
type profileAnswer struct {
	Profile json.RawMessage `json:"profile,omitempty"` // in the profile's JSON form
	Error   string          `json:"error,omitempty"`
}

// serveProfiles answers until stop, which waits for the end.
func (n *node) serveProfiles(root string) (stop func(), err error) {
	return serveSocket(profilesSocket(root), func(conn net.Conn) {
		line, err := bufio.NewReader(io.LimitReader(conn, 256)).ReadString('\n')
		if err != nil {
			return
		}
		var a profileAnswer
		if n.images == nil {
			err = errors.New("the daemon is in safe mode")
		} else if p, perr := n.images.FirstUses(digest.Digest(line[:len(line)-1])); perr != nil {
			err = perr
		} else {
			a.Profile, err = json.Marshal(p)
		}
		if err != nil {
			a.Error = err.Error()
		}
		json.NewEncoder(conn).Encode(a) // who has gone does not want it
	})
}

func newProfileCommand(configFile *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "What containers of an image read at their start",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var platform string
	export := &cobra.Command{
		Use:   "export REF",
		Short: "Print the record of the image's first start on this node, for `streamctl profile push`",
		Long: `Print what the daemon has recorded of the image's first start on this node: the chunks that were read, in the order of first use, as JSON.
While the start goes on, it is what was read until now. "streamctl profile push" makes a profile of one or more such records and attaches it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			b, err := exportProfile(cmd.Context(), c, args[0], platform)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
			return err
		},
	}
	export.Flags().StringVar(&platform, "platform", "", "os/arch[/variant] of an index (default: this machine's)")
	cmd.AddCommand(export, newRecordCommand(configFile))
	return cmd
}

// exportProfile returns the record that the daemon has of the image ref. A reference by a platform manifest's digest asks no registry.
func exportProfile(ctx context.Context, c config, ref, platform string) ([]byte, error) {
	_, _, dgst, err := registryclient.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	var known error
	if dgst != "" {
		var b []byte
		if b, known = askProfile(c.Root, dgst); known == nil {
			return b, nil
		}
	}
	manifest, err := manifestOf(ctx, c, ref, platform)
	if err != nil {
		return nil, cmp.Or(known, err)
	}
	if manifest == dgst {
		return nil, known
	}
	return askProfile(c.Root, manifest)
}

// manifestOf asks the registry for the digest of the platform manifest that ref names.
func manifestOf(ctx context.Context, c config, ref, platform string) (digest.Digest, error) {
	matcher, err := platformMatcher(platform)
	if err != nil {
		return "", err
	}
	reg, err := newRegistry(c)
	if err != nil {
		return "", err
	}
	defer reg.Close()
	return resolve(ctx, reg, mountOptions{ref: ref, platform: platform}, matcher)
}

// newRegistry returns a client for what a command asks of registries itself.
func newRegistry(c config) (*registryclient.Client, error) {
	return registryclient.New(registryclient.Options{
		HostsDir: c.HostsDir, Credentials: credentials.Chain(newSources(c, nil)...), UserAgent: "streaming-snapshotter/" + version(),
	})
}

// platformMatcher matches a platform, this machine's if there is none given.
func platformMatcher(platform string) (platforms.MatchComparer, error) {
	if platform == "" {
		return platforms.Default(), nil
	}
	p, err := platforms.Parse(platform)
	if err != nil {
		return nil, fmt.Errorf("--platform: %w", err)
	}
	return platforms.Only(p), nil
}

// askProfile asks the process whose files are in root for the record of an image.
func askProfile(root string, manifest digest.Digest) ([]byte, error) {
	conn, err := dialDaemon(profilesSocket(root))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	var a profileAnswer
	if _, err = fmt.Fprintf(conn, "%s\n", manifest); err == nil {
		err = json.NewDecoder(conn).Decode(&a)
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", profilesSocket(root), err)
	}
	if a.Error != "" {
		return nil, errors.New(a.Error)
	}
	return a.Profile, nil
}

func dialDaemon(socket string) (net.Conn, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("no daemon answers: %w", err)
	}
	return conn, nil
}
