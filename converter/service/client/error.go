package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// Error is what the server answered, or something between. errors.Is compares it with service's sentinel errors and with
// converter.ErrDifferent as the error that the service itself returned, and converter.CodeOf has the code of a conversion that could
// not be.
type Error struct {
	Status      int    // of HTTP
	Code        string // "UNAUTHORIZED", "DENIED", "NOT_FOUND", "ARTIFACT_EXISTS", "UNSUPPORTED_MEDIATYPE", ...; "" of what did not come from the service
	Message     string // for people
	Correlation string // id of the request in the server's log; "" if it had none
}

// Error is worded as az does it.
func (e *Error) Error() string {
	s := "Error: " + strings.TrimSuffix(e.Message, ".") + "."
	if e.Correlation != "" {
		s += " Correlation ID: " + e.Correlation + "."
	}
	return s
}

// Is says whether the error is target, one of service's or converter's.
func (e *Error) Is(target error) bool {
	if e.Code == "" {
		return target == service.ErrUnavailable && e.temporary()
	}
	return target == service.ErrorOf(e.Code)
}

// As gives the code of a conversion that could not be.
func (e *Error) As(target any) bool {
	t, ok := target.(**converter.Error)
	code := converter.Code(e.Code)
	if !ok || code.Message() == converter.Unknown.Message() {
		return false
	}
	*t = &converter.Error{Code: code, Err: errors.New(e.Message)}
	return true
}

// temporary says that the same request may be answered later.
func (e *Error) temporary() bool {
	return e.Status >= 500 || e.Status == http.StatusTooManyRequests || e.Status == http.StatusRequestTimeout
}

// body is an error as it is sent.
type errorBody struct {
	Errors []struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"errors"`
}

func errorOf(answer *http.Response) *Error {
	e := &Error{Status: answer.StatusCode, Correlation: answer.Header.Get("X-Ms-Correlation-Request-Id")}
	var b errorBody
	raw, err := io.ReadAll(io.LimitReader(answer.Body, maxError))
	if err == nil && json.Unmarshal(raw, &b) == nil && len(b.Errors) > 0 {
		e.Code, e.Message = b.Errors[0].Code, b.Errors[0].Message
		return e
	}
	asked := answer.Request.URL
	e.Message = fmt.Sprintf("%s answers %s with %q, and is not the conversion service: is the server's address right, and is a proxy in between?", asked.Host, answer.Status, answer.Header.Get("Content-Type"))
	if to := answer.Header.Get("Location"); to != "" {
		e.Message = fmt.Sprintf("%s redirects to %s: give that as the server", asked.Host, to)
	}
	return e
}
