package registryclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// ErrNoRanges: the hosts send blobs from the start, whatever range they are asked for.
var ErrNoRanges = errors.New("ranges are ignored")

const (
	// maxSkip is how much of a blob is read to get at a range of it, from a host that sends all of it whatever it is asked; a read that is
	// continued may skip once more what it has had.
	maxSkip = 1 << 20
	// maxResend times maxSkip and the range is skipped in one read at most: a host that breaks off each time would send what is before again and again.
	maxResend = 8
	// maxMistakes is how many answers to something else a host may give in a row.
	maxMistakes = 4
)

// ReadRange returns exactly n bytes at off of blob dgst (not verified). The range must lie inside the blob. See cache.Blob for try.
//
// One ranged GET, as a rule; a body that breaks off is continued where it ended, from this host or the next, while the budget lasts. A try
// other than the first asks the hosts anew from the redirect on and begins with the next one, those that gave wrong bytes lately last; when all
// have had their turn (a single one, its second), after a pause that grows with try, until the pauses add up to the budget.
// The end of ctx ends the read, also of a body. The reader belongs to one goroutine and must be closed.
func (c *Client) ReadRange(ctx context.Context, repo Repository, dgst digest.Digest, off, n int64, try int) (io.ReadCloser, error) {
	r, err := c.readRange(ctx, repo, dgst, off, n, try)
	if err != nil {
		return nil, fmt.Errorf("read %d bytes at %d of blob %s@%s: %w", n, off, repo, dgst, err)
	}
	return r, nil
}

func (c *Client) readRange(ctx context.Context, repo Repository, dgst digest.Digest, off, n int64, try int) (io.ReadCloser, error) {
	if err := dgst.Validate(); err != nil {
		return nil, err
	}
	if off < 0 || n < 0 || off+n < off || try < 0 {
		return nil, fmt.Errorf("no such range")
	}
	k, err := c.newCall(ctx, repo, canPull)
	if err != nil {
		return nil, err
	}
	k.allow(c.o.Wait)
	k.reads = true
	if err := k.retry(dgst, try); err != nil {
		k.end()
		return nil, err
	}
	r := &rangeReader{k: k, dgst: dgst, off: off, left: n}
	if n > 0 {
		if err := r.open(); err != nil {
			k.end()
			return nil, err
		}
	}
	return r, nil
}

// retry prepares the call for a try to get what was wrong try times.
func (k *call) retry(dgst digest.Digest, try int) error {
	if try == 0 {
		return nil
	}
	k.turn = try % len(k.asked)
	for _, h := range k.asked {
		k.c.redirects.forget(redirectKey{h.host, k.name, dgst}, nil)
	}
	var pause time.Duration
	for i := max(len(k.asked), 2); i <= try; i++ {
		k.left -= pause
		if pause = min(max(2*pause, firstPause), maxPause); pause >= k.left {
			return fmt.Errorf("gave up after %v: the bytes were wrong %d times", k.budget, try)
		}
	}
	return k.pause(pause + rand.N(pause/4+1))
}

// rangeReader reads a range through as many answers as it takes.
type rangeReader struct {
	k    *call
	dgst digest.Digest
	off  int64
	left int64
	had  int64
	skip int64 // bytes that were skipped
	from *host
	body io.ReadCloser
	err  error

	answers []answer // so far, in order
}

// answer is what host gave, from off in the blob on.
type answer struct {
	host *host
	off  int64
}

