package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Nginx is an nginx before a registry, which keeps slices of the blobs that it passes on.
type Nginx struct {
	Addr    string // of its TLS listener
	process *process
}

// nginxConfig is around the configuration in deploy/mirror, which is for a system's nginx.
const nginxConfig = `user root;
worker_processes 1;
daemon off;
pid DIR/pid;
error_log stderr warn;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/temp;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  include DIR/mirror.conf;
}
`

// Upstream is the registry before which an nginx is.
type Upstream struct {
	Addr   string // host and port, which speaks TLS
	Name   string // that its certificate is for
	CAFile string // to trust it
}

// StartNginx runs an nginx with an empty cache, as deploy/mirror configures it. Its files are in a directory of its own below dir. Its own certificate is certFile.
func StartNginx(ctx context.Context, dir, certFile, keyFile string, up Upstream) (*Nginx, error) {
	dir, err := os.MkdirTemp(dir, "nginx-*")
	if err != nil {
		return nil, err
	}
	addr, err := FreeAddress()
	if err != nil {
		return nil, err
	}
	root, err := Root()
	if err != nil {
		return nil, err
	}
	mirror, err := os.ReadFile(filepath.Join(root, "deploy/mirror/nginx.conf"))
	if err != nil {
		return nil, err
	}
	text := string(mirror)
	for _, r := range [][2]string{ // each is there. nginx takes no certificate for an address, so that of a store is also by name
		{"$proxy_host", up.Name},
		{"registry.example.com:443", up.Addr}, {"registry.example.com", up.Name}, {"/etc/ssl/certs/ca-certificates.crt", up.CAFile},
		{"listen 5443", "listen " + addr}, {"/etc/nginx/mirror.crt", certFile}, {"/etc/nginx/mirror.key", keyFile}, {"/var/cache/nginx", dir},
	} {
		if !strings.Contains(text, r[0]) {
			return nil, fmt.Errorf("deploy/mirror/nginx.conf has no %s", r[0])
		}
		text = strings.ReplaceAll(text, r[0], r[1])
	}
	config := filepath.Join(dir, "nginx.conf")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "mirror.conf"), []byte(text), 0o644), os.WriteFile(config, []byte(strings.ReplaceAll(nginxConfig, "DIR", dir)), 0o644)); err != nil {
		return nil, err
	}
	p, err := start(dir, "nginx", "nginx", "-p", dir, "-e", "stderr", "-c", config)
	if err != nil {
		return nil, err
	}
	if err := p.ready(ctx, func(context.Context) error {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	}); err != nil {
		p.kill()
		return nil, err
	}
	return &Nginx{addr, p}, nil
}

// Close ends nginx.
func (x *Nginx) Close() error { return x.process.stop() }
