package converter

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"
)

// defaultStall is how long a registry may say nothing: neither the header of its answer, nor more of its body.
const defaultStall = time.Minute

// commitTime is how many times as long it may take to answer what was sent to it: large blobs are put together and hashed before a registry says that it
// has them.
const commitTime = 10

// patient ends requests that a registry accepts and does not answer, or not any more.
type patient struct {
	http.RoundTripper
	stall time.Duration
}

// stalled says that a registry said nothing. It is a net.Error.
type stalled struct {
	request string
	after   time.Duration
}

func (e *stalled) Error() string {
	return fmt.Sprintf("%s: the registry accepted the request, and has not said anything for %s", e.request, e.after)
}
func (e *stalled) Timeout() bool   { return true }
func (e *stalled) Temporary() bool { return false } // whoever asks waits long enough without the client's retries

func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	answer := p.stall
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		answer *= commitTime
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	silence := &stalled{req.Method + " " + req.URL.Scheme + "://" + req.URL.Host + req.URL.Path, answer}
	var answered atomic.Bool
	timer := time.AfterFunc(answer, func() {
		if !answered.Load() {
			cancel(silence)
		}
	})
	req = req.WithContext(ctx)
	if body := req.Body; body != nil && body != http.NoBody {
		watch := func(body io.ReadCloser) io.ReadCloser {
			return &progressing{body, func() { timer.Reset(answer) }}
		}
		req.Body = watch(body)
		if again := req.GetBody; again != nil {
			req.GetBody = func() (io.ReadCloser, error) {
				body, err := again()
				return watch(body), err
			}
		}
	}
	resp, err := p.RoundTripper.RoundTrip(req)
	answered.Store(true) // what is sent still, beside the answer, is of no importance
	timer.Stop()
	if err != nil {
		if context.Cause(ctx) == silence {
			err = silence
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &watched{resp.Body, ctx, cancel, &stalled{silence.request, p.stall}, p.stall}
	return resp, nil
}

// progressing is the body of a request; each read of it is a sign that the registry takes it.
type progressing struct {
	io.ReadCloser
	read func()
}

func (p *progressing) Read(b []byte) (int, error) {
	p.read()
	return p.ReadCloser.Read(b)
}

// watched is the body of an answer, of which more comes within stall whenever it is read.
type watched struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	silent *stalled
	stall  time.Duration
}

func (w *watched) Read(p []byte) (int, error) {
	timer := time.AfterFunc(w.stall, func() { w.cancel(w.silent) })
	n, err := w.ReadCloser.Read(p)
	timer.Stop()
	if err != nil && err != io.EOF && context.Cause(w.ctx) == w.silent {
		err = w.silent
	}
	return n, err
}

func (w *watched) Close() error {
	w.cancel(nil)
	return w.ReadCloser.Close()
}
