package registryclient

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/plain"
)

// What an error of a Client is, for who has to decide: errors.Is tells. Beside ErrNotFound:
var (
	// ErrHosts: the hosts were asked, and none gave what was wanted. The others below are such errors, too; without one of them it is a failure that may pass:
	// no connection, silence, a status of 500.
	ErrHosts = errors.New("no host gave it")
	// ErrDenied: a host or its token server refuses the credentials, or the lack of them.
	ErrDenied = errors.New("access denied")
	// ErrBadAnswer: a host answered, to something else than what was asked or with what is no such thing.
	ErrBadAnswer = errors.New("wrong answer")
	// ErrMismatch: the bytes are not those of their digest. It is an ErrBadAnswer, too.
	ErrMismatch = errors.New("not the bytes of that digest")
)

// StatusError is an answer of a host that is no success. errors.Is(err, ErrNotFound) holds for 404, ErrDenied for 401 and 403.
type StatusError struct {
	StatusCode int
	Host       string // host:port that answered; not always the registry
	URL        string // without what may hold secrets: user and query, and the path where a redirect led elsewhere
	Message    string // the first error of the body, if it is one of the distribution specification's

	code       string        // of that error: "NAME_UNKNOWN"
	retryAfter time.Duration // what the answer asks for; 0 is nothing
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("GET %s: %d %s", e.URL, e.StatusCode, http.StatusText(e.StatusCode))
	if e.Message != "" {
		s += fmt.Sprintf(" (%s)", e.Message)
	}
	return s
}

// Is makes 404 an ErrNotFound, 401 and 403 an ErrDenied.
func (e *StatusError) Is(target error) bool {
	switch e.StatusCode {
	case http.StatusNotFound:
		return target == ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == ErrDenied
	}
	return false
}

// hostsError is what the hosts of a repository answered when none gave what was wanted.
type hostsError struct{ error }

func (e hostsError) Unwrap() error        { return e.error }
func (e hostsError) Is(target error) bool { return target == ErrHosts }

// Temporary reports whether the same request may succeed a little later.
func (e *StatusError) Temporary() bool {
	switch e.StatusCode {
	case http.StatusRequestTimeout, http.StatusTooManyRequests:
		return true
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return false
	}
	return e.StatusCode >= 500
}

const (
	maxErrorBody    = 8 << 10
	maxErrorMessage = 200
	maxErrorText    = 2000 // bytes of an error that shows what a host has sent
)

// newStatusError reads the beginning of the answer's body, and closes it after patience at the latest: who waits for a message would miss what other hosts
// answer.
func newStatusError(resp *http.Response, host, shown string, patience time.Duration) *StatusError {
	e := &StatusError{StatusCode: resp.StatusCode, Host: host, URL: shown}
	e.retryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
	var body struct {
		Errors []struct{ Code, Message string }
	}
	late := time.AfterFunc(patience, func() { resp.Body.Close() })
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // an error in an error adds nothing
	late.Stop()
	resp.Body.Close()
	if json.Unmarshal(b, &body) == nil && len(body.Errors) > 0 {
		e.code = body.Errors[0].Code
		e.Message = plain.Cut(strings.Trim(e.code+": "+body.Errors[0].Message, ": "), maxErrorMessage)
	}
	return e
}

// parseRetryAfter reads a Retry-After header, in seconds or as a date. 0 is none.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(t.Sub(now), 0)
	}
	return 0
}

// redact returns u without user, query and fragment.
func redact(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// refusedError is an answer that was understood and is wrong: asking the same host again is of no use.
type refusedError struct {
	msg  string
	kind error // ErrBadAnswer, ErrMismatch, ErrDenied
}

func (e *refusedError) Error() string { return e.msg }
func (e *refusedError) Is(target error) bool {
	return target == e.kind || target == ErrBadAnswer && e.kind == ErrMismatch
}

func refused(format string, a ...any) error { return refusedAs(ErrBadAnswer, format, a...) }

func refusedAs(kind error, format string, a ...any) error {
	return &refusedError{cut(fmt.Sprintf(format, a...)), kind}
}

// cut bounds a text that ends up in logs and may show a megabyte of an answer.
func cut(s string) string {
	if len(s) > maxErrorText {
		s = strings.ToValidUTF8(s[:maxErrorText], "") + "..."
	}
	return s
}

// mistakenError is an answer to something else than what was asked. Proxies give one now and then: asking the same host again may help.
type mistakenError struct {
	msg string
	why error // nil, or what kind
}

func (e *mistakenError) Error() string        { return e.msg }
func (e *mistakenError) Unwrap() error        { return e.why }
func (e *mistakenError) Is(target error) bool { return target == ErrBadAnswer }

func mistaken(format string, a ...any) error {
	err := fmt.Errorf(format, a...)
	return &mistakenError{cut(err.Error()), errors.Unwrap(err)}
}

// errSilent is the cause of a request that was given up because nothing came.
var errSilent = errors.New("nothing received for too long")

// temporary reports whether asking the same host again may help. In doubt it may.
func temporary(err error) bool {
	var (
		status *StatusError
		wrong  *refusedError
		cert   *tls.CertificateVerificationError
		record tls.RecordHeaderError
		op     *net.OpError
	)
	switch {
	case errors.As(err, &status):
		return status.Temporary()
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrDenied), errors.Is(err, http.ErrSchemeMismatch):
		return false
	case errors.As(err, &wrong), errors.As(err, &cert), errors.As(err, &record):
		return false
	case errors.As(err, &op) && op.Op == "remote error": // how crypto/tls reports an alert: no certificate, a wrong one
		return false
	}
	return true
}

// withoutURL takes the *url.Error off err: it prints the whole URL, the query with its signatures included.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
