package service

import (
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// Settings are a repository's, or those of all repositories that a pattern matches. Of several that match a repository, the one of its
// own name counts, or else the longest pattern; a repository that none matches is inactive.
type Settings struct {
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"` // a name or a pattern, see Match
	Active     bool      `json:"convertPushedImages"`
	Rules      Rules     `json:"rules,omitzero"`
	Changed    time.Time `json:"changed,omitzero"`
	By         string    `json:"by,omitempty"`
}

// Rules say which pushed images are converted. They do not bind who asks for a conversion.
type Rules struct {
	Platforms []string `json:"platforms,omitempty"` // none is every Linux platform
	MinSize   int64    `json:"minSize,omitempty"`   // bytes of a platform's compressed layers: smaller images gain nothing
	Keep      int      `json:"keep,omitempty"`      // artifacts of how many of the newest tags are kept; 0 is all
}

// Match says whether a repository's name fits a pattern. A star stands for any characters, slashes among them; everything else for
// itself.
func Match(pattern, name string) bool {
	first, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == name
	}
	if !strings.HasPrefix(name, first) {
		return false
	}
	name = name[len(first):]
	for {
		part, more, star := strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(name, part)
		}
		i := strings.Index(name, part)
		if i < 0 {
			return false
		}
		name, rest = name[i+len(part):], more
	}
}

// EventKind says what a registry tells.
type EventKind int

const (
	Pushed EventKind = iota
	Deleted
)

// Event is what a registry tells: a hint, which may come late, twice, or not at all. It is believed as far as the registry itself says
// the same when asked.
type Event struct {
	Kind       EventKind
	Registry   string
	Repository string
	Tag        string        // "" where the registry does not say, or nothing was tagged
	Digest     digest.Digest // "" where it does not say
	ID         string        // of the delivery, for the log
	Source     string        // the kind of webhook that told it, "harbor"
	By         string        // who pushed, as the registry says; "" if it does not
}

// RegistryInfo is a registry that the service looks after.
type RegistryInfo struct {
	Name     string `json:"name"` // its host
	PullOnly bool   `json:"pullOnly,omitempty"`
	// NoCatalog says why the registry's repositories cannot be listed. Then those are known that settings name, or that it told of; a pattern makes active
	// what is pushed to from then on.
	NoCatalog string `json:"noCatalog,omitempty"`
}

// RepositoryInfo is a row of a registry's repositories.
type RepositoryInfo struct {
	Registry string   `json:"registry"`
	Name     string   `json:"name"`
	Settings Settings `json:"settings"` // that count for it
	Tags     int      `json:"tags"`     // -1 where it is not known
}

// TagInfo is a row of a repository's tags.
type TagInfo struct {
	Name      string        `json:"name"`
	Digest    digest.Digest `json:"digest"`           // "" where only the name is known, as of the last of very many tags
	MediaType string        `json:"mediaType"`        // likewise
	Created   time.Time     `json:"created,omitzero"` // as the image's config says
	Streaming bool          `json:"streaming"`        // every Linux platform has its artifact
}

// ImageInfo describes an image as the console and show do.
type ImageInfo struct {
	Image
	Tag       string         `json:"tag,omitempty"`
	MediaType string         `json:"mediaType"`
	Subject   digest.Digest  `json:"subject,omitempty"` // what it refers to, if it is no image but a referrer
	Platforms []PlatformInfo `json:"platforms"`
	Referrers []ReferrerInfo `json:"referrers"`           // of an index itself; those of a platform's manifest are the platform's
	Last      *Operation     `json:"operation,omitempty"` // the last one
}

// PlatformInfo is one platform's manifest of an image, with what refers to it.
type PlatformInfo struct {
	Platform  string         `json:"platform"`
	Digest    digest.Digest  `json:"digest"`
	Size      int64          `json:"size"` // bytes of the compressed layers
	Layers    []LayerInfo    `json:"layers"`
	Referrers []ReferrerInfo `json:"referrers"`
	Streaming *StreamingInfo `json:"streaming,omitempty"` // nil without a usable artifact
	Starts    *StartsInfo    `json:"starts,omitempty"`    // nil if none were reported
}

// LayerInfo is a layer of an image. Sizes are bytes.
type LayerInfo struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Size      int64         `json:"size"`
}

// ReferrerInfo is a referrer of an image.
type ReferrerInfo struct {
	Digest       digest.Digest     `json:"digest"`
	ArtifactType string            `json:"artifactType"`
	MediaType    string            `json:"mediaType"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// StreamingInfo describes a platform's artifact, and what of it a start reads.
type StreamingInfo struct {
	Artifact digest.Digest `json:"artifact"`
	Size     int64         `json:"size"`      // bytes of its layers
	Index    int64         `json:"indexSize"` // bytes of the indexes: what a pull fetches
	Profile  string        `json:"profile,omitempty"`
	// ProfileDigest is of the manifest of the profile that is meant.
	ProfileDigest digest.Digest `json:"profileDigest,omitempty"`
	Layers        []LayerMap    `json:"layers"`
}

// LayerMap says which parts of a layer a container reads at start, as the image's best profile says (recorded before learned before
// static). Offsets are those of the uncompressed tar.
type LayerMap struct {
	Source  digest.Digest `json:"source"`
	Digest  digest.Digest `json:"digest"`
	Size    int64         `json:"size"`
	TarSize int64         `json:"tarSize"`
	Chunks  int           `json:"chunks"`
	Hot     []Span        `json:"hot"` // in order of offset, neighbours joined
}

// Span is a part of a tar: bytes [Off, Off+Len).
type Span struct {
	Off int64 `json:"off"`
	Len int64 `json:"len"`
}

// StorageInfo says what a repository's tagged images take. Sizes are bytes of layers, each counted once.
type StorageInfo struct {
	Images        int   `json:"images"`
	Artifacts     int   `json:"artifacts"`
	ImageBytes    int64 `json:"imageBytes"`
	ArtifactBytes int64 `json:"artifactBytes"`
	ProfileBytes  int64 `json:"profileBytes"`      // the hot blobs
	Partial       bool  `json:"partial,omitempty"` // there are more tags than were counted
}
