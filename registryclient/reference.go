package registryclient

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Repository names a repository as in an image reference: "docker.io/library/busybox" (no tag, no digest).
type Repository string

// ParseReference splits an image reference as Docker and containerd's CRI read it: "busybox" is docker.io/library/busybox:latest, and where
// there are both a tag and a digest the digest counts. Exactly one of tag and dgst is not empty.
func ParseReference(ref string) (repo Repository, tag string, dgst digest.Digest, err error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", "", "", fmt.Errorf("parse reference %q: %w", ref, err)
	}
	switch r := named.(type) {
	case reference.Digested:
		dgst = r.Digest()
	case reference.Tagged:
		tag = r.Tag()
	}
	return Repository(named.Name()), tag, dgst, nil
}

// split returns the registry and the name below it: "docker.io", "library/busybox". It does not normalize: a Repository has its registry in front.
func (r Repository) split() (registry, name string, err error) {
	named, err := reference.ParseNamed(string(r))
	if err != nil {
		return "", "", fmt.Errorf("repository %q: %w", r, err)
	}
	if !reference.IsNameOnly(named) {
		return "", "", fmt.Errorf("repository %q has a tag or a digest", r)
	}
	return reference.Domain(named), reference.Path(named), nil
}

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// manifestTypes is the Accept header for manifests. A registry converts what is not listed, or refuses it.
var manifestTypes = strings.Join([]string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerList, dockerManifest}, ", ")

// mediaTypeOf returns the media type of the manifest b: what it says itself, and the header where it says nothing.
// A manifest that is said to be one thing and says to be another is refused: which of both counts would depend on the reader.
func mediaTypeOf(h http.Header, b []byte) (string, error) {
	var m struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return "", refused("manifest is no JSON: %v", err)
	}
	header, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	switch {
	case m.MediaType == "" && err != nil:
		return "", refused("manifest without a media type")
	case m.MediaType == "":
		return header, nil
	case strings.HasPrefix(header, "application/vnd.") && header != m.MediaType:
		return "", refused("manifest is served as %q and says it is %q", header, m.MediaType)
	}
	return m.MediaType, nil
}
