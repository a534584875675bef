// Package registryclient talks to registries for the node: referrers, manifests and ranged reads of blobs, over the hosts that containerd's certs.d configuration gives.
package registryclient

import (
	"context"
	"errors"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotFound: no host has it.
var ErrNotFound = errors.New("not found")

// Options of a Client.
type Options struct {
	HostsDir    string                                                                  // certs.d; "" is none
	Credentials func(ctx context.Context, host string) (user, secret string, err error) // nil is anonymous
	UserAgent   string
}

// Client is safe for concurrent use.
type Client struct{}

// New returns a Client.
func New(o Options) (*Client, error) { panic("todo") }

// Repository names a repository as in an image reference: "docker.io/library/busybox" (no tag, no digest).
type Repository string

// Referrers lists the referrers of subject with the given artifact type: referrers API first, then the referrers tag schema.
// None is an empty list, no error. One round trip; one more on first contact with a registry that has only the tag schema.
func (c *Client) Referrers(ctx context.Context, repo Repository, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	panic("todo")
}

// Manifest fetches a manifest by digest (verified) of at most max bytes.
func (c *Client) Manifest(ctx context.Context, repo Repository, dgst digest.Digest, max int64) ([]byte, error) {
	panic("todo")
}

// Resolve fetches the manifest or index that ref ("host/repo:tag" or "host/repo@digest") names.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	panic("todo")
}

// Blob fetches a whole small blob (verified) of at most max bytes.
func (c *Client) Blob(ctx context.Context, repo Repository, dgst digest.Digest, max int64) ([]byte, error) {
	panic("todo")
}

// ReadRange returns exactly n bytes at off of blob dgst (not verified). See cache.Blob for try.
func (c *Client) ReadRange(ctx context.Context, repo Repository, dgst digest.Digest, off, n int64, try int) (io.ReadCloser, error) {
	panic("todo")
}
