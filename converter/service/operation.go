// Package service is the conversion service: it converts images on request and as they are pushed, for any number of registries.
//
// The principle: what must not be lost is in NATS JetStream (operations, settings, what was converted, the queue), and every process of
// the service is equal: each takes work from the queue when it has room for it, and each answers for all. An operation is taken by one
// process at a time, which says so again and again; when it stops saying so, another goes on from the layers that were pushed.
// An operation's record changes by compare-and-set alone, so that who lost its turn cannot write any more.
//
// What it does not do: it speaks no HTTP (rest, webhook and console do, each declaring what it needs of Service), knows nobody's
// rights (access does), and converts nothing itself (package converter does).
package service

import (
	"errors"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// State of an operation; the words are those of Azure Container Registry's operations.
type State string

const (
	NotStarted State = "NotStarted" // waits in the queue
	Running    State = "Running"
	Succeeded  State = "Succeeded"
	Failed     State = "Failed"
	Canceled   State = "Canceled"
)

// Ended says that the state will not change any more.
func (s State) Ended() bool { return s == Succeeded || s == Failed || s == Canceled }

// Image is a manifest or index in a repository of a registry.
type Image struct {
	Registry   string        `json:"registry"` // its host, as in an image's name: "registry.example.com:5000"
	Repository string        `json:"repository"`
	Digest     digest.Digest `json:"digest"`
}

func (i Image) String() string { return i.Registry + "/" + i.Repository + "@" + i.Digest.String() }

// Request asks for a conversion.
type Request struct {
	Image     Image
	Tag       string   // that named the image, "" for none: for people to read
	Platforms []string // "linux/arm64"; none is every Linux platform
	Force     bool     // convert what has an artifact, too
	By        string   // who asks: an identity's name, or "push to TAG" with the source of the event

	pushed bool // nobody asked, and a push was the reason
}

// Operation is a conversion that was asked for. Times are UTC, and zero as long as they are not known.
type Operation struct {
	ID        string    `json:"id"` // a UUID
	Image               // what is converted
	Tag       string    `json:"tag,omitempty"`
	Platforms []string  `json:"platforms,omitempty"`
	Force     bool      `json:"force,omitempty"`
	By        string    `json:"by"`
	State     State     `json:"status"`
	Asked     time.Time `json:"requestTime"`
	Start     time.Time `json:"startTime,omitzero"` // of the first attempt
	End       time.Time `json:"endTime,omitzero"`
	Progress  Progress  `json:"progress"`
	Position  int       `json:"position,omitempty"` // in the queue, from 1; 0 when it does not wait
	Attempt   int       `json:"attempt"`            // how often a process took it, 0 while none did
	Worker    string    `json:"worker,omitempty"`   // the process that has it
	Cancel    bool      `json:"cancelRequested,omitempty"`
	CancelBy  string    `json:"cancelRequestedBy,omitempty"`

	Artifacts []Artifact     `json:"artifacts,omitempty"` // attached by it, or found attached
	ErrorCode converter.Code `json:"errorCode,omitempty"` // of a failed one
	Message   string         `json:"message,omitempty"`   // why it failed, for people
	Warnings  []string       `json:"warnings,omitempty"`
}

// Progress says how far a conversion is. Bytes are those of the source's compressed layers, all platforms together.
type Progress struct {
	Percent  int           `json:"percent"` // 0 to 100; 100 only of what succeeded
	Bytes    int64         `json:"bytes"`
	Total    int64         `json:"totalBytes"`         // 0 while it is not known
	Platform string        `json:"platform,omitempty"` // being converted
	Layer    int           `json:"layer,omitempty"`    // the one being converted that began first, from 1
	Layers   int           `json:"layers,omitempty"`   // of the platform
	Digest   digest.Digest `json:"layerDigest,omitempty"`
	Updated  time.Time     `json:"updated,omitzero"`
}

// Artifact is a streaming artifact of one platform of an image.
type Artifact struct {
	Platform string        `json:"platform"`
	Subject  digest.Digest `json:"subject"` // the platform's manifest
	Digest   digest.Digest `json:"digest"`
	Existed  bool          `json:"existed,omitempty"` // before the operation
}

// What callers tell apart with errors.Is. Everything else is a failure of the service or of a registry.
var (
	ErrNotFound    = errors.New("not found")             // no such registry, repository, image or operation
	ErrNotRunning  = errors.New("not ongoing")           // the operation ended already: it cannot be cancelled
	ErrInvalid     = errors.New("invalid")               // a request that cannot be meant
	ErrExists      = errors.New("already exists")        // the image has its artifacts: there is nothing to convert
	ErrUnavailable = errors.New("service not available") // the queue or the registry does not answer; try again
)

// Deed is what the service did without being asked.
type Deed struct {
	Action string // "convert", "cancel", "delete"
	Image
	Target string // an operation's id, or what was deleted
	Detail string // why, for people
}

// ProcessesDied is the code of an operation whose processes died over it, again and again. It is not asked for again because it was pushed.
const ProcessesDied converter.Code = "PROCESSES_DIED"

// Filter chooses operations. Zero fields choose all.
type Filter struct {
	Registry   string
	Repository string
	Digest     digest.Digest
	States     []State
	// May, unless nil, says whose operations count at all: what who asks may not see.
	May   func(registry, repository string) bool
	Limit int // of the newest; 0 is 100
}
