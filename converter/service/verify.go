package service

import (
	"context"
	"fmt"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// Verify proves the artifacts of an image, as converter.Verify does: it reads them whole. Errors are also converter.ErrDifferent.
func (s *Service) Verify(ctx context.Context, i Image) ([]converter.Verified, error) {
	_, p, err := s.reach(i.Registry, i.Repository)
	if err != nil {
		return nil, err
	}
	if err := i.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %q: %w", ErrInvalid, i.Digest, err)
	}
	jobs, release, err := s.room.verify(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	done, err := converter.Verify(ctx, p, i.Digest.String(), converter.VerifyOptions{Jobs: jobs})
	return done, placeError(err)
}
