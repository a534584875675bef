package converter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// attachTries is how often the referrers tag is written anew when others who write it at the same time lose our entry:
// the tag is read, changed and written, and no registry we know makes that one step.
const attachTries = 5

func (r *registry) PutManifest(ctx context.Context, d ocispec.Descriptor, raw []byte, tag string) error {
	c, err := parseContent(raw)
	if err != nil {
		return err
	}
	ref := r.reference(d.Digest.String())
	if tag != "" {
		ref = r.repo.Tag(tag)
	}
	put := func() error { return r.registryError(r.pusher.Put(ctx, ref, manifest{raw, d.MediaType})) }
	if c.Subject == nil {
		return put()
	}
	api, err := r.referrersAPI(ctx, c.Subject.Digest)
	if err != nil {
		return err
	}
	if api {
		return put()
	}
	if err := put(); err != nil {
		// Registries refuse an index of manifests that are not there, so one manifest deleted without its entry in the
		// referrers tag would keep all others out for ever.
		if err := r.rewriteReferrersTag(ctx, c.Subject.Digest, ""); err != nil {
			return err
		}
		if err := put(); err != nil {
			return err
		}
	}
	for range attachTries {
		list, err := r.Referrers(ctx, c.Subject.Digest)
		if err != nil {
			return err
		}
		for _, l := range list {
			if l.Digest == d.Digest {
				return nil
			}
		}
		if err := put(); err != nil {
			return err
		}
	}
	return fmt.Errorf("referrers tag of %s: another writer removed our entry %d times; try again", c.Subject.Digest, attachTries)
}

// referrersAPI says whether the registry has the referrers API.
func (r *registry) referrersAPI(ctx context.Context, subject digest.Digest) (bool, error) {
	r.mu.Lock()
	known := r.hasAPI
	r.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	_, has, err := r.askReferrers(ctx, subject)
	return has, err
}

func (r *registry) Referrers(ctx context.Context, subject digest.Digest) ([]ocispec.Descriptor, error) {
	list, has, err := r.askReferrers(ctx, subject)
	if has || err != nil {
		return list, err
	}
	index, _, err := r.readReferrersTag(ctx, subject)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return index.Manifests, err
}

// maxPages is how many pages of referrers a manifest may have.
const maxPages = 100

// askReferrers reads all pages of the referrers API. A registry that does not have it answers in many ways; with it, the
// answer is an index.
func (r *registry) askReferrers(ctx context.Context, subject digest.Digest) (list []ocispec.Descriptor, has bool, err error) {
	get := func(path string) (*http.Response, error) {
		return r.get(ctx, path, http.Header{"Accept": {ocispec.MediaTypeImageIndex}},
			http.StatusOK, http.StatusNotFound, http.StatusBadRequest, http.StatusNotAcceptable, http.StatusMethodNotAllowed)
	}
	err = pages(get, "referrers/", subject.String(), maxPages, func(resp *http.Response, raw []byte) (bool, error) {
		mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		has = resp.StatusCode == http.StatusOK && mediaType == ocispec.MediaTypeImageIndex
		known := has // which is changed below, and by the next page
		r.mu.Lock()
		r.hasAPI = &known
		r.mu.Unlock()
		if !has {
			return false, nil
		}
		var page ocispec.Index
		err := decodePage(raw, &page)
		list = append(list, page.Manifests...)
		return true, err
	})
	if err != nil {
		return nil, false, fmt.Errorf("referrers of %s: %w", subject, err)
	}
	if !has {
		return nil, false, nil
	}
	return list, true, nil
}

// referrersTag is the tag that lists the referrers of subject where the API is missing (OCI distribution specification,
// "Referrers Tag Schema").
func referrersTag(subject digest.Digest) string {
	return strings.Replace(subject.String(), ":", "-", 1)
}

func (r *registry) readReferrersTag(ctx context.Context, subject digest.Digest) (index ocispec.Index, raw []byte, err error) {
	got, err := r.puller.Get(ctx, r.repo.Tag(referrersTag(subject)))
	if err != nil {
		return index, nil, r.registryError(err)
	}
	if err := json.Unmarshal(got.Manifest, &index); err != nil {
		return index, nil, fmt.Errorf("parse referrers tag of %s: %w", subject, err)
	}
	return index, got.Manifest, nil
}

// rewriteReferrersTag takes drop, and all that is gone from the repository, out of the referrers tag of subject.
func (r *registry) rewriteReferrersTag(ctx context.Context, subject, drop digest.Digest) error {
	index, old, err := r.readReferrersTag(ctx, subject)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	keep := []ocispec.Descriptor{}
	for _, d := range index.Manifests {
		if d.Digest == drop {
			continue
		}
		if _, err := r.puller.Head(ctx, r.repo.Digest(d.Digest.String())); err != nil {
			if err = r.registryError(err); errors.Is(err, ErrNotFound) {
				continue
			}
			return err
		}
		keep = append(keep, d)
	}
	if len(keep) == len(index.Manifests) {
		return nil
	}
	if len(keep) == 0 && drop != "" {
		// An empty list is the same as none, and not a tag that people see. Not all registries take a tag away with its manifest.
		if err := r.pusher.Delete(ctx, r.repo.Digest(digest.FromBytes(old).String())); err == nil {
			if _, err := r.puller.Head(ctx, r.repo.Tag(referrersTag(subject))); errors.Is(r.registryError(err), ErrNotFound) {
				return nil
			}
		}
	}
	index.Manifests = keep
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return r.registryError(r.pusher.Put(ctx, r.repo.Tag(referrersTag(subject)), manifest{raw, ocispec.MediaTypeImageIndex}))
}

func (r *registry) Delete(ctx context.Context, dgst, subject digest.Digest) error {
	detached := ""
	if subject != "" {
		api, err := r.referrersAPI(ctx, subject)
		if err != nil {
			return err
		}
		// The list first: an entry without a manifest costs every node a request in vain, a manifest without an entry costs nothing. Where the API is, a
		// list counts for nobody who reads; but notation's sign writes one all the same, and registries refuse the next with an entry that is gone.
		if err := r.rewriteReferrersTag(ctx, subject, dgst); err != nil && !api {
			return fmt.Errorf("take %s out of the referrers tag: %w", dgst, err)
		}
		if !api {
			detached = "it belongs to its image no more, but "
		}
	}
	err := r.pusher.Delete(ctx, r.repo.Digest(dgst.String()))
	var te *transport.Error
	if errors.As(err, &te) && te.StatusCode == http.StatusMethodNotAllowed {
		return fmt.Errorf("%s%s does not delete manifests (docker-registry does with REGISTRY_STORAGE_DELETE_ENABLED=true): %w", detached, r.repo.RegistryStr(), err)
	}
	return r.registryError(err)
}
