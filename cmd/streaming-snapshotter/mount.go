package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/platforms"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

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
	matcher := platforms.Default()
	if o.platform != "" {
		p, err := platforms.Parse(o.platform)
		if err != nil {
			return fmt.Errorf("--platform: %w", err)
		}
		matcher = platforms.Only(p)
	}
	target, err := mountPoint(o.dir)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", o.dir, err)
	}
	tmp, err := os.MkdirTemp("", "streaming-snapshotter-mount-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if c.Root = tmp; o.cache != "" {
		if c.Root, err = filepath.Abs(o.cache); err != nil {
			return err
		}
	}
	lock, err := lockDir(c.Root)
	if err != nil {
		return err
	}
	defer lock.Close()
	n, err := newNode(c, nil, nil, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()

	manifest, err := resolve(ctx, n.reg, o, matcher)
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
	return nil
}

// mountPoint returns the path of the directory dir without symbolic links. On top of another mount, whoever unmounts would not
// know what.
func mountPoint(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(path); err != nil || !st.IsDir() {
		return "", cmp.Or(err, error(unix.ENOTDIR))
	}
	mounted, err := mountinfo.Mounted(path)
	if err == nil && mounted {
		err = errors.New("something is mounted there already")
	}
	return path, err
}

// resolve returns the digest of the platform manifest that o names.
func resolve(ctx context.Context, reg *registryclient.Client, o mountOptions, matcher platforms.MatchComparer) (digest.Digest, error) {
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
