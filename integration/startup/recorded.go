package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// record attaches to ref, which has its artifact, the profile of one start of its container.
func record(ctx context.Context, o *origin, image, ref string) error {
	requests, err := touched(ctx, o, image, ref)
	if err != nil {
		return err
	}
	m, err := artifactOf(ctx, ref)
	if err != nil {
		return err
	}
	repo, _, _ := strings.Cut(strings.TrimPrefix(ref, o.Host()+"/"), ":")
	profile := &artifact.Profile{}
	at := map[digest.Digest]int{} // of a blob, its place in profile.Layers
	indexes := map[digest.Digest]*artifact.Index{}
	for i := range m.Layers {
		l := &m.Layers[i]
		if _, again := at[l.Digest]; again {
			continue
		}
		b, err := blobRange(ctx, o.URL()+"/v2/"+repo+"/blobs/"+l.Digest.String(), l.IndexOffset, l.IndexSize)
		if err != nil {
			return err
		}
		if indexes[l.Digest], err = l.Index(b); err != nil {
			return err
		}
		at[l.Digest] = len(profile.Layers)
		profile.Layers = append(profile.Layers, l.IndexDigest)
	}
	listed := map[artifact.HotChunk]bool{}
	for _, q := range requests {
		dgst := digest.Digest(q.Path[strings.LastIndex(q.Path, "/")+1:])
		x, ok := indexes[dgst]
		var from, to int64
		if n, _ := fmt.Sscanf(q.Range, "bytes=%d-%d", &from, &to); !ok || n != 2 {
			continue
		}
		for i := range x.NumChunks() {
			c := artifact.HotChunk{Layer: at[dgst], Chunk: i}
			if k := x.Chunk(i); k.BlobOffset <= to && k.BlobOffset+k.BlobSize > from && !listed[c] {
				listed[c] = true
				profile.Chunks = append(profile.Chunks, c)
			}
		}
	}
	place, tag, err := converter.Open(ref, converter.OpenOptions{})
	if err != nil {
		return err
	}
	_, warnings, err := converter.AttachProfile(ctx, place, tag, profile, artifact.ProfileRecorded, time.Now(), converter.Options{})
	if len(warnings) > 0 {
		err = errors.Join(err, fmt.Errorf("attach the profile: %q", warnings))
	}
	return err
}

// artifactOf returns the only artifact of ref.
func artifactOf(ctx context.Context, ref string) (*artifact.Manifest, error) {
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return nil, err
	}
	d, err := remote.Head(r, remote.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	index, err := remote.Referrers(r.Context().Digest(d.Digest.String()), remote.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range list.Manifests {
		if d.ArtifactType != artifact.ArtifactType {
			continue
		}
		got, err := remote.Get(r.Context().Digest(d.Digest.String()), remote.WithContext(ctx))
		if err != nil {
			return nil, err
		}
		return artifact.DecodeManifest(got.Manifest)
	}
	return nil, fmt.Errorf("%s has no artifact", ref)
}

// touched starts a container with an empty cache and returns the requests for the chunks that it touches between its creation and its ready line: our
// daemon is told to fetch nothing ahead.
func touched(ctx context.Context, o *origin, image, ref string) (requests []registrytest.Request, err error) {
	opts := node.Options{Stream: []string{o.Host() + "/bench/*"}, Config: "read_ahead = false"}
	err = o.onNode(ctx, opts, func(ctx context.Context, n *node.Node) error {
		if err := n.Pull(ctx, ref); err != nil {
			return err
		}
		o.Reset()
		c, err := n.RunPod(ctx, ref)
		if err != nil {
			return err
		}
		_, err = c.WaitLine(ctx, readyLine(image))
		for _, q := range o.Requests() {
			if registrytest.OfBlobs(q) {
				requests = append(requests, q)
			}
		}
		return err
	})
	return requests, err
}

func blobRange(ctx context.Context, url string, off, n int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return io.ReadAll(resp.Body)
}
