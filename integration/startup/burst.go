package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/lagproxy"
	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// burst is one start of an image on many nodes at once.
type burst struct {
	Image, System string
	Cached        bool      // by an nginx beside the nodes, which keeps slices of blobs
	Ready         []float64 // of each node, seconds since all began
	Requests      int       // that the registry was sent
	Bytes         int64     // that it has sent
}

const (
	burstNodes = 10
	// burstHost is the registry for every node: in the network namespace of each its own link to it.
	burstHost = "127.0.0.1:5000"
)

// uplink is what the registry gives to all nodes together.
func uplink() lagproxy.Link { return lagproxy.Link{Bandwidth: 1e9 / 8} }

// measureBurst starts image on ten nodes at once.
func measureBurst(ctx context.Context, o *origin, s *system, image string, cached bool) (b burst, err error) {
	b = burst{Image: image, System: s.Name, Cached: cached, Ready: make([]float64, burstNodes)}
	up, err := lagproxy.Listen("tcp", o.address, uplink())
	if err != nil {
		return b, err
	}
	defer up.Close()
	near, far := links()[0].Link, links()[1].Link
	target, l := up.Addr(), far
	if cached {
		way, err := lagproxy.Listen("tcp", up.Addr(), far)
		if err != nil {
			return b, err
		}
		defer way.Close()
		c, err := node.StartNginx(ctx, o.dir, o.certificate.CertFile, o.certificate.KeyFile, node.Upstream{Addr: way.Addr(), Name: node.CertificateName, CAFile: o.certificate.CAFile})
		if err != nil {
			return b, err
		}
		defer func() { err = errors.Join(err, c.Close()) }()
		target, l = c.Addr, near
	}
	var prepared, finished, ended sync.WaitGroup
	var at time.Time
	begin := make(chan struct{})
	errs := make([]error, burstNodes)
	prepared.Add(burstNodes)
	finished.Add(burstNodes)
	for i := range burstNodes {
		ended.Go(func() {
			isPrepared, isFinished := sync.OnceFunc(prepared.Done), sync.OnceFunc(finished.Done)
			defer isFinished()
			defer isPrepared()
			errs[i] = o.inNamespace(target, l, func() error {
				return o.onNode(ctx, s.node(o, &link{Host: burstHost}), func(ctx context.Context, n *node.Node) error {
					pod, err := n.RunSandbox(ctx)
					if err != nil {
						return err
					}
					isPrepared()
					<-begin
					ref := burstHost + "/" + s.repository(image) + ":latest"
					if err := n.Pull(ctx, ref); err != nil {
						return err
					}
					if err := startIn(ctx, pod, ref, image); err != nil {
						return err
					}
					b.Ready[i] = time.Since(at).Seconds()
					isFinished()
					finished.Wait() // the end of a node is work too
					return nil
				})
			})
		})
	}
	prepared.Wait()
	o.Reset()
	at = time.Now()
	close(begin)
	finished.Wait()
	for _, q := range o.Requests() {
		b.Requests++
		b.Bytes += q.Bytes
	}
	ended.Wait()
	return b, errors.Join(errs...)
}

// inNamespace calls f on a thread that is in a network namespace of its own, as is every process that f starts. Nothing is there but loopback, the link l to
// target, and the registry's front without a delay.
func (o *origin) inNamespace(target string, l lagproxy.Link, f func() error) error {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	far, err := lagproxy.ListenOn(burstHost, "tcp", target, l)
	if err != nil {
		return err
	}
	defer far.Close()
	plain, err := lagproxy.ListenOn(o.Host(), "tcp", o.Host(), lagproxy.Link{})
	if err != nil {
		return err
	}
	defer plain.Close()
	return f()
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	return nil
}
