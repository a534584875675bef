package stream

import (
	"context"
	"errors"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
	"github.com/streaming-snapshotter/streaming-snapshotter/fs/tree"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
)

// errImage: the image itself is not what an image has to be.
var errImage = errors.New("malformed image")

// codes are the codes of errors, the first that fits: what says more comes first. What the hosts' errors leave without one is a failure that may pass, and
// what is none of theirs is the node's.
var codes = []struct {
	is   error
	code reason.Code
}{
	{ErrQuarantined, reason.Tampered},
	{trust.ErrRevoked, reason.SignatureRevoked},
	{trust.ErrExpired, reason.SignatureExpired},
	{trust.ErrUntrusted, reason.SignatureUntrusted},
	{trust.ErrInvalid, reason.SignatureInvalid},
	{trust.ErrUnchecked, reason.SignatureUnchecked},
	{trust.ErrMissing, reason.SignatureMissing},
	{artifact.ErrUnsupported, reason.Unsupported},
	{tree.ErrRefused, reason.Content},
	{erofs.ErrUnsupported, reason.Content},
	{errImage, reason.Content},
	{artifact.ErrInvalid, reason.Damaged},
	{registryclient.ErrMismatch, reason.Damaged},
	{registryclient.ErrDenied, reason.Auth},
	{registryclient.ErrNotFound, reason.Incomplete},
	{registryclient.ErrBadAnswer, reason.BadAnswer},
	{registryclient.ErrHosts, reason.Unreachable},
	{context.DeadlineExceeded, reason.Timeout},
	{context.Canceled, reason.Stopping},
}

// WithReason gives an error of a search its code, or an error of what else was asked of the registry for one.
func WithReason(err error) error {
	for _, c := range codes {
		if errors.Is(err, c.is) {
			return reason.New(c.code, err)
		}
	}
	return reason.New(reason.NodeFailure, err)
}
