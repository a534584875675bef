package criproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// containerd is a server with CRI's services, and others that no CRI has.
type containerd struct {
	runtime.UnimplementedImageServiceServer
	runtime.UnimplementedRuntimeServiceServer
	image  string // of ListImages and StreamImages
	events chan *runtime.ContainerEventResponse
	pull   func(context.Context, *runtime.PullImageRequest) (*runtime.PullImageResponse, error)
}

func (c *containerd) ListImages(ctx context.Context, r *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	return &runtime.ListImagesResponse{Images: []*runtime.Image{{Id: c.image, Username: r.GetFilter().GetImage().GetImage()}}}, nil
}

func (c *containerd) StreamImages(_ *runtime.StreamImagesRequest, s grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	for i := range 3 {
		if err := s.Send(&runtime.StreamImagesResponse{Images: []*runtime.Image{{Id: fmt.Sprint(c.image, i)}}}); err != nil {
			return err
		}
	}
	return nil
}

func (c *containerd) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	return c.pull(ctx, r)
}

func (c *containerd) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{RuntimeName: "test"}, nil
}

func (c *containerd) GetContainerEvents(_ *runtime.GetEventsRequest, s grpc.ServerStreamingServer[runtime.ContainerEventResponse]) error {
	for e := range c.events {
		if err := s.Send(e); err != nil {
			return err
		}
	}
	return nil
}

// serve serves at a socket until the test ends, or stop.
func serve(t *testing.T, address string, s *grpc.Server) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	stop = func() {
		s.Stop()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// proxied runs a Proxy to address until the test ends, and returns a connection to it.
func proxied(t *testing.T, address string, pulls Pulls, onPanic func(any)) *grpc.ClientConn {
	t.Helper()
	p, err := New(address, pulls, onPanic)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "p.sock")
	l, err := net.Listen("unix", own)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- p.Serve(l) }()
	conn := dial(t, own)
	t.Cleanup(func() {
		conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(p.Stop(ctx), <-served, ctx.Err()); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func dial(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(math.MaxInt32))) // as the kubelet
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func newContainerd(t *testing.T, c *containerd) (address string) {
	t.Helper()
	s := grpc.NewServer(grpc.MaxRecvMsgSize(16<<20), grpc.MaxSendMsgSize(16<<20)) // containerd's
	runtime.RegisterImageServiceServer(s, c)
	runtime.RegisterRuntimeServiceServer(s, c)
	address = filepath.Join(t.TempDir(), "c.sock")
	serve(t, address, s)
	return address
}

func TestServices(t *testing.T) {
	c := &containerd{image: strings.Repeat("i", 15<<20), events: make(chan *runtime.ContainerEventResponse)}
	conn := proxied(t, newContainerd(t, c), noPulls{}, nil)
	images, runtimes := runtime.NewImageServiceClient(conn), runtime.NewRuntimeServiceClient(conn)

	big := strings.Repeat("f", 15<<20) // more than gRPC's own limit of 4 MiB, and with the answer's more than CRI's
	_, err := images.ListImages(t.Context(), &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: big}}})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "trying to send message larger than max") {
		t.Errorf("the server's limit: got %v", err)
	}
	list, err := images.ListImages(t.Context(), &runtime.ListImagesRequest{})
	if err != nil || list.Images[0].Id != c.image {
		t.Errorf("ListImages of 15 MiB: %v", err)
	}
	c.image = "x"
	list, err = images.ListImages(t.Context(), &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: big}}})
	if err != nil || list.Images[0].Username != big {
		t.Errorf("ListImages with 15 MiB: %v", err)
	}
	_, err = images.ListImages(t.Context(), &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: big + big}}})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "received message larger than max") {
		t.Errorf("ListImages with 30 MiB: got %v, want the server's refusal", err)
	}
	stream, err := images.StreamImages(t.Context(), &runtime.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r.Images[0].Id)
	}
	if want := []string{"x0", "x1", "x2"}; !slices.Equal(got, want) {
		t.Errorf("StreamImages: got %q, want %q", got, want)
	}
	if v, err := runtimes.Version(t.Context(), &runtime.VersionRequest{}); err != nil || v.RuntimeName != "test" {
		t.Errorf("Version: %v, %v", v, err)
	}
	if _, err := images.ImageFsInfo(t.Context(), &runtime.ImageFsInfoRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a call that the server has not: got %v", err)
	}

	events, err := runtimes.GetContainerEvents(t.Context(), &runtime.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} { // each before the next is sent
		c.events <- &runtime.ContainerEventResponse{ContainerId: id}
		if e, err := events.Recv(); err != nil || e.ContainerId != id {
			t.Fatalf("event: %v, %v, want %s", e, err, id)
		}
	}
	close(c.events)
	if _, err := events.Recv(); err != io.EOF {
		t.Errorf("end of events: got %v", err)
	}
}

type noPulls struct{}

