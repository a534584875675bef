// Command replica is what tests of the conversion service run as processes of their own, to kill them: `replica nats` a NATS server,
// `replica serve` the service with what a client needs of its REST API. Both print the address that they listen on, on loopback, and
// run until SIGTERM.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/embedded"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "replica:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("want nats or serve")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	dir := flags.String("dir", "", "directory of the NATS server's store; serve: of one in the process")
	url := flags.String("nats", "", "serve: URL of the NATS server")
	registry := flags.String("registry", "", "serve: host of the registry")
	name := flags.String("name", "", "serve: of the process")
	lease := flags.Duration("lease", 3*time.Second, "serve: how long a process is not heard of until others go on")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if args[0] == "nats" {
		return serveNATS(ctx, *dir)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var conn *nats.Conn
	if *url != "" {
		c, err := nats.Connect(*url, nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true))
		if err != nil {
			return err
		}
		defer c.Close()
		conn = c
	} else {
		n, err := embedded.Start(ctx, *dir, log)
		if err != nil {
			return err
		}
		defer n.Close()
		conn = n.Conn
	}
	s, err := service.New(ctx, service.Config{
		Conn: conn, Sole: *url == "", Registries: []service.Registry{service.NewRegistry(*registry, converter.RegistryOptions{}, 0)}, Name: *name, Lease: *lease, Log: log,
	})
	if err != nil {
		return err
	}
	return serve(ctx, s, *registry)
}

func serveNATS(ctx context.Context, dir string) error {
	n, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: dir, NoSigs: true})
	if err != nil {
		return err
	}
	go n.Start()
	if !n.ReadyForConnections(time.Minute) {
		return errors.New("the NATS server does not start")
	}
	fmt.Println(n.ClientURL())
	<-ctx.Done()
	n.Shutdown()
	n.WaitForShutdown()
	return nil
}

func serve(ctx context.Context, s *service.Service, registry string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	h := &http.Server{Handler: handler(s, registry)}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Run(ctx) })
	g.Go(func() error {
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return h.Close()
	})
	return g.Wait()
}

// handler answers POST /acr/v1/REPOSITORY/_streaming/DIGEST and GET /acr/v1/REPOSITORY/_operations/ID[:cancel], but with operations as the
// service has them, and GET /v1/operations.
func handler(s *service.Service, registry string) http.Handler {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, value any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(value)
	}
	mux.HandleFunc("GET /v1/operations", func(w http.ResponseWriter, r *http.Request) {
		list, err := s.Operations(r.Context(), service.Filter{Limit: 1000})
		answer(w, list, err)
	})
	mux.HandleFunc("POST /acr/v1/", func(w http.ResponseWriter, r *http.Request) {
		rest := strings.TrimPrefix(r.URL.Path, "/acr/v1/")
		if repository, dgst, ok := strings.Cut(rest, "/_streaming/"); ok {
			op, _, err := s.Submit(r.Context(), service.Request{Image: service.Image{Registry: registry, Repository: repository, Digest: digest.Digest(dgst)}, By: "test"})
			answer(w, op, err)
			return
		}
		_, id, _ := strings.Cut(rest, "/_operations/")
		op, err := s.Cancel(r.Context(), strings.TrimSuffix(id, ":cancel"), "test")
		answer(w, op, err)
	})
	mux.HandleFunc("GET /acr/v1/", func(w http.ResponseWriter, r *http.Request) {
		_, id, _ := strings.Cut(r.URL.Path, "/_operations/")
		op, err := s.Operation(r.Context(), id)
		answer(w, op, err)
	})
	return mux
}
