package main

import (
	"context"
	"fmt"
	"time"
)

// mapsBelow is snapshot.Snapshotter.MapsBelow for the containerd at socket: before 2.3 it maps the IDs of the directory that all layers have in common, without what is mounted below it.
func mapsBelow(ctx context.Context, socket string) error {
	const hint = "with containerd before 2.3 the container would lack the files of these: upgrade it, give the image a streaming artifact and pull it again, or run it with the host's IDs (hostUsers: true)"
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	at := containerdReport{Address: socket}
	if _, err := at.ask(ctx); err != nil {
		return fmt.Errorf("%s; which one runs is not known, as nobody answers at %s (`cri_containerd`): %w", hint, socket, err)
	}
	if mapsBelowSince(at.Version) {
		return nil
	}
	return fmt.Errorf("%s; %s runs", hint, at.Version)
}

// mapsBelowSince reports whether this version of containerd is 2.3 or later. One that has no number is none.
func mapsBelowSince(version string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return major > 2 || major == 2 && minor >= 3
}