func (noPulls) Begin(*runtime.PullImageRequest) func(string) { return nil }

// future is a service of which the proxy knows nothing; f serves a call of it.
func future(t *testing.T, f func(method string, s grpc.ServerStream) error) *grpc.ClientConn {
	t.Helper()
	address := filepath.Join(t.TempDir(), "c.sock")
	serve(t, address, grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.MaxRecvMsgSize(16<<20), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		return f(method, s)
	})))
	return proxied(t, address, noPulls{}, nil)
}

func TestUnknownService(t *testing.T) {
	const method = "/future.v9.Things/Talk"
	conn := future(t, func(got string, s grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(s.Context())
		if got != method || !slices.Equal(md["ask"], []string{"1", "2"}) || md.Get("ask-bin")[0] != "\x00\xff" || md["grpc-accept-encoding"] != nil {
			return fmt.Errorf("method %s, metadata %v", got, md)
		}
		if err := s.SendHeader(metadata.Pairs("head", "h", "head-bin", "\xff\x00")); err != nil {
			return err
		}
		s.SetTrailer(metadata.Pairs("trail", "1", "trail", "2"))
		for {
			var m message
			if err := s.RecvMsg(&m); err == io.EOF {
				break
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(append(message("got "), m...)); err != nil {
				return err
			}
		}
		st, err := status.New(codes.DataLoss, "wörds\nand more").WithDetails(&runtime.ImageSpec{Image: "detail"})
		if err != nil {
			return err
		}
		return st.Err()
	})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "ask", "1", "ask", "2", "ask-bin", "\x00\xff", "grpc-accept-encoding", "x")
	s, err := conn.NewStream(ctx, both, method, grpc.ForceCodecV2(raw{}))
	if err != nil {
		t.Fatal(err)
	}
	header, err := s.Header() // before the first message
	if err != nil || header.Get("head")[0] != "h" || header.Get("head-bin")[0] != "\xff\x00" {
		t.Errorf("header %v, %v", header, err)
	}
	for _, text := range []string{"\xff not protobuf", "", strings.Repeat("x", 5<<20)} { // one after the other
		if err := s.SendMsg(message(text)); err != nil {
			t.Fatal(err)
		}
		var m message
		if err := s.RecvMsg(&m); err != nil || string(m) != "got "+text {
			t.Fatalf("got %.20q, %v, want %.20q", m, err, "got "+text)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	err = s.RecvMsg(&message{})
	st := status.Convert(err)
	if st.Code() != codes.DataLoss || st.Message() != "wörds\nand more" || len(st.Details()) != 1 || st.Details()[0].(*runtime.ImageSpec).Image != "detail" {
		t.Errorf("got %v with %v", err, st.Details())
	}
	if got := s.Trailer()["trail"]; !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("trailer %v", s.Trailer())
	}
}

// The deadline is the server's too, and it sees when the client leaves.
func TestDeadlineAndCancellation(t *testing.T) {
	type seen struct {
		deadline time.Time
		has      bool
	}
	begun, ended := make(chan seen, 1), make(chan error, 1)
	conn := future(t, func(_ string, s grpc.ServerStream) error {
		d, has := s.Context().Deadline()
		begun <- seen{d, has}
		<-s.Context().Done()
		ended <- s.Context().Err()
		return s.Context().Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	errs := make(chan error, 1)
	go func() {
		errs <- conn.Invoke(ctx, "/future.v9.Things/Wait", message("x"), &message{}, grpc.ForceCodecV2(raw{}))
	}()
	got := <-begun
	if want, _ := ctx.Deadline(); !got.has || got.deadline.Sub(want).Abs() > time.Minute {
		t.Errorf("the server's deadline: %v, %t, want %v", got.deadline, got.has, want)
	}
	cancel()
	if err := await(t, ended); err == nil {
		t.Error("the server was not told")
	}
	if err := await(t, errs); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}

	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := conn.Invoke(ctx, "/future.v9.Things/Wait", message("x"), &message{}, grpc.ForceCodecV2(raw{})); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	if got := <-begun; !got.has {
		t.Error("no deadline")
	}
	await(t, ended)
	go func() {
		errs <- conn.Invoke(t.Context(), "/future.v9.Things/Wait", message("x"), &message{}, grpc.ForceCodecV2(raw{}))
	}()
	if got := <-begun; got.has {
		t.Errorf("a deadline from nowhere: %v", got.deadline)
	}
	conn.Close() // which ends the third
	await(t, ended)
	await(t, errs)
}

func await[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatal("not within", patience)
	}
	return v
}

// Without containerd calls fail as without the proxy, and work once it is there, and there again.
func TestContainerdAway(t *testing.T) {
	address := filepath.Join(t.TempDir(), "c.sock")
	conn := proxied(t, address, noPulls{}, nil)
	client := runtime.NewRuntimeServiceClient(conn)
	_, want := runtime.NewRuntimeServiceClient(dial(t, address)).Version(t.Context(), &runtime.VersionRequest{})
	if _, err := client.Version(t.Context(), &runtime.VersionRequest{}); status.Code(err) != codes.Unavailable || err.Error() != want.Error() {
		t.Errorf("got  %v\nwant %v", err, want)
	}
	for range 2 {
		s := grpc.NewServer()
		runtime.RegisterRuntimeServiceServer(s, &containerd{})
		stop := serve(t, address, s)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		for {
			_, err := client.Version(ctx, &runtime.VersionRequest{})
			if err == nil {
				break
			}
			if status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		cancel()
		stop()
		if _, err := client.Version(t.Context(), &runtime.VersionRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("without containerd again: got %v", err)
		}
	}
}

// log is Pulls that writes down what it is told.
type log struct {
	mu    sync.Mutex
	lines []string
	ended chan string
	fail  bool
}

func (l *log) Begin(r *runtime.PullImageRequest) func(string) {
	l.add(fmt.Sprintf("%s %s:%s", r.GetImage().GetImage(), r.GetAuth().GetUsername(), r.GetAuth().GetPassword()))
	if l.fail {
		panic("begin")
	}
	return func(id string) {
		l.add("-> " + id)
		if l.ended != nil {
			l.ended <- id
		}
	}
}

func (l *log) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
}

func (l *log) want(t *testing.T, want ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(l.lines, want) {
		t.Errorf("got %q, want %q", l.lines, want)
	}
	l.lines = nil
}

func TestPullImage(t *testing.T) {
	pulls := &log{ended: make(chan string, 1)}
	c := &containerd{}
	client := runtime.NewImageServiceClient(proxied(t, newContainerd(t, c), pulls, func(v any) { pulls.add(fmt.Sprint("panic: ", v)) }))
	request := &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "r.example/a:v1"}, Auth: &runtime.AuthConfig{Username: "u", Password: "p"}}
	request.ProtoReflect().SetUnknown([]byte{0xa2, 0x06, 3, 'n', 'e', 'w'}) // field 100, of a later CRI
	c.pull = func(_ context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		if !proto.Equal(r, request) {
			return nil, fmt.Errorf("got %v with %x", r, r.ProtoReflect().GetUnknown())
		}
		pulls.want(t, "r.example/a:v1 u:p") // known before containerd asks a snapshotter
		return &runtime.PullImageResponse{ImageRef: "sha256:1"}, nil
	}
	if r, err := client.PullImage(t.Context(), request); err != nil || r.ImageRef != "sha256:1" {
		t.Errorf("got %v, %v", r, err)
	}
	await(t, pulls.ended)
	pulls.want(t, "-> sha256:1")

	// A fault of ours is none of the pull's.
	pulls.fail = true
	c.pull = func(context.Context, *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		return &runtime.PullImageResponse{ImageRef: "sha256:1"}, nil
	}
	if r, err := client.PullImage(t.Context(), request); err != nil || r.ImageRef != "sha256:1" {
		t.Errorf("got %v, %v", r, err)
	}
	pulls.want(t, "r.example/a:v1 u:p", "panic: begin")
	pulls.fail = false

	// Failed, and given up.
	c.pull = func(context.Context, *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		return nil, status.Error(codes.Unknown, "401 Unauthorized")
	}
	if _, err := client.PullImage(t.Context(), request); status.Code(err) != codes.Unknown || status.Convert(err).Message() != "401 Unauthorized" {
		t.Errorf("got %v", err)
	}
	await(t, pulls.ended)
	pulls.want(t, "r.example/a:v1 u:p", "-> ")
	ctx, cancel := context.WithCancel(t.Context())
	c.pull = func(ctx context.Context, _ *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		cancel()
		<-ctx.Done()
		return &runtime.PullImageResponse{ImageRef: "sha256:1"}, nil
	}
	if _, err := client.PullImage(ctx, request); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	await(t, pulls.ended)
	pulls.want(t, "r.example/a:v1 u:p", "-> ")
}

// What the proxy cannot read, or keep, reaches containerd as it is.
func TestPullImageUnreadable(t *testing.T) {
	var got message
	address := filepath.Join(t.TempDir(), "c.sock")
	serve(t, address, grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		if err := s.RecvMsg(&got); err != nil {
			return err
		}
		return s.SendMsg(message("\xff\xff"))
	})))
	pulls := &log{}
	conn := proxied(t, address, pulls, nil)
	for _, sent := range []message{message("\xff\xff\xff"), {}} {
		var answer message
		if err := conn.Invoke(t.Context(), runtime.ImageService_PullImage_FullMethodName, sent, &answer, grpc.ForceCodecV2(raw{})); err != nil || string(answer) != "\xff\xff" {
			t.Errorf("got %q, %v", answer, err)
		}
		if !bytes.Equal(got, sent) {
			t.Errorf("containerd got %q, want %q", got, sent)
		}
	}
}
