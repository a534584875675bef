package converter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
)

// Referrer is a manifest that refers to an image or to one of its platform manifests.
type Referrer struct {
	Annotations  map[string]string `json:"annotations"`
	ArtifactType string            `json:"artifactType"`
	Digest       digest.Digest     `json:"digest"`
	MediaType    string            `json:"mediaType"`
	Size         int64             `json:"size"`
	Subject      digest.Digest     `json:"subject"`
	Platform     string            `json:"platform,omitempty"` // of the subject, if it is one of an index's
}

// ListReferrers lists the referrers of what ref names and, if that is an index, those of its manifests that are for one of
// the platforms (of all if platforms is empty). artifactType "" is any.
func ListReferrers(ctx context.Context, p Place, ref string, platforms []ocispec.Platform, artifactType string) ([]Referrer, error) {
	subjects, err := subjectsOf(ctx, p, ref, platforms)
	if err != nil {
		return nil, err
	}
	list := []Referrer{}
	for _, s := range subjects {
		got, err := p.Referrers(ctx, s.desc.Digest)
		if err != nil {
			return nil, fmt.Errorf("list referrers of %s: %w", s.desc.Digest, err)
		}
		for _, d := range got {
			if artifactType != "" && d.ArtifactType != artifactType {
				continue
			}
			r := Referrer{d.Annotations, d.ArtifactType, d.Digest, d.MediaType, d.Size, s.desc.Digest, ""}
			if s.platform != nil {
				r.Platform = platformString(*s.platform)
			}
			list = append(list, r)
		}
	}
	return list, nil
}

// subjectsOf returns what ref names and, if that is an index, its manifests for the wanted platforms.
func subjectsOf(ctx context.Context, p Place, ref string, want []ocispec.Platform) ([]found, error) {
	d, raw, err := p.Manifest(ctx, ref)
	if err != nil {
		return nil, resolveError(p, ref, err)
	}
	subjects := []found{{desc: d, raw: raw}}
	if !isIndex(d.MediaType) {
		return subjects, nil
	}
	all, err := manifestsOf(ctx, p, subjects[0])
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		if len(want) == 0 || f.platform != nil && wanted(want, *f.platform) {
			subjects = append(subjects, f)
		}
	}
	return subjects, nil
}

// Manifests returns the digest of what ref names and, if that is an index, those of its manifests.
func Manifests(ctx context.Context, p Place, ref string) ([]digest.Digest, error) {
	all, err := subjectsOf(ctx, p, ref, nil)
	var list []digest.Digest
	for _, f := range all {
		list = append(list, f.desc.Digest)
	}
	return list, err
}

// artifactsNamed returns the artifacts of the image that ref names, or the artifact that it names itself. None is
// ErrNotFound.
func artifactsNamed(ctx context.Context, p Place, ref string, want []ocispec.Platform) ([]attached, error) {
	subjects, err := subjectsOf(ctx, p, ref, want)
	if err != nil {
		return nil, err
	}
	if s := subjects[0]; s.desc.ArtifactType == artifact.ArtifactType {
		a := attached{desc: s.desc, raw: s.raw}
		a.manifest, a.err = artifact.DecodeManifest(s.raw)
		return []attached{a}, nil
	}
	var list []attached
	for _, s := range subjects {
		got, err := artifactsOf(ctx, p, s.desc.Digest)
		if err != nil {
			return nil, err
		}
		for _, a := range got {
			if len(want) == 0 || a.manifest != nil && wanted(want, a.manifest.Platform) {
				list = append(list, a)
			}
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: %s in %s has no streaming artifact (streamctl create makes one)", ErrNotFound, subjects[0].desc.Digest, p)
	}
	return list, nil
}

// DeleteArtifacts deletes the artifacts of the image that ref names, or the artifact that it names itself, and the profiles of
// what has no artifact any more, and their signatures; nothing else. It returns what it deleted, also with an error; one that is ErrNotOurs is told after the rest
// was deleted.
func DeleteArtifacts(ctx context.Context, p Place, ref string, platforms []ocispec.Platform) ([]digest.Digest, error) {
	list, err := artifactsNamed(ctx, p, ref, platforms)
	if err != nil {
		return nil, err
	}
	var deleted, subjects []digest.Digest
	var foreign error
	for _, a := range list {
		c, err := parseContent(a.raw)
		if a.raw != nil && err != nil {
			return deleted, fmt.Errorf("artifact %s: %w", a.desc.Digest, err)
		}
		var subject digest.Digest
		if c.Subject != nil {
			subject = c.Subject.Digest
			subjects = append(subjects, subject)
		}
		gone, err := deleteSigned(ctx, p, a.desc.Digest, subject)
		if deleted = append(deleted, gone...); errors.Is(err, ErrNotOurs) {
			foreign = cmp.Or(foreign, err)
		} else if err != nil {
			return deleted, fmt.Errorf("delete artifact %s: %w", a.desc.Digest, err)
		}
	}
	slices.Sort(subjects)
	for _, s := range slices.Compact(subjects) {
		gone, err := deleteProfilesAlone(ctx, p, s)
		if deleted = append(deleted, gone...); errors.Is(err, ErrNotOurs) {
			foreign = cmp.Or(foreign, err)
		} else if err != nil {
			return deleted, err
		}
	}
	return deleted, foreign
}

// deleteProfilesAlone deletes the profiles of subject if it has no artifact.
func deleteProfilesAlone(ctx context.Context, p Place, subject digest.Digest) (deleted []digest.Digest, err error) {
	list, err := p.Referrers(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s: %w", subject, err)
	}
	if slices.ContainsFunc(list, func(d ocispec.Descriptor) bool { return d.ArtifactType == artifact.ArtifactType }) {
		return nil, nil
	}
	return deleteOurs(ctx, p, subject, list)
}

// DeleteReferrers deletes the artifacts and profiles of subject, and their signatures, whether it is there itself or not, and nothing else that refers to it. It returns what it
// deleted, also with an error; one that is ErrNotOurs is told after the rest was deleted.
func DeleteReferrers(ctx context.Context, p Place, subject digest.Digest) (deleted []digest.Digest, err error) {
	list, err := p.Referrers(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s: %w", subject, err)
	}
	return deleteOurs(ctx, p, subject, list)
}

// deleteOurs deletes the artifacts and profiles among list, which refer to subject.
func deleteOurs(ctx context.Context, p Place, subject digest.Digest, list []ocispec.Descriptor) (deleted []digest.Digest, err error) {
	var foreign error
	for _, d := range list {
		if d.ArtifactType != artifact.ArtifactType && d.ArtifactType != artifact.ProfileType {
			continue
		}
		gone, err := deleteSigned(ctx, p, d.Digest, subject)
		if deleted = append(deleted, gone...); errors.Is(err, ErrNotOurs) {
			foreign = cmp.Or(foreign, err)
		} else if err != nil {
			return deleted, fmt.Errorf("delete %s, which refers to %s: %w", d.Digest, subject, err)
		}
	}
	return deleted, foreign
}