func (r *rangeReader) Read(p []byte) (int, error) {
	for {
		switch {
		case r.err != nil:
			return 0, r.err
		case r.left == 0:
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		r.off += int64(n)
		r.left -= int64(n)
		r.had += int64(n)
		if r.left == 0 {
			r.from.worked()
			r.body.Close() // the caller may take its time to
		} else if err != nil {
			r.err = r.resume(err)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// resume opens the rest of the range after its body ended early.
func (r *rangeReader) resume(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	r.body.Close()
	if r.k.ctx.Err() != nil {
		return r.k.ended()
	}
	r.k.c.redirects.forget(redirectKey{r.from, r.k.name, r.dgst}, nil)
	for _, c := range r.k.asked {
		if c.host == r.from {
			r.k.failed(c, fmt.Errorf("host %s: blob breaks off at %d: %w", c.Host, r.off, err))
		}
	}
	return r.open()
}

func (r *rangeReader) open() error {
	q := question{path: "blobs/" + r.dgst.String(), blob: r.dgst, rng: fmt.Sprintf("bytes=%d-%d", r.off, r.off+r.left-1)}
	return r.k.ask(func(h *host) error {
		spare, resp, err := r.k.first(h, q)
		if err == nil && spare != nil {
			if err = r.accept(spare.host, resp); err == nil {
				return nil
			}
			r.k.failed(spare, err)
			resp, err = r.k.get(h, q)
		}
		if err != nil {
			return err
		}
		return r.accept(h, resp)
	})
}

// accept takes h's answer, if it is one to what was asked.
func (r *rangeReader) accept(h *host, resp *http.Response) error {
	if err := r.check(resp); err != nil {
		resp.Body.Close()
		r.k.c.redirects.forget(redirectKey{h, r.k.name, r.dgst}, nil)
		return fmt.Errorf("host %s: %w", h.Host, err)
	}
	r.from, r.body = h, resp.Body
	r.answers = append(r.answers, answer{h, r.off})
	return nil
}

// check makes sure that the body begins at off and is not known to be short.
func (r *rangeReader) check(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusPartialContent:
		return r.checkRange(resp)
	case http.StatusOK:
		if r.checkRange(resp) == nil {
			return nil // Dragonfly's proxy had this status for ranges, until June 2026
		}
		if resp.ContentLength >= 0 && resp.ContentLength < r.off+r.left {
			return mistaken("the blob has %d bytes and the range ends at %d", resp.ContentLength, r.off+r.left)
		}
		if r.off > r.had+maxSkip {
			return mistaken("%w, and %d bytes to skip are too many", ErrNoRanges, r.off)
		}
		if r.skip+r.off > maxResend*(maxSkip+r.had+r.left) {
			return mistaken("%w, and answers break off: %d bytes have come in vain", ErrNoRanges, r.skip)
		}
		r.k.skipping = true
		n, err := io.CopyN(io.Discard, resp.Body, r.off)
		r.k.skipping = false
		r.skip += n
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return mistaken("status %d in answer to a range", resp.StatusCode)
}

// checkRange makes sure that the header says the range that was asked for.
func (r *rangeReader) checkRange(resp *http.Response) error {
	first, last, err := parseContentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return mistaken("%v", err)
	}
	if first != r.off || last != r.off+r.left-1 {
		return mistaken("sent bytes %d-%d where %d-%d were asked for", first, last, r.off, r.off+r.left-1)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != r.left {
		return mistaken("content length %d of a range of %d bytes", resp.ContentLength, r.left)
	}
	return nil
}

// Wrong says that the n bytes at off of the blob, which were read, are not what its digest stands for: the host that gave them is asked after the others
// for a while. If several hosts did, nobody knows whose are wrong. It may be called after Close.
func (r *rangeReader) Wrong(off, n int64) {
	var of *host
	for i, a := range r.answers {
		end := r.off
		if i+1 < len(r.answers) {
			end = r.answers[i+1].off
		}
		if max(off, a.off) >= min(off+n, end) {
			continue
		}
		if of != nil && of != a.host {
			return
		}
		of = a.host
	}
	if of != nil {
		of.wrong("it gave bytes that are not those of their digest")
	}
}

// Close ends the read. It may be called before the end.
func (r *rangeReader) Close() error {
	if r.body != nil {
		r.body.Close() // what was not read may well not come: no error of the caller's
	}
	r.k.end()
	if r.err == nil && r.left > 0 {
		r.err = io.ErrClosedPipe
	}
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/SIZE", where SIZE may be "*" (RFC 9110, 14.4).
func parseContentRange(s string) (first, last int64, err error) {
	rest, ok := strings.CutPrefix(s, "bytes ")
	rng, size, ok2 := strings.Cut(rest, "/")
	a, b, ok3 := strings.Cut(rng, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, fmt.Errorf("content range %.80q is malformed", s)
	}
	f, err1 := strconv.ParseUint(a, 10, 63)
	l, err2 := strconv.ParseUint(b, 10, 63)
	if err1 != nil || err2 != nil || f > l {
		return 0, 0, fmt.Errorf("content range %.80q is malformed", s)
	}
	if size != "*" {
		if n, err := strconv.ParseUint(size, 10, 63); err != nil || l >= n {
			return 0, 0, fmt.Errorf("content range %.80q is malformed", s)
		}
	}
	return int64(f), int64(l), nil
}
