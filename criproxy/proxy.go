// Package criproxy stands between the kubelet and containerd's CRI socket, and remembers the credentials that the kubelet sends with a pull: containerd passes none
// to a snapshotter.
//
// The principle: the proxy knows no service. Whatever call comes, of today's CRI or a later one, its messages, metadata, deadline, end by the client, status with
// details and trailers go through as they are, in both directions. Of PullImage alone, a copy of the request and of the answer is looked at. What is found
// there, or goes wrong with it, changes nothing of the call.
//
// A credential serves its repository from the moment that the pull begins, because containerd asks the snapshotter during it, and for as long as a streamed image that was pulled with it is
// on the node: see Store. It never lets anybody pull: containerd resolves and authorises each pull with what came with it.
package criproxy

import (
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pulls is told of pulls. *Store is one. Its methods are called from many goroutines; a panic of theirs is caught.
type Pulls interface {
	// Begin is called with what the kubelet asks for, before containerd is asked. done is called once when the call has ended, with the image's ID
	// (digest of its config), "" if it came to nothing; it may be nil.
	Begin(r *runtime.PullImageRequest) (done func(id string))
}

// Proxy passes calls on to a gRPC server at a Unix socket.
type Proxy struct {
	up      *grpc.ClientConn
	server  *grpc.Server
	pulls   Pulls
	onPanic func(any)
	sending sync.WaitGroup // goroutines that pass on what clients send
}

// The wait before the server is dialled again: the kubelet's own is up to 3 s.
const maxBackOff = 300 * time.Millisecond

// New returns a Proxy to the socket at address, which need not be served yet: until it is, calls fail as they would there, with Unavailable. onPanic is told of what a method of pulls panicked with.
func New(address string, pulls Pulls, onPanic func(any)) (*Proxy, error) {
	p := &Proxy{pulls: pulls, onPanic: onPanic}
	var err error
	if p.up, err = grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		// The limits are those of both ends: CRI's clients and containerd have 16 MiB, which is configurable.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32), grpc.ForceCodecV2(raw{})),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: maxBackOff / 3, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackOff}, MinConnectTimeout: 5 * time.Second}),
	); err != nil {
		return nil, fmt.Errorf("CRI socket %s: %w", address, err)
	}
	p.server = grpc.NewServer(grpc.UnknownServiceHandler(p.handle), grpc.ForceServerCodecV2(raw{}), grpc.MaxRecvMsgSize(math.MaxInt32), grpc.MaxSendMsgSize(math.MaxInt32))
	return p, nil
}

// Serve answers at l, which it closes, until Stop.
func (p *Proxy) Serve(l net.Listener) error { return p.server.Serve(l) }

// Stop ends Serve. Calls in progress may go on until ctx ends.
func (p *Proxy) Stop(ctx context.Context) error {
	defer context.AfterFunc(ctx, p.server.Stop)()
	p.server.GracefulStop()
	p.sending.Wait()
	return p.up.Close()
}

// both are the directions of any call: a unary one is a stream with one message each way.
var both = &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

func (p *Proxy) handle(_ any, client grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(client)
	ctx, cancel := context.WithCancel(client.Context()) // with the client's deadline
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		md.Delete("grpc-accept-encoding") // is about one connection, and what comes over the other one is ours to decode
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	server, err := p.up.NewStream(ctx, both, method)
	if err != nil {
		return err
	}
	var w *pull
	if method == runtime.ImageService_PullImage_FullMethodName {
		w = &pull{proxy: p}
		defer w.end()
	}
	p.sending.Go(func() {
		for {
			var m message
			err := client.RecvMsg(&m)
			if err == io.EOF {
				server.CloseSend() // whatever fails here, server.RecvMsg says why
				return
			}
			if err != nil {
				cancel()
				return
			}
			if w.request(m); server.SendMsg(m) != nil {
				return
			}
		}
	})
	// A server that answers with a status alone sends no header.
	if header, err := server.Header(); err == nil && header != nil {
		if err := client.SendHeader(header); err != nil {
			return err
		}
	}
	for {
		var m message
		if err := server.RecvMsg(&m); err != nil {
			client.SetTrailer(server.Trailer())
			if err == io.EOF {
				w.succeeded()
				return nil
			}
			return err
		}
		w.answer(m)
		if err := client.SendMsg(m); err != nil {
			return err
		}
	}
}

// pull is a call of PullImage on its way. A nil *pull is another call.
type pull struct {
	proxy *Proxy

	mu    sync.Mutex // requests and answers come on goroutines of their own
	done  func(id string)
	id    string // in the answer, which counts once the call has succeeded
	ok    bool
	ended bool
}

func (w *pull) request(m message) {
	w.look(func() {
		r := &runtime.PullImageRequest{}
		if w.done == nil && !w.ended && proto.Unmarshal(m, r) == nil {
			w.done = w.proxy.pulls.Begin(r)
		}
	})
}

func (w *pull) answer(m message) {
	w.look(func() {
		r := &runtime.PullImageResponse{}
		if proto.Unmarshal(m, r) == nil {
			w.id = r.GetImageRef()
		}
	})
}

func (w *pull) succeeded() { w.look(func() { w.ok = true }) }

func (w *pull) end() {
	w.look(func() {
		w.ended = true
		switch {
		case w.done == nil:
		case w.ok:
			w.done(w.id)
		default:
			w.done("")
		}
	})
}

// look runs f, of which nothing can go wrong with the call.
func (w *pull) look(f func()) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() {
		if v := recover(); v != nil && w.proxy.onPanic != nil {
			w.proxy.onPanic(v)
		}
	}()
	f()
}

// message is one as it is on the wire.
type message []byte

// raw is the codec of messages that nobody decodes. Its name is that of the one in whose place it is, which goes on the wire.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.(message))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*message) = data.Materialize()
	return nil
}
