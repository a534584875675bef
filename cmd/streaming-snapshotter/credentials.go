package main

import (
	"cmp"
	"errors"
	"io"
	"path/filepath"

	"github.com/streaming-snapshotter/streaming-snapshotter/credentials"
	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
)

// sources are where credentials come from, in the order in which they are tried.
type sources []credentials.Source

// newSources returns those that are configured. cri is nil without the proxy of CRI.
func newSources(c config, cri *criproxy.Store) (list sources) {
	if c.Plugins != "" {
		list = append(list, credentials.NewPlugins(c.Plugins, cmp.Or(c.PluginDir, filepath.Dir(c.Plugins))))
	}
	if cri != nil {
		list = append(list, cri)
	}
	if c.DockerConfig {
		list = append(list, credentials.NewDocker())
	}
	return list
}

// close ends what runs for them.
func (list sources) close() error {
	var errs []error
	for _, s := range list {
		if c, ok := s.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
