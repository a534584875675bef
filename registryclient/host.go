package registryclient

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
)

const (
	maxHops    = 5        // redirects of one request; blob stores take one or two
	maxAddress = 16 << 10 // bytes of where a redirect leads, which is remembered; signed ones have two or three thousand
)

// do sends q for repository name to h: authorized if it must be, and on along redirects. The answer is a success, or there is an error.
func (h *host) do(ctx context.Context, c *Client, name string, q question) (*http.Response, error) {
	key := redirectKey{h, name, q.blob}
	if to := c.redirects.get(key); to != nil {
		resp, err := h.send(ctx, c, to, q, "")
		if err == nil && resp.StatusCode/100 == 2 {
			return resp, nil
		}
		// Expired, most likely: the registry gives a new one.
		c.redirects.forget(key, to)
		if err == nil {
			resp.Body.Close()
		} else if ctx.Err() != nil {
			return nil, err
		}
	}
	g, err := h.auth.known(ctx, name, q.reads)
	if err != nil {
		return nil, err
	}
	var told *StatusError // to the caller: the first refusal of a credential, or of none if there is none, but not found before all
	again, bare := false, true
	for {
		resp, at, err := h.follow(ctx, c, name, q, g.header())
		if err != nil {
			return nil, err
		}
		ok := resp.StatusCode/100 == 2
		if ok || !h.owns(at) {
			h.auth.letIn(name, g)
		}
		if ok {
			if q.blob != "" && !h.owns(at) {
				c.redirects.put(key, at)
			}
			return resp, nil
		}
		answer := newStatusError(resp, at.Host, h.show(at), c.o.Stall)
		if !h.owns(at) || !isRefusal(answer.StatusCode) {
			return nil, answer
		}
		if bare || answer.StatusCode == http.StatusNotFound && told.StatusCode != http.StatusNotFound {
			told, bare = answer, g == nil
		}
		if h.auth.final(g, answer.StatusCode, again) {
			return nil, told
		}
		better, err := h.auth.better(ctx, name, &refusal{g, answer.StatusCode, resp.Header, again}, q.reads)
		again = g != nil
		var all *exhaustedError
		switch {
		case errors.As(err, &all) && told.StatusCode != http.StatusNotFound:
			return nil, fmt.Errorf("%w: %w", told, all)
		case err != nil && all == nil:
			return nil, err
		case better == nil:
			return nil, told
		}
		g = better
	}
}

// follow sends q to the host itself and goes where it is sent. The token goes nowhere but to the host, and not there either once it has been left.
func (h *host) follow(ctx context.Context, c *Client, name string, q question, token string) (resp *http.Response, at *url.URL, err error) {
	to := &url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join("/", h.Path, name, q.path), RawQuery: q.query}
	if h.ns != "" {
		v := to.Query()
		v.Set("ns", h.ns)
		to.RawQuery = v.Encode()
	}
	for hops := 0; ; hops++ {
		resp, err := h.send(ctx, c, to, q, token)
		if err != nil {
			return nil, nil, err
		}
		location := resp.Header.Get("Location")
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, to, nil
		}
		resp.Body.Close()
		next, err := to.Parse(location)
		switch {
		case err != nil || location == "" || next.Host == "":
			return nil, nil, refused("GET %s: redirect to nowhere", h.show(to))
		case next.Scheme != "https" && next.Scheme != "http":
			return nil, nil, refused("GET %s: redirect to scheme %q", h.show(to), next.Scheme)
		case to.Scheme == "https" && next.Scheme == "http":
			return nil, nil, refused("GET %s: redirect from https to http", h.show(to))
		case len(location) > maxAddress:
			return nil, nil, refused("GET %s: redirect to an address of %d bytes", h.show(to), len(location))
		case hops == maxHops:
			return nil, nil, refused("GET %s: more than %d redirects", h.show(to), maxHops)
		}
		if !h.owns(next) {
			token = ""
		}
		to = next
	}
}

// owns reports whether u is on the host itself, and so may see its credentials and headers.
func (h *host) owns(u *url.URL) bool { return u.Scheme == h.Scheme && u.Host == h.Host }

// show returns u for an error: without user and query, which may hold secrets, and of foreign places without the path, which may be one.
func (h *host) show(u *url.URL) string {
	if h.owns(u) {
		return redact(u)
	}
	return u.Scheme + "://" + u.Host + "/..."
}

// send sends one request and returns any answer to it.
func (h *host) send(ctx context.Context, c *Client, to *url.URL, q question, token string) (*http.Response, error) {
	req := (&http.Request{Method: http.MethodGet, URL: to, Host: to.Host, Header: http.Header{}}).WithContext(ctx)
	if h.owns(to) {
		for k, values := range h.Header {
			for _, v := range values {
				req.Header.Add(k, v)
			}
		}
	}
	if token != "" {
		req.Header.Set("Authorization", token)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", c.o.UserAgent)
	}
	if q.accept != "" {
		req.Header.Set("Accept", q.accept)
	}
	if q.rng != "" {
		req.Header.Set("Range", q.rng)
	}
	if h.contact(to) && q.spares != nil {
		h.dialSpares(ctx, q.spares, to)
	}
	resp, err := h.transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", h.show(to), err)
	}
	h.answeredBy(to, resp)
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		resp.Body.Close()
		return nil, refused("GET %s: content encoding %q where none was asked for", h.show(to), e)
	}
	return resp, nil
}
