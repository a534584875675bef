// Package deploy is the files of this directory, as `streaming-snapshotter install` puts them on a host.
package deploy

import _ "embed" // the files

// The units of deploy/systemd.
var (
	//go:embed systemd/streaming-snapshotter.service
	Unit []byte
	//go:embed systemd/streaming-snapshotter-keeper.service
	KeeperUnit []byte
	// Systemd254 is a drop-in for Unit, in the place of KeeperUnit.
	//go:embed systemd/systemd-254.conf
	Systemd254 []byte
)
