package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// link is a way to the registry, with a host:port of its own.
type link struct {
	Name string `json:"name"`
	Host string `json:"-"`
	lagproxy.Link
	proxy *lagproxy.Proxy
}

// perConnection is what one connection gets of any link: what a cloud's registry gives.
const perConnection = 60 << 20

// links are the ones that the benchmark knows: within a zone, within a region, and far away.
func links() []*link {
	mbit := func(n int64) int64 { return n * 1e6 / 8 }
	of := func(rtt time.Duration, bandwidth int64) lagproxy.Link {
		return lagproxy.Link{RTT: rtt, Bandwidth: bandwidth, Connection: perConnection, SlowStart: true}
	}
	return []*link{
		{Name: "1ms", Link: of(time.Millisecond, mbit(1000))},
		{Name: "5ms", Link: of(5*time.Millisecond, mbit(500))},
		{Name: "50ms", Link: of(50*time.Millisecond, mbit(100))},
	}
}

func (l *link) String() string {
	return fmt.Sprintf("%v, %d Mbit/s", l.RTT, l.Bandwidth*8/1e6)
}

// origin is a registry with two fronts: plain HTTP without a delay for preparations, and TLS behind each of the links.
type origin struct {
	*registrytest.Registry
	dir         string
	certificate node.Certificate
	address     string // of the front with TLS, without a link
	server      *http.Server
	links       []*link
	served      chan error
}

// startOrigin runs the registry until close. Its blobs lie in memory, because they are what a registry's own disk or cache is no matter of ours.
func startOrigin(dir string, links []*link) (o *origin, err error) {
	blobs := filepath.Join(dir, "registry")
	if err := os.Mkdir(blobs, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", blobs, "tmpfs", 0, "size=16g"); err != nil {
		return nil, fmt.Errorf("mount tmpfs on %s: %w", blobs, err)
	}
	r, err := registrytest.Run(registrytest.Options{Dir: blobs, ClampRanges: true})
	if err != nil {
		return nil, err
	}
	o = &origin{
		Registry: r, dir: dir, links: links, served: make(chan error, 1),
	}
	if o.certificate, err = node.MakeCertificate(dir); err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(o.certificate.CertFile, o.certificate.KeyFile)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	o.address = l.Addr().String()
	o.server = &http.Server{Handler: r, ErrorLog: log.New(io.Discard, "", 0)} // daemons are killed in mid-connection
	// HTTP/1.1, as most of what serves layers speaks: each request in flight has a connection of its own, with its own slow start.
	tlsListener := tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}})
	go func() { o.served <- o.server.Serve(tlsListener) }()
	for _, k := range links {
		if k.proxy, err = lagproxy.Listen("tcp", o.address, k.Link); err != nil {
			return nil, errors.Join(err, o.close())
		}
		k.Host = k.proxy.Addr()
	}
	return o, nil
}

func (o *origin) close() error {
	var errs []error
	for _, k := range o.links {
		if k.proxy != nil {
			errs = append(errs, k.proxy.Close())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if o.server.Shutdown(ctx) != nil {
		errs = append(errs, o.server.Close())
	}
	if err := <-o.served; !errors.Is(err, http.ErrServerClosed) {
		errs = append(errs, err)
	}
	o.Registry.Close()
	return errors.Join(errs...)
}

// trust writes containerd's registry host configuration for all ways to the registry into certs.d.
func (o *origin) trust(hostsDir string) error {
	hosts := []string{burstHost}
	for _, k := range o.links {
		hosts = append(hosts, k.Host)
	}
	for _, host := range hosts {
		dir := filepath.Join(hostsDir, host)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		text := fmt.Sprintf("server = \"https://%s\"\nca = %q\n", host, o.certificate.CAFile)
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
