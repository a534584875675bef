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
	"slices"

	"github.com/containerd/platforms"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

type mountOptions struct {
	ref, dir, platform, cache, mode string
	untrusted                       bool // whatever the policy of its repository is
	out                             io.Writer
}

// mountImage mounts the artifact of o.ref at o.dir until ctx ends. The user names the image, so nothing need be listed in `stream`. If st keeps
// descriptors, the mount and its files outlive the process: it goes on with those of a predecessor, and whoever keeps them ends them.
func mountImage(ctx context.Context, c config, o mountOptions, st *fdstore.Store) (err error) {
	if o.mode != "" {
		c.MountMode = nodefs.Mode(o.mode)
		if err := c.validate(); err != nil {
			return err
		}
	}
	matcher, err := platformMatcher(o.platform)
	if err != nil {
		return err
	}
	var remove func() error
	if c.Root, remove, err = mountRoot(o.cache, st); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	lock, err := lockDir(c.Root)
	if err != nil {
		return err
	}
	defer lock.Close()
	var keep nodefs.Keeper
	if st.Keeps() {
		keep = st
	}
	g := gate{}
	if !o.untrusted {
		g.allow = c.allowByTrust
		if g.policy, err = c.policy(""); err != nil {
			return err
		}
	}
	n, err := newNode(c, g, keep, true, nil, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()

	stopAdmin, err := (&admin{n: n}).serve(c.Root, "") // for "profile record"
	if err != nil {
		return err
	}
	defer stopAdmin()
	// After newNode: it is what answers, if the directory is a predecessor's mount.
	target, err := mountPoint(o.dir, n.mounts.Mounted)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", o.dir, err)
	}
	said := ""
	if !n.mounts.Mounted(target) {
		if said, err = n.mountAt(ctx, target, o, matcher); err != nil {
			return err
		}
	}
	if err := st.Notify("READY=1"); err != nil {
		return err
	}
	fmt.Fprint(o.out, said) // from here on a supervisor runs it again
	<-ctx.Done()
	return nil
}

// mountAt mounts the image of o at target, and returns what to say of it.
func (n *node) mountAt(ctx context.Context, target string, o mountOptions, matcher platforms.MatchComparer) (said string, err error) {
	manifest, err := resolve(ctx, n.reg, o, matcher)
	if err != nil {
		return "", err
	}
	id, chainIDs, err := n.images.Find(ctx, o.ref, manifest)
	if err != nil {
		return "", fmt.Errorf("%s: %w", o.ref, err)
	}
	if err := n.images.Mount(ctx, id, len(chainIDs), target); err != nil {
		return "", err
	}
	mode, _ := n.mounts.Mode()
	return fmt.Sprintf("%s@%s is mounted at %s (%s mode, %d layers); interrupt to unmount\n", o.ref, manifest, o.dir, mode, len(chainIDs)), nil
}

// keptRoot is the name under which a temporary directory with the files of a mount is kept.
const keptRoot = "mount-root"

// mountRoot returns the directory for the files of a mount: cache, or a temporary one, which remove removes. If st keeps descriptors, that is
// its predecessor's, and remove leaves it to removeRoot.
func mountRoot(cache string, st *fdstore.Store) (root string, remove func() error, err error) {
	nothing := func() error { return nil }
	if cache != "" {
		root, err = filepath.Abs(cache)
		return root, nothing, err
	}
	if f := st.Kept(keptRoot); f != nil {
		defer f.Close()
		root, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		return root, nothing, err
	}
	if root, err = os.MkdirTemp("", "ss-mount-"); err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(root) }
	if !st.Keeps() {
		return root, remove, nil
	}
	f, err := os.Open(root)
	if err == nil {
		err = st.Keep(keptRoot, f)
		f.Close()
	}
	if err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return root, nothing, nil
}

// removeRoot removes a directory that mountRoot has left, once its command has ended for good, however that was.
func removeRoot(st *fdstore.Store) error {
	f := st.Kept(keptRoot)
	if f == nil {
		return nil
	}
	defer f.Close()
	root, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) { // of a process that was killed while it tried to mount
		unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return os.RemoveAll(root)
}

// mountPoint returns the path of the directory dir without symbolic links. On top of another mount than one of ours, whoever unmounts would
// not know what.
func mountPoint(dir string, ours func(target string) bool) (string, error) {
	path, err := filepath.Abs(dir)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", err
	}
	if ours(path) {
		return path, nil
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
