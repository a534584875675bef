package converter

import "errors"

// ErrNotFound: the place has no such manifest or blob.
var ErrNotFound = errors.New("not found")

// Code classifies why an image cannot be converted. The codes and their messages are those of Azure Container Registry's
// artifact streaming (its troubleshooting page), so that what reads those reads ours.
type Code string

const (
	Unknown                  Code = "UNKNOWN_ERROR"
	ResourceNotFound         Code = "RESOURCE_NOT_FOUND"
	UnsupportedPlatform      Code = "UNSUPPORTED_PLATFORM"
	NoSupportedPlatformFound Code = "NO_SUPPORTED_PLATFORM_FOUND"
	UnsupportedMediaType     Code = "UNSUPPORTED_MEDIATYPE"
	UnsupportedArtifactType  Code = "UNSUPPORTED_ARTIFACT_TYPE"
	ImageNotRunnable         Code = "IMAGE_NOT_RUNNABLE"
	SigningFailed            Code = "SIGNING_FAILED" // ours alone: Azure signs nothing
)

// Message returns the sentence that goes with the code.
func (c Code) Message() string {
	switch c {
	case ResourceNotFound:
		return "Conversion operation failed because target resource isn't found."
	case UnsupportedPlatform:
		return "Conversion isn't currently supported for image platform."
	case NoSupportedPlatformFound:
		return "Conversion isn't currently supported for any of the image platforms in the index."
	case UnsupportedMediaType:
		return "Conversion isn't supported for the image MediaType."
	case UnsupportedArtifactType:
		return "Conversion isn't supported for the image ArtifactType."
	case ImageNotRunnable:
		return "Conversion isn't supported for nonrunnable images."
	case SigningFailed:
		return "The artifact could not be signed."
	}
	return "Conversion operation failed due to an unknown error."
}

// Error says why an image cannot be converted.
type Error struct {
	Code Code
	Err  error // the particulars: which manifest, which layer
}

func (e *Error) Error() string {
	return string(e.Code) + ": " + e.Code.Message() + " " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// CodeOf returns the code of err: that of the *Error in its chain, ResourceNotFound for ErrNotFound, Unknown otherwise.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, ErrNotFound):
		return ResourceNotFound
	}
	return Unknown
}
