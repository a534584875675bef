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
	maxReferrersPage  = 4 << 20 // bytes: the size registries allow a manifest
	maxReferrersPages = 32
	maxReferrers      = 4096             // descriptors of the artifact types asked for
	noAPIFor          = 15 * time.Minute // before a host without the referrers API is asked for it again
)

// Referrers lists the referrers of subject of the given artifact types: referrers API first, then the referrers tag schema.
// None is an empty list, no error. One round trip; one more on first contact with a registry that has only the tag schema.
//
// A registry filters by one type at most, so the list of several types is taken out of the list of all.
//
// The registry's own answer is final; a mirror is believed only what it has. "None" is not remembered.
func (c *Client) Referrers(ctx context.Context, repo Repository, subject digest.Digest, artifactTypes ...string) ([]ocispec.Descriptor, error) {
	found, err := c.referrers(ctx, repo, subject, artifactTypes)
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s@%s: %w", repo, subject, err)
	}
	return found, nil
}

func (c *Client) referrers(ctx context.Context, repo Repository, subject digest.Digest, artifactTypes []string) ([]ocispec.Descriptor, error) {
	if err := subject.Validate(); err != nil {
		return nil, err
	}
	k, err := c.newCall(ctx, repo, canReferrers)
	if err != nil {
		return nil, err
	}
	defer k.end()
	var found []ocispec.Descriptor
	err = k.ask(func(h *host) error {
		var err error
		if found, err = k.referrersAt(h, subject, artifactTypes); err == nil && len(found) == 0 {
			err = ErrNotFound // so that the next host is asked
		}
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return found, err
}

// referrersAt asks one host. A host known to be without the API is asked for the tag first, and for the API only if there is no tag and this
// repository was never asked: one host name may stand for several registries.
func (k *call) referrersAt(h *host, subject digest.Digest, artifactTypes []string) ([]ocispec.Descriptor, error) {
	if h.lacksAPI("") {
		found, err := k.byTag(h, subject, artifactTypes)
		if !errors.Is(err, ErrNotFound) || h.lacksAPI(k.name) {
			return found, err
		}
		if found, ok, err := k.byAPI(h, subject, artifactTypes); ok || err != nil {
			return found, err
		}
		return nil, ErrNotFound
	}
	found, ok, err := k.byAPI(h, subject, artifactTypes)
	if ok || err != nil {
		return found, err
	}
	return k.byTag(h, subject, artifactTypes)
}

// byAPI follows the referrers API's pages. ok is false if the host does not have the API.
func (k *call) byAPI(h *host, subject digest.Digest, artifactTypes []string) (found []ocispec.Descriptor, ok bool, err error) {
	q := question{path: "referrers/" + subject.String(), accept: ocispec.MediaTypeImageIndex}
	if len(artifactTypes) == 1 {
		q.query = url.Values{"artifactType": artifactTypes}.Encode()
	}
	for range maxReferrersPages {
		header, b, err := k.read(h, q, maxReferrersPage)
		if lacks, certain := saysNoAPI(err); lacks {
			if certain {
				h.setLacksAPI(k.name)
			}
			return nil, false, nil
		}
		if err != nil {
			return nil, false, err
		}
		if t, _, err := mime.ParseMediaType(header.Get("Content-Type")); err != nil || t != ocispec.MediaTypeImageIndex {
			return nil, false, nil // some front page with status 200
		}
		page, err := parseReferrers(b, artifactTypes)
		if err != nil {
			return nil, false, fmt.Errorf("host %s: %w", h.Host, err)
		}
		found = append(found, page...)
		next, more := nextPage(header)
		if !more {
			return found, true, nil
		}
		if len(found) > maxReferrers {
			break
		}
		// Only the query is taken: the page is the same host's and the same list's.
		q.query = next
	}
	if len(found) > 0 {
		return found, true, nil
	}
	// Not "none": that would be a guess.
	return nil, false, refused("host %s: the list of referrers does not end after %d pages", h.Host, maxReferrersPages)
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
func (k *call) byTag(h *host, subject digest.Digest, artifactTypes []string) ([]ocispec.Descriptor, error) {
	tag := subject.Algorithm().String() + "-" + subject.Encoded()
	_, b, err := k.read(h, question{path: "manifests/" + tag, accept: ocispec.MediaTypeImageIndex}, maxReferrersPage)
	if err != nil {
		return nil, err
	}
	found, err := parseReferrers(b, artifactTypes)
	if err != nil {
		return nil, fmt.Errorf("host %s: tag %s: %w", h.Host, tag, err)
	}
	return found, nil
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
			if comma := strings.Index(rest, ",<"); comma >= 0 {
				params, v = rest[:comma], rest[comma+1:]
			} else if comma := strings.Index(rest, ", <"); comma >= 0 {
				params, v = rest[:comma], rest[comma+1:]
			} else {
				v = ""
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
