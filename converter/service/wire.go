package service

import (
	"errors"
	"fmt"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// AzureOperation is an operation as Azure Container Registry's API and az acr artifact-streaming operation show have it. What is behind
// Details is ours.
type AzureOperation struct {
	Name     string    `json:"name"`     // "ArtifactStreamingConversion"
	Resource string    `json:"resource"` // "team/app@sha256:..."
	Status   State     `json:"status"`
	Start    time.Time `json:"startTime,omitzero"`
	Progress string    `json:"progress"` // "8%"
	Details  string    `json:"details"`

	ID        string         `json:"id"`
	End       time.Time      `json:"endTime,omitzero"`
	ErrorCode converter.Code `json:"errorCode,omitempty"`
	Message   string         `json:"errorMessage,omitempty"`
}

// Azure returns the operation in Azure's words.
func (o Operation) Azure() AzureOperation {
	a := AzureOperation{
		Name: "ArtifactStreamingConversion", Resource: o.Repository + "@" + o.Digest.String(), Status: o.State, Start: o.Start,
		Progress: fmt.Sprintf("%d%%", o.Progress.Percent), ID: o.ID, End: o.End, ErrorCode: o.ErrorCode, Message: o.Message,
	}
	switch o.State {
	case NotStarted:
		a.Details = fmt.Sprintf("Conversion is queued for resource %s.", a.Resource)
		if o.Position > 0 {
			a.Details = fmt.Sprintf("Conversion is queued for resource %s, at position %d.", a.Resource, o.Position)
		}
	case Succeeded:
		a.Details = fmt.Sprintf("Conversion succeeded for resource %s.", a.Resource)
	case Failed:
		a.Details = fmt.Sprintf("Conversion failed for resource %s: %s", a.Resource, o.Message)
	case Canceled:
		a.Details = fmt.Sprintf("Conversion was canceled for resource %s.", a.Resource)
	default:
		a.Details = fmt.Sprintf("Conversion ongoing for resource %s.", a.Resource)
	}
	return a
}

// AzureSettings are a repository's as Azure's API and az acr artifact-streaming show have them.
type AzureSettings struct {
	Active  bool   `json:"convertPushedImages"`
	Format  string `json:"conversionFormat"`
	Version string `json:"conversionVersion"`
	Status  State  `json:"status,omitempty"` // Succeeded, of those that were just set
}

// Azure returns the settings in Azure's words; the format is the one that there is.
func (s Settings) Azure(status State) AzureSettings {
	return AzureSettings{s.Active, artifact.Format, artifact.Version, status}
}

type word struct {
	err  error
	code string
}

// words are the errors that callers tell apart, as they are named where errors.Is does not reach.
func words() []word {
	return []word{
		{ErrNotFound, "NOT_FOUND"},
		{converter.ErrNotFound, "NOT_FOUND"},
		{ErrExists, "ARTIFACT_EXISTS"},
		{ErrNotRunning, "OPERATION_ENDED"},
		{ErrInvalid, "INVALID"},
		{ErrUnavailable, "UNAVAILABLE"},
		{converter.ErrDifferent, "ARTIFACT_DIFFERS"},
	}
}

// Code names the class of err: the code of the conversion that could not be (UNSUPPORTED_MEDIATYPE), or the sentinel error that err is
// (NOT_FOUND), and UNKNOWN_ERROR for everything else.
func Code(err error) string {
	var e *converter.Error
	if errors.As(err, &e) && e.Code != converter.Unknown {
		return string(e.Code)
	}
	for _, w := range words() {
		if errors.Is(err, w.err) {
			return w.code
		}
	}
	return string(converter.Unknown)
}

// ErrorOf returns the sentinel error that Code names so, or nil.
func ErrorOf(code string) error {
	if code == string(converter.ResourceNotFound) {
		return ErrNotFound
	}
	for _, w := range words() {
		if w.code == code {
			return w.err
		}
	}
	return nil
}
