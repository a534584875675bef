package registryclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxReferrersPage  = 4 << 20          // bytes: the size registries allow a manifest
	maxReferrers      = 4096             // descriptors of the artifact types asked for
	noAPIFor          = 15 * time.Minute // before a host without the referrers API is asked for it again
	enoughPages       = 32               // that are read of a list which has what is looked for
	maxReferrersPages = 1024             // that are read to find it: as many round trips, so time is up before
	maxReferrersBytes = 32 << 20         // of all pages: 50,000 signatures
)

// Referrers lists the referrers of subject of the given artifact types: referrers API first, then the referrers tag schema.
// None is an empty list, no error. One round trip; one more on first contact with a registry that has only the tag schema.
//
// The first type is what is looked for: the list is the first host's that has one, with what the hosts before have of the other types. The
// registry's own answer is final; a mirror is believed only what it has. "None" is not remembered.
//
// A registry filters by one type at most, so the list of several types is taken out of the list of all, as long as that is one page.
func (c *Client) Referrers(ctx context.Context, repo Repository, subject digest.Digest, artifactTypes ...string) ([]ocispec.Descriptor, error) {
	l := &listing{subject: subject, types: artifactTypes, seen: map[digest.Digest]bool{}}
	err := c.referrers(ctx, repo, l)
	if err != nil && l.pages > 1 {
		err = fmt.Errorf("%w (so far %s)", err, l)
	}
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s@%s: %w", repo, subject, err)
	}
	return l.found, nil
}

// listing is what was found, and what that took, at all hosts.
type listing struct {
	subject digest.Digest
	types   []string // the first is what is looked for
	found   []ocispec.Descriptor
	seen    map[digest.Digest]bool
	pages   int
	bytes   int64 // of the pages
	has     bool  // one of the first type
}

// add takes what is new out of a page of n bytes.
func (l *listing) add(page []ocispec.Descriptor, n int) {
	l.pages++
	l.bytes += int64(n)
	for _, d := range page {
		if !l.seen[d.Digest] {
			l.seen[d.Digest] = true
			l.found = append(l.found, d)
			l.has = l.has || d.ArtifactType == l.types[0]
		}
	}
}

func (l *listing) String() string {
	s := fmt.Sprintf("%d pages with %d bytes of referrers", l.pages, l.bytes)
	if !l.has {
		s += " and no " + l.types[0] + " among them"
	}
	return s
}

