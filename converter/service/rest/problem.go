package rest

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// problem is an error as it is answered: {"errors":[{"code","message"}]}.
type problem struct {
	status  int
	code    string
	message string // one sentence that names the thing, and the way out
	header  map[string]string
}

func (p *problem) Error() string { return p.message }

func notFound(format string, args ...any) error {
	return &problem{http.StatusNotFound, "NOT_FOUND", fmt.Sprintf(format, args...), nil}
}

func invalid(format string, args ...any) error {
	return &problem{http.StatusBadRequest, "INVALID", fmt.Sprintf(format, args...), nil}
}

// problemOf says how err is answered.
func problemOf(err error) *problem {
	var p *problem
	if errors.As(err, &p) {
		return p
	}
	p = &problem{code: service.Code(err), message: err.Error(), status: http.StatusInternalServerError}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		p.code, p.message = "UNAVAILABLE", "no answer in time, try again: "+p.message
	case errors.Is(err, context.Canceled):
		p.code, p.message = "UNAVAILABLE", "the server is about to end, try again"
	}
	switch p.code {
	case "NOT_FOUND", string(converter.ResourceNotFound):
		p.status = http.StatusNotFound
	case "INVALID":
		p.status = http.StatusBadRequest
	case "UNAVAILABLE":
		p.status, p.header = http.StatusServiceUnavailable, map[string]string{"Retry-After": "5"}
	case string(converter.Unknown):
	default:
		// What the image or the operation is stands in the way. An image that cannot be converted is a conflict as well, because az
		// shows the message of that at once, and tries what it does not know three times.
		p.status = http.StatusConflict
	}
	return p
}
