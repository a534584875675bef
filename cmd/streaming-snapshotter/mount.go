package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

type mountOptions struct {
	ref, dir, platform, cache, mode string
	out                             io.Writer
}

// mountImage mounts the artifact of o.ref at o.dir until ctx ends. The user names the image, so nothing need be listed in `stream`.
func mountImage(ctx context.Context, c config, o mountOptions) (err error) {
	if o.mode != "" {
		c.MountMode = nodefs.Mode(o.mode)
		if err := c.validate(); err != nil {
			return err
		}
	}
	st, err := os.Stat(o.dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("mount %s: not a directory", o.dir)
	}
	target, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "streaming-snapshotter-mount-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	c.State = tmp
	if c.Root = filepath.Join(tmp, "root"); o.cache != "" {
		if c.Root, err = filepath.Abs(o.cache); err != nil {
			return err
		}
	}
	unlock, err := lockRoot(c.Root)
	if err != nil {
		return err
	}
	defer unlock()
	n, err := newNode(c, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()

	manifest, err := resolve(ctx, c, o)
	if err != nil {
		return err
	}
	id, chainIDs, err := n.images.Find(ctx, o.ref, manifest)
	if err != nil {
		return fmt.Errorf("%s: %w", o.ref, err)
	}
	if err := n.images.Mount(ctx, id, len(chainIDs), target); err != nil {
		return err
	}
	mode, _ := n.mounts.Mode()
	fmt.Fprintf(o.out, "%s@%s is mounted at %s (%s mode, %d layers); interrupt to unmount\n", o.ref, manifest, o.dir, mode, len(chainIDs))
	<-ctx.Done()
	return n.images.Unmount(target)
}

// resolve returns the digest of the platform manifest that o names.
func resolve(ctx context.Context, c config, o mountOptions) (digest.Digest, error) {
	reg, err := registryclient.New(registryclient.Options{HostsDir: c.HostsDir, Credentials: registryclient.DockerCredentials()})
	if err != nil {
		return "", err
	}
	desc, b, err := reg.Resolve(ctx, o.ref)
	if err != nil {
		return "", err
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return "", fmt.Errorf("%s: %w", o.ref, err)
	}
	if len(index.Manifests) == 0 {
		return desc.Digest, nil
	}
	matcher := platforms.Default()
	if o.platform != "" {
		p, err := platforms.Parse(o.platform)
		if err != nil {
			return "", err
		}
		matcher = platforms.Only(p)
	}
	var best *ocispec.Descriptor
	for i, m := range index.Manifests {
		if m.Platform != nil && matcher.Match(*m.Platform) && (best == nil || matcher.Less(*m.Platform, *best.Platform)) {
			best = &index.Manifests[i]
		}
	}
	if best == nil {
		return "", fmt.Errorf("%s: its index has no image for %s (`--platform` takes another)", o.ref, platformName(o.platform))
	}
	return best.Digest, nil
}

func platformName(p string) string {
	if p == "" {
		return platforms.DefaultString()
	}
	return p
}
