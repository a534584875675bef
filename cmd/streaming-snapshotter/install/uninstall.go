package install

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	merged  []string // of files: as others have made them, without what install has written
	restart []string
	name    string // of the snapshotter; "" if containerd does not have it any more
	before  string // the snapshotter that CRI pulls with then
	images  []unpacked
	idle    map[string]bool // snapshots that a container could have, and none has
	using   []string        // containers that have their files from the snapshotter
	retire  plan            // has nothing new use the snapshotter, while they do, and while it is removed
}

// Uninstall takes away what Install has put there. On an error all files are as they were before.
func Uninstall(ctx context.Context, options func() (Options, error)) error {
	in, unlock, err := begin(ctx, options)
	if err != nil {
		return err
	}
	defer unlock()
	o := in.o
	if !in.s.installed() && (o.Retire || in.cleaned) {
		fmt.Fprintln(o.Out, "nothing is installed")
		return nil
	}
	if !in.s.installed() {
		return fmt.Errorf("`streaming-snapshotter install` has put nothing on this host: %s has no record", Dir)
	}
	in.o.Root, in.o.Address = in.s.Root, in.s.Address // whatever the configuration says by now
	if by := kubeletsAt(in.ours); len(by) > 0 {
		return fmt.Errorf("nothing was changed: take that out and restart it first, because without the daemon it pulls nothing, and does not start any more:\n  %s", strings.Join(by, "\n  "))
	}
	in.o.CRIProxy = cmp.Or(in.s.CRIProxy, in.o.CRIProxy)
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
	if err := in.keepImages(ctx, cl, r.images, r.before); err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	if len(r.using) > 0 {
		return in.retire(ctx, cl, r)
	}
	if err := in.remove(ctx, cl, r); err != nil {
		return err
	}
	return in.cleanUp()
}

// retire has nothing new use the snapshotter, and says what is in the way of the rest.
func (in *installer) retire(ctx context.Context, cl *client.Client, r removal) error {
	if len(r.retire.files) > 0 {
		if err := in.carryOut(ctx, r.retire); err != nil {
			return err
		}
	}
	if err := in.keepLate(ctx, cl, r); err != nil {
		return err
	}
	return fmt.Errorf("nothing new uses the snapshotter %s; run it again when these containers, which have their files from it, are gone:\n  %s", r.name, strings.Join(r.using, "\n  "))
}

// keepLate is keepImages for images that were pulled while it was under way, the first time.
func (in *installer) keepLate(ctx context.Context, cl *client.Client, r removal) error {
	if err := cl.Reconnect(); err != nil { // containerd was restarted
		return err
	}
	images, err := imagesOf(ctx, cl, r.name, r.before)
	if err != nil {
		return err
	}
	return in.keepImages(ctx, cl, images, r.before)
}

func (in *installer) planRemoval(ctx context.Context, cl *client.Client) (r removal, err error) {
	if in.c, err = in.o.Containerd(); err != nil {
		return r, err
	}
	dump, err := in.dump(ctx, nil)
	if err != nil {
		return r, err
	}
	found := traps.Find(dump, traps.Want{Address: in.o.Address, Root: in.o.Root})
	loaded, err := in.o.Loaded(ctx)
	if err != nil {
		return r, err
	}
	if r.name = found.Snapshotter; r.name == "" && slices.Contains(loaded, Name) {
		r.name = Name // its file was put back by others, and it was not restarted since
	}
	before, err := in.filesBefore(ctx, &r, dump, found)
	if err != nil {
		return r, err
	}
	if r.before, err = snapshotterOf(before); err != nil {
		return r, err
	}
	if r.name != "" {
		r.restart = in.svc.restartContainerd(in.c.Unit)
		if r.idle, err = active(ctx, cl, r.name); err != nil {
			return r, err
		}
	}
	if r.using, err = users(ctx, cl, cmp.Or(r.name, Name)); err != nil {
		return r, err
	}
	byRuntime := slices.ContainsFunc(found.Uses, func(u string) bool { return u != "cri" }) // its pods could not be started otherwise
	if len(r.using) > 0 && (!in.o.Retire || byRuntime || r.name == "") {
		first := "drain the node first"
		if r.name == "" {
			first = "containerd does not know the snapshotter any more, without which it cannot remove containers: install again, and drain the node then"
		}
		return r, fmt.Errorf("nothing was changed: %s, these containers have their files from the snapshotter %s:\n  %s", first, cmp.Or(r.name, Name), strings.Join(r.using, "\n  "))
	}
	if r.name == "" { // what containerd has of the snapshotter are images without layers
		if r.images, err = imagesOf(ctx, cl, "", loaded...); err == nil {
			r.images, err = lacking(ctx, cl, r.images)
		}
		return r, err
	}
	if !byRuntime {
		r.retire = plan{name: r.name}
		in.use = use{retired: r.before}
		r.retire.files, _, err = in.containerdFiles(ctx)
		if err != nil && (len(r.using) > 0 || ctx.Err() != nil) {
			return r, err
		}
		if len(r.retire.files) > 0 {
			r.retire.theirs, r.retire.restart = len(r.retire.files), r.restart
		}
	}
	r.images, err = imagesOf(ctx, cl, r.name, r.before)
	return r, err
}

