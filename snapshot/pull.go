package snapshot

import (
	"context"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/reason"
)

// Pull is a pull of an image, streamed or not.
type Pull struct {
	Image    string        // its reference; "" if containerd did not say
	Manifest digest.Digest // of the platform manifest; likewise
	Artifact string        // the digest's hex, of the artifact that is streamed; "" for a normal pull
	Err      error         // why it is not streamed; nil if it is. reason.Of tells the code
	At       time.Time
	Took     time.Duration // the search and the making of the snapshots; 0 for a normal pull
}

// fallback tells why an image is pulled in the normal way, once for each pull and reason: the other layers are told at debug level.
func (s *Snapshotter) fallback(l labels, why error) {
	const quiet = time.Minute // about a pull
	now := time.Now()
	code := reason.Of(why)
	k := l.ref + " " + string(l.manifest) + " " + string(code)
	level := slog.LevelInfo
	s.mu.Lock()
	for old, t := range s.told {
		if now.Sub(t) > quiet {
			delete(s.told, old)
		}
	}
	if _, again := s.told[k]; again {
		level = slog.LevelDebug
	} else {
		s.told[k] = now
	}
	s.mu.Unlock()
	s.log.Log(context.Background(), level, "normal pull", "image", l.ref, "manifest", l.manifest, "reason", code, "error", why)
	if level == slog.LevelInfo {
		s.onPull(Pull{Image: l.ref, Manifest: l.manifest, Err: why, At: now})
	}
}
