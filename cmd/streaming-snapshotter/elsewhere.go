package main

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// elsewhere returns what lists the repositories of containerd's images that begin with one of some chains of layers, those with the longest first: stream.Options.Elsewhere. containerd answers a pull of which it has all
// chains by itself, so that nobody here has heard of it.
func elsewhere(socket string) func(ctx context.Context, chainIDs []digest.Digest) ([]registryclient.Repository, error) {
	return func(ctx context.Context, chainIDs []digest.Digest) ([]registryclient.Repository, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		cl, err := client.New(socket)
		if err != nil {
			return nil, err
		}
		defer cl.Close()
		list, err := cl.NamespaceService().List(ctx)
		if err != nil {
			return nil, err
		}
		common := map[registryclient.Repository]int{}
		for _, ns := range list {
			ctx := namespaces.WithNamespace(ctx, ns)
			images, err := cl.ListImages(ctx)
			if err != nil {
				return nil, err
			}
			for _, img := range images {
				repo, _, _, err := registryclient.ParseReference(img.Name())
				if err != nil {
					continue // CRI's own names
				}
				diffIDs, err := img.RootFS(ctx)
				if err != nil {
					continue // of another platform
				}
				n := 0
				for i, id := range identity.ChainIDs(diffIDs) {
					if i == len(chainIDs) || id != chainIDs[i] {
						break
					}
					n++
				}
				if n > 0 {
					common[repo] = max(common[repo], n)
				}
			}
		}
		repos := make([]registryclient.Repository, 0, len(common))
		for repo := range common {
			repos = append(repos, repo)
		}
		slices.SortFunc(repos, func(a, b registryclient.Repository) int { return cmp.Or(common[b]-common[a], cmp.Compare(a, b)) })
		return repos, nil
	}
}
