package main

import (
	"cmp"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

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
	if c.Kubeconfig != "" {
		list = append(list, credentials.NewKubernetes(c.Kubeconfig, c.node()))
	}
	if c.DockerConfig {
		list = append(list, credentials.NewDocker())
	}
	return list
}

// node returns the node's name as the kubelet has it.
func (c *config) node() string {
	if c.NodeName != "" {
		return c.NodeName
	}
	name, err := os.Hostname()
	if err != nil {
		slog.Warn("this machine has no name: set node_name in the configuration", "error", err)
	}
	return strings.ToLower(name)
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
