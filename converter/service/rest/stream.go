package rest

import (
	"context"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strings"
	"time"
)

const (
	eventStream = "text/event-stream"
	// silence is how long a stream says nothing: a quarter of what proxies commonly let a connection rest, a minute.
	silence = 15 * time.Second
	// streamLife bounds a followed operation, so that whose rights have ended does not follow for ever. Clients come back.
	streamLife = time.Hour
)

// stream sends server-sent events (WHATWG HTML, section 9.2).
type stream struct {
	w      http.ResponseWriter
	rc     *http.ResponseController
	ticker *time.Ticker
}

func accepts(r *http.Request, kind string) bool {
	for _, value := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(value, ",") {
			if t, _, err := mime.ParseMediaType(part); err == nil && t == kind {
				return true
			}
		}
	}
	return false
}

// stream begins the answer. The caller closes it.
func (c *call) stream() *stream {
	c.streamed = true
	c.w.Header().Set("Content-Type", eventStream)
	c.w.Header().Set("X-Accel-Buffering", "no") // nginx would hold it back
	s := &stream{w: c.w, rc: http.NewResponseController(c.w), ticker: time.NewTicker(silence)}
	c.w.WriteHeader(http.StatusOK)
	s.send("", nil)
	return s
}

// ticks come when something must be sent again; never, for no stream.
func (s *stream) ticks() <-chan time.Time {
	if s == nil {
		return nil
	}
	return s.ticker.C
}

// send sends an event, or for "" a comment. Who does not read it for some time is given up.
func (s *stream) send(event string, v any) error {
	line := ":\n\n"
	if event != "" {
		raw, err := json.Marshal(v)
		if err != nil {
			return err
		}
		line = fmt.Sprintf("event: %s\ndata: %s\n\n", event, raw)
	}
	// Not every http.ResponseWriter has deadlines; the server's own count then.
	_ = s.rc.SetWriteDeadline(time.Now().Add(2 * silence))
	if _, err := s.w.Write([]byte(line)); err != nil {
		return err
	}
	return s.rc.Flush()
}

// fail sends err as the answer to a plain request would have it.
func (s *stream) fail(err error) error {
	p := problemOf(err)
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	return s.send("error", map[string][]entry{"errors": {{p.code, p.message}}})
}

func (s *stream) close() {
	s.ticker.Stop()
	_ = s.rc.SetWriteDeadline(time.Time{}) // for the next request of the connection
}

// events sends the operation as it is, and again with each change, until it has ended.
func (c *call) events() (any, error) {
	ctx, cancel := context.WithTimeout(c.r.Context(), streamLife)
	defer cancel()
	changes, err := c.Watch(ctx, c.op.ID)
	if err != nil {
		return nil, err
	}
	s := c.stream()
	defer s.close()
	for {
		select {
		case op, ok := <-changes:
			if !ok {
				return nil, nil
			}
			if err := s.send("operation", op); err != nil || op.State.Ended() {
				return nil, err
			}
		case <-s.ticks():
			if err := s.send("", nil); err != nil {
				return nil, err
			}
		case <-c.config.Closing:
			return nil, nil
		}
	}
}
