package registryclient

import (
	"io"
	"net/http"
)

// metered counts requests and the bytes of their answers.
type metered struct {
	base http.RoundTripper
	m    *meter
	max  int64 // bytes of an answer that are read; 0 is all
}

func (t *metered) RoundTrip(req *http.Request) (*http.Response, error) {
	t.m.requests.Add(1)
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	b := &meteredBody{Reader: resp.Body, Closer: resp.Body, m: t.m}
	if t.max > 0 {
		b.Reader = io.LimitReader(resp.Body, t.max)
	}
	resp.Body = b
	return resp, nil
}

type meteredBody struct {
	io.Reader
	io.Closer
	m *meter
}

func (b *meteredBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.m.bytes.Add(int64(n))
	return n, err
}
