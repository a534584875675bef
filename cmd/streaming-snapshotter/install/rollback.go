package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
)

// failed undoes a change that has come to err. That something is not undone is never hidden behind an interrupt.
func (in *installer) failed(ctx context.Context, err error, restarted bool) error {
	stands, left := in.rollBack(context.WithoutCancel(ctx), restarted)
	if left != nil {
		return fmt.Errorf("%v\n%w", err, left)
	}
	if stands != "" {
		return fmt.Errorf("%v\n%s", err, stands)
	}
	return err
}

// rollBack undoes the change that is noted: files, services, and containerd, if that may have been restarted meanwhile. It can be done again. A first install stands if containers have come
// since, or images, which would lose their files with it; where containerd does not answer, which may be because of its files, these are put back, and it is asked then. stands says what to do; "" if all is undone.
func (in *installer) rollBack(ctx context.Context, restarted bool) (stands string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("not all is as it was before; the next install or uninstall tries again, and %s has the originals: %w", Dir, err)
		}
	}()
	if !in.s.Change.Fresh || !restarted {
		return "", in.undo(ctx, restarted)
	}
	come, err := in.come(ctx)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		fmt.Fprintf(in.o.Out, "containerd does not say what has come since its restart: its files are put back, and it is restarted (%v)\n", err)
		if err := in.s.release(); err != nil {
			return "", err
		}
		if err := in.restartBack(ctx); err != nil {
			return "", err
		}
		if come, err = in.come(ctx); err != nil {
			return "", err
		}
	}
	if len(come) == 0 {
		return "", in.undo(ctx, restarted)
	}
	kept, stands := "nothing is undone", "So all stays as installed: mend that and install again, or drain the node and uninstall"
	if in.s.Change.Released {
		kept, stands = "the daemon stays, and its files", "So the daemon stays, and containerd's files are as they were before: mend that and install again, because without the snapshotter containerd makes no containers of these images, and removes none that it has"
	}
	fmt.Fprintf(in.o.Out, "%s, because these have come meanwhile, and would lose the files that they have from the snapshotter %s:\n  %s\n", kept, in.s.Change.Name, strings.Join(come, "\n  "))
	return stands, in.s.commit()
}

// come names the containers and images that have come with a first install, and lose their files if that is undone.
func (in *installer) come(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := in.s.Change
	loaded, err := in.o.Loaded(ctx)
	if err != nil {
		return nil, err
	}
	cl, err := client.New(in.o.Socket)
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	list, err := users(ctx, cl, c.Name)
	with, others := c.Name, slices.DeleteFunc(slices.Clone(loaded), func(name string) bool { return name == c.Name })
	if len(others) == len(loaded) {
		with = "" // it has forgotten which images it had with the snapshotter
	}
	if err != nil || with == "" && !c.Released {
		return list, err
	}
	images, err := imagesOf(ctx, cl, with, others...)
	if err == nil {
		images, err = lacking(ctx, cl, images)
	}
	for _, u := range images {
		list = append(list, fmt.Sprintf("%s, an image whose layers containerd does not have", u))
	}
	return list, err
}

// undo is rollBack of what does not stand.
func (in *installer) undo(ctx context.Context, restarted bool) error {
	c := in.s.Change
	// What keeps the mounts of a daemon that was there before keeps them on: containers wait for it.
	if !c.Running {
		if err := in.svc.stop(ctx, c.Fresh); err != nil {
			return err
		}
	}
	if err := errors.Join(in.s.undo(), in.svc.reload(ctx)); err != nil {
		return err
	}
	if c.Fresh {
		if err := clearRoot(c.Root, c.Made); err != nil {
			return err
		}
	}
	if c.Running {
		if err := in.svc.start(ctx); err != nil { // as before, maybe; there is nothing else to undo, and an install of what mends it must not wait for that
			fmt.Fprintf(in.o.Out, "the daemon does not start with the files that it had before: %v\n", err)
		}
	}
	if restarted {
		if err := in.restartBack(ctx); err != nil {
			return err
		}
	}
	if err := in.s.forget(); err != nil {
		return err
	}
	fmt.Fprintln(in.o.Out, "all files are as they were before")
	return nil
}

// restartBack restarts containerd with its files as they were before, if those were changed.
func (in *installer) restartBack(ctx context.Context) error {
	command := in.s.Change.Restart
	if command == nil {
		return nil
	}
	if in.o.Restart != nil {
		command = in.o.Restart
	}
	return in.restartContainerd(ctx, command, "")
}
