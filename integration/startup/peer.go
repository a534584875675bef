package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/ociimage"
)

// stargz is stargz-snapshotter, with eStargz images made by Debian's ctr-remote: as they are, or with what a run of the container read put first.
func stargz(id, what string, args ...string) *system {
	return &system{
		Name: id, What: what,
		prepare: func(ctx context.Context, o *origin, image, ref string) error {
			img, err := converted(ctx, o, id+"-"+image, ref, args)
			if err != nil {
				return err
			}
			return ociimage.Push(ctx, img, ref)
		},
		node: func(o *origin, _ *link) node.Options {
			return node.Options{Peer: &node.Peer{Name: "stargz", Command: []string{"stargz", "DIR/run/s.sock", "DIR/s", "DIR/certs.d"}}}
		},
		missing: func() string {
			for _, program := range []string{"stargz", "ctr-remote"} {
				if _, err := exec.LookPath(program); err != nil {
					return err.Error()
				}
			}
			return ""
		},
		readAll: true,
	}
}

// converted returns the eStargz image of ref, which is kept beside the images of integration/images, because to make it takes a minute.
func converted(ctx context.Context, o *origin, id, ref string, args []string) (v1.Image, error) {
	source, err := get(ctx, ref)
	if err != nil {
		return nil, err
	}
	dgst, err := source.Digest()
	if err != nil {
		return nil, err
	}
	images, err := ociimage.BuiltDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(images, "estargz", id+"-"+dgst.Hex[:12])
	if img, err := ociimage.FromLayout(dir); err == nil {
		return img, nil
	}
	to := o.Host() + "/estargz/" + id + ":latest"
	if err := o.onNode(ctx, node.Options{Pull: node.Plain}, func(ctx context.Context, n *node.Node) error {
		if _, err := n.Ctr(ctx, "images", "pull", "--plain-http", ref); err != nil {
			return err
		}
		optimize := append([]string{"ctr-remote", "--address", n.Dir + "/run/c.sock", "--namespace", node.Namespace, "images", "optimize", "--oci", "--net-host"}, args...)
		if err := command(ctx, append(optimize, ref, to)...); err != nil {
			return err
		}
		_, err := n.Ctr(ctx, "images", "push", "--plain-http", to)
		return err
	}); err != nil {
		return nil, err
	}
	img, err := get(ctx, to)
	if err != nil {
		return nil, err
	}
	fresh, err := os.MkdirTemp(images, "estargz-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(fresh)
	l, err := layout.Write(fresh, empty.Index)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(l.AppendImage(img), os.MkdirAll(filepath.Dir(dir), 0o755)); err != nil {
		return nil, err
	}
	return img, os.Rename(fresh, dir)
}

// get returns an image of the registry.
func get(ctx context.Context, ref string) (v1.Image, error) {
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return nil, err
	}
	return remote.Image(r, remote.WithContext(ctx))
}
