package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/moby/sys/mountinfo"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
)

// removal is what there is to do.
type removal struct {
	files   []file // as they were
	kept    []string
	restart []string
	name    string // of the snapshotter; "" if containerd's configuration does not have it any more
	before  string // the snapshotter that CRI pulls with then
	images  []unpacked
	using   []string // containers that have their files from the snapshotter
	retire  plan     // has nothing new use the snapshotter, while they do
}

// Uninstall takes away what Install has put there. On an error all files are as they were before.
func Uninstall(ctx context.Context, o Options) error {
	in, unlock, err := begin(ctx, o)
	if err != nil {
		return err
	}
	defer unlock()
	if !in.s.installed() && o.Retire {
		fmt.Fprintln(o.Out, "nothing is installed")
		return nil
	}
	if !in.s.installed() {
		return fmt.Errorf("`streaming-snapshotter install` has put nothing on this host: %s has no record", Dir)
	}
	cl, err := client.New(o.Socket)
	if err != nil {
		return err
	}
	defer cl.Close()
	r, err := in.planRemoval(ctx, cl)
	if err != nil {
		return err
	}
	if err := in.announceRemoval(r); err != nil || o.DryRun {
		return err
	}
	if err := in.keepImages(ctx, cl, r); err != nil {
		return err
	}
	if len(r.using) > 0 {
		return in.retire(ctx, r)
	}
	return in.remove(ctx, cl, r)
}

// retire has nothing new use the snapshotter, and says what is in the way of the rest.
func (in *installer) retire(ctx context.Context, r removal) error {
	if len(r.retire.files) > 0 {
		if err := in.carryOut(ctx, r.retire); err != nil {
			return err
		}
	}
	return fmt.Errorf("nothing new uses the snapshotter %s; run it again when these containers, which have their files from it, are gone:\n  %s", r.name, strings.Join(r.using, "\n  "))
}

func (in *installer) planRemoval(ctx context.Context, cl *client.Client) (r removal, err error) {
	if in.c, err = in.o.Containerd(); err != nil {
		return r, err
	}
	if err := in.filesBefore(&r); err != nil {
		return r, err
	}
	dump, err := in.dump(ctx, nil)
	if err != nil {
		return r, err
	}
	found := traps.Find(dump, traps.Want{Address: in.o.Address, Root: in.o.Root})
	r.name = found.Snapshotter
	before, err := in.dump(ctx, r.files)
	if err != nil {
		return r, fmt.Errorf("containerd cannot read its configuration as it was before the install: %w", err)
	}
	if r.before, err = snapshotterOf(before); err != nil || r.name == "" {
		return r, err
	}
	r.restart = in.svc.restartContainerd(in.c.Unit)
	if r.using, err = users(ctx, cl, r.name); err != nil {
		return r, err
	}
	byRuntime := slices.ContainsFunc(found.Uses, func(u string) bool { return u != "cri" }) // its pods could not be started otherwise
	if len(r.using) > 0 && (!in.o.Retire || byRuntime) {
		return r, fmt.Errorf("nothing was changed: drain the node first, these containers have their files from the snapshotter %s:\n  %s", r.name, strings.Join(r.using, "\n  "))
	}
	if len(r.using) > 0 {
		r.retire.name = r.name
		in.use = use{retired: r.before}
		if r.retire.files, _, err = in.containerdFiles(ctx); err != nil {
			return r, err
		}
		if len(r.retire.files) > 0 {
			r.retire.restart = r.restart
		}
	}
	r.images, err = imagesOf(ctx, cl, r.name, r.before)
	return r, err
}

// filesBefore finds what to put back. What others have changed since is not overwritten, unless they say so.
func (in *installer) filesBefore(r *removal) error {
	var changed []string
	for _, was := range in.s.Before {
		is, err := readFile(was.Path)
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(in.s.Installed, func(f file) bool { return f.Path == was.Path }); i >= 0 && !is.same(in.s.Installed[i]) && !is.same(was) {
			if was.Path == in.o.ConfigFile {
				r.kept = append(r.kept, was.Path)
				continue
			}
			changed = append(changed, was.Path)
		}
		if was, err = in.s.load(was); err != nil {
			return err
		}
		r.files = append(r.files, was)
	}
	if len(changed) > 0 && !in.o.DiscardChanges {
		return fmt.Errorf("nothing was changed: %s: changed since the install; take the change back, or give --discard-changes", strings.Join(changed, ", "))
	}
	return nil
}