// filesBefore finds what to put back, and returns what containerd's configuration comes to then. What others have changed since is not overwritten, unless they say so; of containerd's
// main file, where they may have written anything, what install has written there is taken out, if that changes nothing else.
func (in *installer) filesBefore(ctx context.Context, r *removal, now []byte, found traps.Found) ([]byte, error) {
	var changed []string
	for _, was := range in.s.Before {
		is, err := readFile(was.Path)
		if err != nil {
			return nil, err
		}
		if was, err = in.s.load(was); err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(in.s.Installed, func(f file) bool { return f.Path == was.Path }); i >= 0 && !is.same(in.s.Installed[i]) && !is.same(was) {
			if was.Path == in.o.ConfigFile {
				r.kept = append(r.kept, was.Path)
				continue
			}
			if merged, ok := in.withoutOurs(was, in.s.Installed[i], is); ok {
				r.files, r.merged = append(r.files, merged), append(r.merged, was.Path)
				continue
			}
			changed = append(changed, was.Path)
		}
		r.files = append(r.files, was)
	}
	if len(changed) > 0 && !in.o.DiscardChanges {
		return nil, changedSince(changed, "take the change back")
	}
	before, err := in.dump(ctx, r.files)
	if err != nil && len(r.merged) == 0 {
		return nil, fmt.Errorf("containerd cannot read its configuration as it was before the install: %w", err)
	}
	if err == nil && len(r.merged) > 0 {
		err = onlyOurs(now, before, found)
	}
	if err != nil {
		return nil, changedSince(r.merged, fmt.Sprintf("what install has written there cannot be taken out by itself (%v): take the change back", err))
	}
	return before, nil
}

func changedSince(paths []string, what string) error {
	return fmt.Errorf("nothing was changed: %s: changed since the install; %s, or give --discard-changes", strings.Join(paths, ", "), what)
}

// withoutOurs is containerd's main file as others have made it, without what install has written there.
func (in *installer) withoutOurs(was, installed, is file) (file, bool) {
	if was.Path != in.c.Config || in.o.DiscardChanges || was.Digest == "" || is.Digest == "" {
		return is, false
	}
	ours, err := in.s.load(installed)
	if err != nil { // an older release has kept none
		return is, false
	}
	text, ok := takeBack(was.data, ours.data, is.data)
	merged := regular(is.Path, is.Mode, text)
	merged.UID, merged.GID, merged.Time, merged.Xattrs = is.UID, is.GID, is.Time, is.Xattrs
	return merged, ok
}

