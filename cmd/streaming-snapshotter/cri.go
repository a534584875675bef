package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"runtime/debug"
	"slices"

	"google.golang.org/grpc"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/fdstore"
	"github.com/streaming-snapshotter/streaming-snapshotter/criproxy"
)

// openCRI returns what pulls through the proxy of CRI have left, nil if there is no proxy: then that is removed.
func openCRI(c config) *criproxy.Store {
	o := criproxy.Options{File: filepath.Join(c.Root, "credentials"), Key: c.CRIKey, OnFile: logCredentials}
	if c.CRIProxy == "" {
		o.Key = ""
	}
	s := criproxy.Open(o)
	if c.CRIProxy == "" {
		return nil
	}
	return s
}

// logCredentials logs what happens to the file of credentials.
func logCredentials(err error) {
	ctx := about("the file of credentials")
	if err != nil {
		slog.WarnContext(ctx, "credentials that came with pulls through the CRI proxy", "error", err)
	} else {
		slog.InfoContext(ctx, "credentials are kept over a restart of the daemon again")
	}
}

// pulled lists the images that are streamed.
func (n *node) pulled() (list []criproxy.Image, err error) {
	origins, err := n.images.Origins()
	for _, o := range origins {
		list = append(list, criproxy.Image{Repository: o.Repository, ID: o.Config.String()})
	}
	return list, err
}

// serveCRI serves the proxy of CRI, if one is configured, until ctx ends or stop is called, which waits for the end. It is begun before anything else of the daemon, and needs nothing else of it: a node
// whose kubelet pulls through it pulls nothing without it.
func serveCRI(ctx context.Context, c config, pulls criproxy.Pulls, st *fdstore.Store) (stop func(), err error) {
	if c.CRIProxy == "" {
		if slices.Contains(st.KeptNames(), criSocket) { // a former life's: clients would wait there for ever
			err = errors.Join(removeSocket(criSocket, st), st.Drop(criSocket))
		}
		return func() {}, err
	}
	p, err := criproxy.New(c.Containerd, pulls, func(v any) { slog.Error("panic", "value", v, "stack", string(debug.Stack())) })
	if err != nil {
		return nil, err
	}
	l, err := listen(criSocket, c.CRIProxy, st)
	if err != nil {
		return nil, errors.Join(err, p.Stop(ctx))
	}
	slog.Info("CRI proxy", "address", c.CRIProxy, "containerd", c.Containerd)
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		err := p.Serve(l)
		if errors.Is(err, grpc.ErrServerStopped) {
			err = nil
		}
		ended <- err
	}()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		hurry, done := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer done()
		if err := errors.Join(p.Stop(hurry), <-ended); err != nil {
			slog.Error("CRI proxy: pulls through it were cut", "error", err)
		}
	}()
	return func() {
		cancel()
		<-stopped
	}, nil
}