// snapshotterOf returns the one that CRI pulls with.
func snapshotterOf(dump []byte) (string, error) {
	type has struct {
		Snapshotter string `toml:"snapshotter"`
	}
	var c struct {
		Plugins struct {
			Images has `toml:"io.containerd.cri.v1.images"`
			CRI    struct {
				Containerd has `toml:"containerd"`
			} `toml:"io.containerd.grpc.v1.cri"`
		} `toml:"plugins"`
	}
	err := toml.Unmarshal(dump, &c)
	for _, name := range []string{c.Plugins.Images.Snapshotter, c.Plugins.CRI.Containerd.Snapshotter} {
		if name != "" {
			return name, err
		}
	}
	return "overlayfs", err
}

func (in *installer) announceRemoval(r removal) error {
	for _, u := range r.images {
		fmt.Fprintf(in.o.Out, "unpack %s for %s, and fetch what of it is not on the node\n", u, r.before)
	}
	if len(r.using) > 0 {
		return in.announce(r.retire)
	}
	for _, f := range r.files {
		is, err := readFile(f.Path)
		if err != nil {
			return err
		}
		if !is.same(f) {
			printChange(in.o.Out, is, f)
		}
	}
	for _, path := range r.kept {
		fmt.Fprintf(in.o.Out, "leave %s, which was changed since the install\n", path)
	}
	if r.restart != nil {
		fmt.Fprintf(in.o.Out, "run %s\n", strings.Join(r.restart, " "))
	}
	if in.madeRoot() {
		fmt.Fprintf(in.o.Out, "stop the daemon, and remove %s\n", in.o.Root)
	} else {
		fmt.Fprintf(in.o.Out, "stop the daemon, and leave %s, which was there before the install\n", in.o.Root)
	}
	return nil
}

// keepImages leaves every image such that it runs without the snapshotter.
func (in *installer) keepImages(ctx context.Context, cl *client.Client, r removal) error {
	var lost []error
	for _, u := range r.images {
		if err := in.unpack(ctx, cl, u, r.before); err != nil {
			lost = append(lost, fmt.Errorf("%s: %w", u, err))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if len(lost) == 0 {
		return nil
	}
	if in.o.DropImages {
		fmt.Fprintf(in.o.Out, "these images have to be pulled again: %v\n", errors.Join(lost...))
		return nil
	}
	return fmt.Errorf("nothing was changed: these images would not run any more (--drop-images goes on all the same):\n%w", errors.Join(lost...))
}

func (in *installer) remove(ctx context.Context, cl *client.Client, r removal) (err error) {
	if err := in.s.begin(r.files, change{Running: in.svc.running(), Restart: r.restart}); err != nil {
		return err
	}
	restarted := false
	defer func() {
		if err != nil {
			err = in.failed(ctx, err, restarted)
		}
	}()
	if r.name != "" {
		if err := removeSnapshots(ctx, cl, r.name); err != nil {
			return err
		}
	}
	if err := apply(ctx, r.files); err != nil {
		return err
	}
	if r.restart != nil {
		restarted = true
		if err := in.restartContainerd(ctx, r.restart, ""); err != nil {
			return err
		}
	}
	if err := errors.Join(in.svc.stop(ctx), in.svc.reload(ctx)); err != nil {
		return err
	}
	dirs, made := in.s.Dirs, in.madeRoot()
	if err := os.RemoveAll(Dir); err != nil {
		return err
	}
	if err := errors.Join(removeDirs(dirs), clearRoot(in.o.Root, made), os.RemoveAll(runDir)); err != nil {
		fmt.Fprintf(in.o.Out, "uninstalled, but for this: %v\n", err)
		return nil
	}
	fmt.Fprintln(in.o.Out, "uninstalled")
	return nil
}

// madeRoot reports whether there was no directory of the snapshotter before the first install.
func (in *installer) madeRoot() bool { return in.s.Root == in.o.Root }

// clearRoot unmounts what is mounted in the snapshotter's directory, and removes that with all that is in it if an install has made it.
func clearRoot(root string, made bool) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == root && !made {
			continue // a disk for it
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
	}
	if !made {
		return nil
	}
	return os.RemoveAll(root)
}
