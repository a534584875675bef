package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// record attaches to ref, which has an artifact and no profile, the profile of one start of its container.
func record(ctx context.Context, o *origin, image, ref string) error {
	file := filepath.Join(o.dir, "record.json")
	if err := coldStart(ctx, o, image, ref, "", func(n *node.Node) error {
		out, err := exec.CommandContext(ctx, "streaming-snapshotter", "profile", "export", "--config", filepath.Join(n.Dir, "snapshotter.toml"), ref).Output()
		if err != nil {
			return err
		}
		return os.WriteFile(file, out, 0o600)
	}); err != nil {
		return err
	}
	return command(ctx, "streamctl", "profile", "push", "--source", "recorded", ref, file)
}

// needed returns the bytes of the chunks that a container touches between its creation and its ready line. ref has no profile.
func needed(ctx context.Context, o *origin, image, ref string) (bytes int64, err error) {
	err = coldStart(ctx, o, image, ref, "read_ahead = false", func(*node.Node) error {
		_, bytes = o.Count(registrytest.OfBlobs)
		return nil
	})
	return bytes, err
}

// coldStart starts a container with an empty cache on a node whose daemon has this configuration and fetches nothing in the background, and calls f when it is
// ready. The registry counts from the container's creation.
func coldStart(ctx context.Context, o *origin, image, ref, config string, f func(*node.Node) error) error {
	opts := node.Options{Stream: []string{o.Host() + "/bench/*"}, Config: config + "\nbackground_bandwidth = \"0\""}
	return o.onNode(ctx, opts, func(ctx context.Context, n *node.Node) error {
		if err := n.Pull(ctx, ref); err != nil {
			return err
		}
		o.Reset()
		pod, err := n.RunSandbox(ctx)
		if err != nil {
			return err
		}
		if err := startIn(ctx, pod, ref, image); err != nil {
			return err
		}
		return f(n)
	})
}
