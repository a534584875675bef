package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
)

// system is a way to start a container. Each has repositories of its own, because what is attached to an image says how it starts.
type system struct {
	Name string
	What string // for the report
	// prepare makes what the system pulls in the repository out of the image that is there already.
	prepare func(ctx context.Context, o *origin, image, ref string) error
	// node says what runs on the node.
	node func(o *origin, l *link) node.Options
	ours bool
	// readAll: the time to read everything is of interest. For overlayfs it is the pull.
	readAll bool
	// missing says what this machine or this version lacks for it; "" is nothing.
	missing func() string
}

func (s *system) repository(image string) string { return "bench/" + s.Name + "/" + image }

func nothing() string { return "" }

// systems are all that the benchmark knows, the one that the others are compared with first.
func systems() []*system {
	return []*system{
		{
			Name: "overlayfs", What: "containerd's overlayfs snapshotter, gzip layers",
			prepare: func(ctx context.Context, _ *origin, image, ref string) error {
				img, err := ociimage.Built(image)
				if err != nil {
					return err
				}
				return ociimage.Push(ctx, img, strings.TrimSuffix(ref, ":latest")+":"+again)
			},
			node:    func(*origin, *link) node.Options { return node.Options{Pull: node.Plain} },
			missing: nothing,
		},
		stargz("stargz", "stargz-snapshotter 0.19.1, eStargz", "--no-optimize"),
		stargz("stargz-opt", "the same, eStargz optimised by a run of the container"),
		{
			Name: "none", What: "streaming, without a profile",
			prepare: func(ctx context.Context, _ *origin, _, ref string) error {
				return create(ctx, ref, withoutProfile()...)
			},
			node: streaming, missing: nothing, readAll: true, ours: true,
		},
		{
			Name: "static", What: "streaming, with the static profile",
			prepare: func(ctx context.Context, _ *origin, _, ref string) error { return create(ctx, ref) },
			node:    streaming, missing: noProfiles, ours: true,
		},
		{
			Name: "recorded", What: "streaming, with the profile of one start",
			prepare: func(ctx context.Context, o *origin, image, ref string) error {
				if err := create(ctx, ref, withoutProfile()...); err != nil {
					return err
				}
				return record(ctx, o, image, ref)
			},
			node: streaming, missing: nothing, ours: true,
		},
	}
}

// noProfiles says that profiles are not there yet, if so.
func noProfiles() string {
	if !createKnows("--profile") {
		return "streamctl create makes no profiles"
	}
	return ""
}

func withoutProfile() []string {
	if createKnows("--profile") {
		return []string{"--profile=none"}
	}
	return nil
}

func streaming(_ *origin, l *link) node.Options {
	return node.Options{Pull: node.Transfer, Stream: []string{l.Host + "/*"}}
}

func create(ctx context.Context, ref string, args ...string) error {
	return command(ctx, append([]string{"streamctl", "create", "--record", "", ref}, args...)...)
}

// createKnows asks streamctl create for a flag.
func createKnows(flag string) bool {
	out, err := exec.Command("streamctl", "create", "--help").Output()
	return err == nil && strings.Contains(string(out), flag)
}

func command(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// prepareImage puts the image and what the system makes of it into the registry.
func (s *system) prepareImage(ctx context.Context, o *origin, image string) error {
	img, err := ociimage.Built(image)
	if err != nil {
		return err
	}
	ref := o.Host() + "/" + s.repository(image) + ":latest"
	if err := ociimage.Push(ctx, img, ref); err != nil {
		return err
	}
	return s.prepare(ctx, o, image, ref)
}