// onlyOurs is an error that says what differs in two of containerd's configurations beside what is said of the snapshotter.
func onlyOurs(now, before []byte, found traps.Found) error {
	var u use
	for _, name := range found.Uses {
		if handler, ok := strings.CutPrefix(name, "runtime "); ok {
			u.runtime = handler
		}
	}
	lost, err := otherChanges(before, now, u) // tables that are there on the later side only are looked into
	if err == nil && len(lost) > 0 {
		err = fmt.Errorf("that would change %s, too", strings.Join(lost, ", "))
	}
	return err
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
	if len(r.retire.files) > 0 {
		fmt.Fprintf(in.o.Out, "run %s, with a configuration by which nothing new uses %s\n", strings.Join(r.restart, " "), r.name)
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
	for _, path := range r.merged {
		fmt.Fprintf(in.o.Out, "keep what others have changed in %s\n", path)
	}
	for _, path := range r.kept {
		fmt.Fprintf(in.o.Out, "leave %s, which was changed since the install\n", path)
	}
	if r.restart != nil {
		fmt.Fprintf(in.o.Out, "run %s\n", strings.Join(r.restart, " "))
	}
	if in.s.Made {
		fmt.Fprintf(in.o.Out, "stop the daemon, and remove %s\n", in.o.Root)
	} else {
		fmt.Fprintf(in.o.Out, "stop the daemon, and leave %s, which was there before the install\n", in.o.Root)
	}
	return nil
}

// keepImages leaves images such that they run with the snapshotter that CRI has then.
func (in *installer) keepImages(ctx context.Context, cl *client.Client, images []unpacked, snapshotter string) error {
	err := in.unpackAll(ctx, cl, images, snapshotter)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return err
	case in.o.DropImages:
		fmt.Fprintf(in.o.Out, "these images have to be pulled again: %v\n", err)
		return nil
	}
	return fmt.Errorf("these images would not run any more (--drop-images goes on all the same):\n%w", err)
}

// remove does all of the removal that can be undone. First it has nothing new use the snapshotter, where that is one setting; who began to meanwhile is asked for again.
func (in *installer) remove(ctx context.Context, cl *client.Client, r removal) (err error) {
	files := r.files
	for _, f := range r.retire.files { // what the install has not written is put back as it is
		if slices.ContainsFunc(files, func(g file) bool { return g.Path == f.Path }) {
			continue
		}
		is, err := readFile(f.Path)
		if err != nil {
			return err
		}
		files = append(files, is)
	}
	if err := in.s.begin(files, change{Running: in.svc.running(ctx), Restart: r.restart, Root: in.o.Root}); err != nil {
		return err
	}
	restarted := false
	defer func() {
		if err != nil {
			err = in.failed(ctx, err, restarted)
		}
	}()
	if len(r.retire.files) > 0 {
		if err := apply(ctx, r.retire.files); err != nil {
			return err
		}
		restarted = true
		if err := in.restartContainerd(ctx, r.restart, r.name); err != nil {
			return err
		}
	}
	if r.name != "" {
		if err := in.keepLate(ctx, cl, r); err != nil {
			return err
		}
		using, err := users(ctx, cl, r.name)
		if err == nil && len(using) > 0 {
			err = fmt.Errorf("these containers have come meanwhile, and have their files from the snapshotter %s:\n  %s", r.name, strings.Join(using, "\n  "))
		}
		if err == nil {
			err = removeSnapshots(ctx, cl, r.name, r.idle)
		}
		if err != nil {
			return err
		}
	}
	if err := apply(ctx, files); err != nil {
		return err
	}
	if r.restart != nil {
		restarted = true
		if err := in.restartContainerd(ctx, r.restart, ""); err != nil {
			return err
		}
	}
	if err := errors.Join(in.svc.stop(ctx, true), in.svc.reload(ctx)); err != nil {
		return err
	}
	return in.s.end()
}

// cleanUp removes what an uninstall that has ended leaves. It can be done again.
func (in *installer) cleanUp() error {
	if err := errors.Join(removeDirs(in.s.Dirs), clearRoot(in.s.Root, in.s.Made), os.RemoveAll(runDir)); err != nil {
		return fmt.Errorf("uninstalled, but for this, which the next uninstall tries again: %w", err)
	}
	if err := in.s.remove(); err != nil {
		return err
	}
	in.s.record = record{}
	fmt.Fprintln(in.o.Out, "uninstalled")
	return nil
}

// mountsIn are the directories of a daemon's root in which it mounts.
var mountsIn = []string{"devices", "images", "snapshots"}

// clearRoot unmounts what the snapshotter has mounted in its directory, and removes that with all that is in it if an install has made it. A directory that was there before
// may be a disk that others use, too.
func clearRoot(root string, made bool) error {
	root = resolved(root)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		first, _, _ := strings.Cut(strings.TrimPrefix(m.Mountpoint, root+"/"), "/")
		if !made && !slices.Contains(mountsIn, first) {
			continue
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

// resolved is a directory as the kernel names mounts in it, if it is there: without links and slashes at its end.
func resolved(dir string) string {
	if to, err := filepath.EvalSymlinks(dir); err == nil {
		return to
	}
	return filepath.Clean(dir)
}
