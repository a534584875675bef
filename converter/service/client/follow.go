package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

const (
	// silence is how long a stream may say nothing: three times what the server lets pass between two comments.
	silence   = 45 * time.Second
	firstWait = 100 * time.Millisecond // before a stream is asked for again; doubles
	lastWait  = 5 * time.Second
	maxEvent  = 16 << 20 // bytes
)

var errSilent = fmt.Errorf("%w: nothing was heard for %s", service.ErrUnavailable, silence)

// event is one that the server sent. A comment has no name.
type event struct {
	name string
	data []byte
}

// events asks q for a stream and gives each its events, and what else is heard, until each returns false or an error, or the stream
// ends, which is service.ErrUnavailable.
func (c *Client) events(ctx context.Context, q request, each func(event) (more bool, err error)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	q.accept = "text/event-stream"
	err := c.read(ctx, q, func(e event) (bool, error) {
		watchdog.Reset(silence)
		return each(e)
	})
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (c *Client) read(ctx context.Context, q request, each func(event) (bool, error)) error {
	answer, err := c.send(ctx, q)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, maxEvent)
	var e event
	for lines.Scan() {
		name, value, _ := bytes.Cut(lines.Bytes(), []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		var heard event
		switch {
		case len(lines.Bytes()) == 0: // ends an event
			heard, e = e, event{}
		case len(name) == 0: // a comment
		case string(name) == "event":
			e.name = string(value)
			continue
		case string(name) == "data":
			e.data = append(e.data, value...)
			continue
		default:
			continue
		}
		if heard.name == "error" {
			return eventError(heard.data, answer.Header.Get("X-Ms-Correlation-Request-Id"))
		}
		if more, err := each(heard); !more || err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return unreachable(ctx, err)
	}
	return fmt.Errorf("%w: %s ended the answer too early", service.ErrUnavailable, c.base)
}

// eventError is the error of an answer that had begun as one without.
func eventError(data []byte, correlation string) error {
	var b errorBody
	if err := json.Unmarshal(data, &b); err != nil || len(b.Errors) == 0 {
		return fmt.Errorf("%w: error event %q", service.ErrUnavailable, data)
	}
	return &Error{Code: b.Errors[0].Code, Message: b.Errors[0].Message, Correlation: correlation}
}

// Follow gives each the operation as it is, and again with every change (of several in a short time the last), and returns it when it
// has ended. It goes on when the connection breaks and when the server is restarted, as long as that takes less than
// Config.Patience. each may be nil; it is called in the caller's goroutine.
func (c *Client) Follow(ctx context.Context, id string, each func(service.Operation)) (service.Operation, error) {
	var op service.Operation
	var last []byte
	q := request{method: http.MethodGet, path: []string{"v1", "operations", id, "events"}}
	heard, wait := time.Now(), firstWait
	for {
		err := c.events(ctx, q, func(e event) (bool, error) {
			heard, wait = time.Now(), firstWait
			if e.name != "operation" || bytes.Equal(e.data, last) {
				return true, nil
			}
			var next service.Operation
			if err := json.Unmarshal(e.data, &next); err != nil {
				return false, fmt.Errorf("operation %s as %s has it: %w", id, c.base, err)
			}
			op, last = next, e.data
			if each != nil {
				each(op)
			}
			return !op.State.Ended(), nil
		})
		switch {
		case ctx.Err() != nil:
			return op, ctx.Err()
		case err == nil || !errors.Is(err, service.ErrUnavailable):
			return op, err
		case time.Since(heard) > c.config.Patience:
			return op, fmt.Errorf("operation %s goes on without being followed, nothing was heard of %s for %s: %w", id, c.base, c.config.Patience, err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return op, ctx.Err()
		}
		wait = min(2*wait, lastWait)
	}
}

// Verify reads the image and its artifacts whole at the server, for as long as that takes, and says what is proven of them. A
// difference is an error that is converter.ErrDifferent.
func (c *Client) Verify(ctx context.Context, i service.Image) ([]converter.Verified, error) {
	var answer struct{ Artifacts []converter.Verified }
	path := ofImage(i.Registry, i.Repository, i.Digest.String(), "_artifacts:verify")
	err := c.events(ctx, request{method: http.MethodPost, path: path}, func(e event) (bool, error) {
		if e.name != "verified" {
			return true, nil
		}
		return false, json.Unmarshal(e.data, &answer)
	})
	return answer.Artifacts, err
}
