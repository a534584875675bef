package converter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// IsReferrersTag says whether a tag is the list of a manifest's referrers (OCI distribution specification, "Referrers Tag Schema"), or
// what cosign attaches to a manifest by the tag's name ("sha256-....sig").
func IsReferrersTag(tag string) bool {
	algorithm, rest, ok := strings.Cut(tag, "-")
	hex, _, _ := strings.Cut(rest, ".")
	return ok && digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex).Validate() == nil
}

// imageTags sorts tags and leaves out those that name no images.
func imageTags(tags []string) []string {
	tags = slices.DeleteFunc(tags, IsReferrersTag)
	slices.Sort(tags)
	return slices.Compact(tags)
}

func (l *layout) Tags(context.Context) ([]string, error) {
	index, err := l.index()
	if err != nil {
		return nil, err
	}
	var tags []string
	for _, d := range index.Manifests {
		if name := d.Annotations[ocispec.AnnotationRefName]; name != "" {
			tags = append(tags, name)
		}
	}
	return imageTags(tags), nil
}

func (l *layout) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	d, _, err := l.Manifest(ctx, ref)
	return d, err
}

// Resolve asks with a HEAD. What that does not answer is asked again with a GET: some registries know no HEAD, others leave the digest
// out, and only a GET says why there is nothing.
func (r *registry) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	got, err := r.puller.Head(ctx, r.reference(ref))
	if err == nil {
		return ocispec.Descriptor{MediaType: string(got.MediaType), Digest: digest.Digest(got.Digest.String()), Size: got.Size}, nil
	}
	var te *transport.Error
	var ue *url.Error
	if ctx.Err() != nil || errors.As(err, &ue) ||
		errors.As(err, &te) && te.StatusCode != http.StatusNotFound && te.StatusCode != http.StatusMethodNotAllowed && te.StatusCode != http.StatusBadRequest {
		return ocispec.Descriptor{}, r.registryError(err)
	}
	d, _, err := r.Manifest(ctx, ref)
	return d, err
}

// Bounds on lists of names, which registries give in pages of this many, or of fewer if they like.
const (
	namesPage     = 1000
	maxNamesPages = 2000
)

func (r *registry) Tags(ctx context.Context) ([]string, error) {
	tags, err := listNames(func(path string) (*http.Response, error) { return r.get(ctx, path, http.Header{}, http.StatusOK) }, "tags/list")
	if err != nil {
		return nil, fmt.Errorf("list tags of %s: %w", r, err)
	}
	return imageTags(tags), nil
}

// listNames lists tags or repositories. Some registries cut the list off and link to no other page: what follows a full one is asked for.
func listNames(get func(path string) (*http.Response, error), kind string) (names []string, err error) {
	seen := map[string]bool{}
	for query := fmt.Sprintf("?n=%d", namesPage); ; query = fmt.Sprintf("?n=%d&last=%s", namesPage, url.QueryEscape(names[len(names)-1])) {
		before := len(names)
		err := pages(get, kind, query, maxNamesPages, func(_ *http.Response, raw []byte) (bool, error) {
			var page struct {
				Tags         []string `json:"tags"`
				Repositories []string `json:"repositories"`
			}
			err := decodePage(raw, &page)
			names = append(append(names, page.Tags...), page.Repositories...)
			return true, err
		})
		if err != nil {
			return nil, err
		}
		if len(names)-before < namesPage || seen[names[before]] { // the end, or a registry that does not know "last"
			return names, nil
		}
		for _, name := range names[before:] {
			seen[name] = true
		}
	}
}

// ErrNoCatalog: the registry does not say which repositories it has, to nobody or not to us.
var ErrNoCatalog = errors.New("the registry does not list its repositories")

// Catalog lists the repositories of the registry host, sorted. Registries may leave out what the credentials may not see.
func Catalog(ctx context.Context, host string, o RegistryOptions) ([]string, error) {
	p, _, err := openRegistry(host+"/catalog", o)
	if err != nil {
		return nil, err
	}
	r := p.(*registry)
	auth, err := authn.Resolve(ctx, r.keychain, r.repo.Registry)
	if err != nil {
		return nil, err
	}
	rt, err := transport.NewWithContext(ctx, r.repo.Registry, auth, transport.NewRetry(r.base), []string{r.repo.Registry.Scope(transport.PullScope)})
	if err != nil {
		return nil, catalogError(host, err)
	}
	get := func(path string) (*http.Response, error) {
		return r.send(ctx, &http.Client{Transport: rt}, path, http.Header{}, http.StatusOK)
	}
	names, err := listNames(get, "_catalog")
	if err != nil {
		return nil, catalogError(host, err)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func catalogError(host string, err error) error {
	err = fmt.Errorf("list repositories of %s: %w", host, err)
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
			return fmt.Errorf("%w: %w", ErrNoCatalog, err)
		}
	}
	return err
}

// pages gets the path kind+rest and then each page that an answer links to, until each wants no more or there is none: limit pages at
// most, because with its own links a registry could lead us in circles. Bodies are cut off a byte behind maxManifestSize.
func pages(get func(path string) (*http.Response, error), kind, rest string, limit int, each func(resp *http.Response, raw []byte) (more bool, err error)) error {
	next := kind + rest
	for range limit {
		resp, err := get(next)
		if err != nil {
			return err
		}
		raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifestSize+1))
		resp.Body.Close()
		if err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		more, err := each(resp, raw)
		if !more || err != nil {
			return err
		}
		if next = nextPage(resp, kind); next == "" {
			return nil
		}
	}
	return fmt.Errorf("more than %d pages", limit)
}

// decodePage decodes a page as pages read it.
func decodePage(raw []byte, page any) error {
	if len(raw) > maxManifestSize {
		return fmt.Errorf("a page of more than %d bytes", maxManifestSize)
	}
	return json.Unmarshal(raw, page)
}

// nextPage returns the path, from kind on, and the query that a Link header gives for the page after resp, or "".
func nextPage(resp *http.Response, kind string) string {
	target, params, ok := strings.Cut(resp.Header.Get("Link"), ">")
	target, begins := strings.CutPrefix(strings.TrimSpace(target), "<")
	if !ok || !begins || !strings.Contains(params, `rel="next"`) {
		return ""
	}
	u, err := resp.Request.URL.Parse(target)
	if err != nil || u.Host != resp.Request.URL.Host {
		return ""
	}
	i := strings.LastIndex(u.Path, "/"+kind)
	if i < 0 {
		return ""
	}
	return u.Path[i+1:] + "?" + u.RawQuery
}
