// Command stargz serves stargz-snapshotter's snapshotter, with its defaults, for `make bench-startup` to measure ours against: Debian's package has only
// the converter, and the project's own program is no Go module that could be fetched. It takes registry hosts from containerd's certs.d, because
// stargz-snapshotter's configuration cannot name a CA, and keeps what it reads there, with the connections, so that nothing is dialled twice.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: stargz SOCKET ROOT HOSTS_DIR")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

func serve(socket, root, hostsDir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	hosts := &registries{dir: hostsDir, known: map[string][]docker.RegistryHost{}}
	sn, err := service.NewStargzSnapshotterService(ctx, filepath.Clean(root), &service.Config{}, service.WithCustomRegistryHosts(hosts.of))
	if err != nil {
		return err
	}
	defer sn.Close()
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	defer context.AfterFunc(ctx, server.Stop)()
	return server.Serve(l)
}

type registries struct {
	dir string

	mu    sync.Mutex
	known map[string][]docker.RegistryHost
}

func (r *registries) of(ref reference.Spec) ([]docker.RegistryHost, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	name := ref.Hostname()
	if hosts, ok := r.known[name]; ok {
		return hosts, nil
	}
	hosts, err := config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(r.dir)})(name)
	if err == nil {
		r.known[name] = hosts
	}
	return hosts, err
}