func (c *Client) referrers(ctx context.Context, repo Repository, l *listing) error {
	if err := l.subject.Validate(); err != nil {
		return err
	}
	if len(l.types) == 0 {
		return errors.New("of no type")
	}
	k, err := c.newCall(ctx, repo, canReferrers)
	if err != nil {
		return err
	}
	defer k.end()
	err = k.ask(func(h *host) error {
		err := k.referrersAt(h, l)
		if err == nil && !l.has {
			err = ErrNotFound // so that the next host is asked
		}
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// errNoAPI: the host does not have the referrers API.
var errNoAPI = errors.New("no referrers API")

// referrersAt asks one host. A host known to be without the API is asked for the tag first, and for the API only if there is no tag and this
// repository was never asked: one host name may stand for several registries.
func (k *call) referrersAt(h *host, l *listing) error {
	if h.lacksAPI("") {
		err := k.byTag(h, l)
		if !errors.Is(err, ErrNotFound) || h.lacksAPI(k.name) {
			return err
		}
		if err := k.byAPI(h, l); err != errNoAPI {
			return err
		}
		return ErrNotFound
	}
	err := k.byAPI(h, l)
	if err == errNoAPI {
		err = k.byTag(h, l)
	}
	return err
}

// byAPI asks the referrers API. An image may have thousands of signatures: what has more than a page is asked for one type at a time, which is the
// same list again where the registry does not filter.
func (k *call) byAPI(h *host, l *listing) error {
	if len(l.types) > 1 {
		if _, more, err := k.pages(h, l, "", true); err != nil || !more {
			return err
		}
	}
	for _, t := range l.types {
		filtered, _, err := k.pages(h, l, url.Values{"artifactType": {t}}.Encode(), false)
		if err != nil || !filtered {
			return err
		}
	}
	return nil
}

// pages reads a list of referrers page by page, or one of them, and reports whether the registry has filtered it and whether there is more.
func (k *call) pages(h *host, l *listing, query string, one bool) (filtered, more bool, err error) {
	q := question{path: "referrers/" + l.subject.String(), query: query, accept: ocispec.MediaTypeImageIndex}
	for {
		header, b, err := k.read(h, q, maxReferrersPage)
		if lacks, certain := saysNoAPI(err); lacks {
			if certain {
				h.setLacksAPI(k.name)
			}
			return false, false, errNoAPI
		}
		if err != nil {
			return false, false, err
		}
		if t, _, err := mime.ParseMediaType(header.Get("Content-Type")); err != nil || t != ocispec.MediaTypeImageIndex {
			return false, false, errNoAPI // some front page with status 200
		}
		page, err := parseReferrers(b, l.types)
		if err != nil {
			return false, false, fmt.Errorf("host %s: %w", h.Host, err)
		}
		l.add(page, len(b))
		filtered = header.Get("OCI-Filters-Applied") != ""
		next, more := nextPage(header)
		full := len(l.found) > maxReferrers
		switch {
		case !more:
			return filtered, false, nil
		case one, l.has && (full || l.pages >= enoughPages):
			return filtered, true, nil
		case full || l.pages >= maxReferrersPages || l.bytes > maxReferrersBytes || next == q.query:
			// Not "none": that would be a guess.
			return false, false, refused("host %s: the list of referrers does not end", h.Host)
		}
		// Only the query is taken: the page is the same host's and the same list's.
		q.query = next
	}
}

// saysNoAPI tells whether err means that there is no referrers API. It is not certain where the registry speaks of the repository or the manifest:
// the API has to answer those with an empty list, but not all do.
func saysNoAPI(err error) (lacks, certain bool) {
	var status *StatusError
	if !errors.As(err, &status) {
		return false, false
	}
	switch status.StatusCode {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotAcceptable,
		http.StatusUnsupportedMediaType, http.StatusNotImplemented:
		return true, status.code != "NAME_UNKNOWN" && status.code != "MANIFEST_UNKNOWN"
	}
	return false, false
}

// byTag reads the index that the tag schema keeps under a tag made of the subject's digest.
func (k *call) byTag(h *host, l *listing) error {
	tag := l.subject.Algorithm().String() + "-" + l.subject.Encoded()
	_, b, err := k.read(h, question{path: "manifests/" + tag, accept: ocispec.MediaTypeImageIndex}, maxReferrersPage)
	if err != nil {
		return err
	}
	found, err := parseReferrers(b, l.types)
	if err != nil {
		return fmt.Errorf("host %s: tag %s: %w", h.Host, tag, err)
	}
	l.add(found, len(b))
	return nil
}

// parseReferrers returns the entries of an index that have one of the artifact types; those that cannot be fetched by what they say are left out.
// An entry that does not tell its type (old clients wrote such) is left out, too.
func parseReferrers(b []byte, artifactTypes []string) ([]ocispec.Descriptor, error) {
	var index struct {
		MediaType string       `json:"mediaType"`
		Manifests referrerList `json:"manifests"`
	}
	index.Manifests.artifactTypes = artifactTypes
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, refused("referrers are no index: %v", err)
	}
	if index.MediaType != "" && index.MediaType != ocispec.MediaTypeImageIndex {
		return nil, refused("referrers are of type %q", index.MediaType)
	}
	return index.Manifests.found, nil
}

// referrerList keeps what it decodes only if it is of the types: a page of empty descriptors would take a hundred times its size.
type referrerList struct {
	artifactTypes []string
	found         []ocispec.Descriptor
}

func (l *referrerList) UnmarshalJSON(b []byte) error {
	l.found = nil
	dec := json.NewDecoder(bytes.NewReader(b))
	switch t, err := dec.Token(); {
	case err != nil || t == nil:
		return err
	case t != json.Delim('['):
		return errors.New("manifests are no list")
	}
	var d ocispec.Descriptor
	for dec.More() {
		d = ocispec.Descriptor{}
		if err := dec.Decode(&d); err != nil {
			return err
		}
		if !slices.Contains(l.artifactTypes, d.ArtifactType) || d.ArtifactType == "" || d.Size < 0 || d.Digest.Validate() != nil {
			continue
		}
		if l.found = append(l.found, d); len(l.found) > maxReferrers {
			return fmt.Errorf("more than %d referrers of the types asked for", maxReferrers)
		}
	}
	return nil
}

// nextPage returns the query of the page that a Link header with rel="next" names (RFC 8288).
func nextPage(h http.Header) (query string, ok bool) {
	for _, v := range h.Values("Link") {
		for v != "" {
			open, end := strings.IndexByte(v, '<'), strings.IndexByte(v, '>')
			if open < 0 || end < open {
				break
			}
			target, rest := v[open+1:end], v[end+1:]
			params := rest
			v = ""
			for i := range len(rest) {
				if rest[i] == ',' && strings.HasPrefix(strings.TrimPrefix(rest[i+1:], " "), "<") {
					params, v = rest[:i], rest[i+1:]
					break
				}
			}
			if !hasRelNext(params) {
				continue
			}
			u, err := url.Parse(target)
			if err != nil || u.RawQuery == "" {
				return "", false
			}
			return u.RawQuery, true
		}
	}
	return "", false
}

func hasRelNext(params string) bool {
	for p := range strings.SplitSeq(params, ";") {
		k, v, _ := strings.Cut(strings.TrimSpace(p), "=")
		if strings.EqualFold(strings.TrimSpace(k), "rel") && strings.Trim(strings.TrimSpace(v), `"`) == "next" {
			return true
		}
	}
	return false
}

// lacksAPI tells whether the host has lately shown that it has no referrers API: for this repository, or for any if name is "".
func (h *host) lacksAPI(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Before(h.noAPI[name])
}

func (h *host) setLacksAPI(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	for k, till := range h.noAPI { // so that it does not grow with every repository there ever was
		if !now.Before(till) {
			delete(h.noAPI, k)
		}
	}
	h.noAPI[name], h.noAPI[""] = now.Add(noAPIFor), now.Add(noAPIFor)
}
