package node

import (
	"context"
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
  proxy_cache_path DIR/cache levels=2 keys_zone=blobs:10m use_temp_path=off;
  upstream registry { server %[1]s; keepalive 32; }
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  server {
    listen %[2]s ssl;
    ssl_certificate %[3]s;
    ssl_certificate_key %[4]s;
    location / { proxy_pass https://registry; }
    location ~ /blobs/sha256: {
      slice 1m;
      proxy_cache blobs;
      proxy_cache_key $uri$slice_range;
      proxy_cache_lock on;
      proxy_cache_valid 200 206 1h;
      proxy_set_header Range $slice_range;
      proxy_pass https://registry;
    }
  }
}
`

// StartNginx runs an nginx with an empty cache before the registry at upstream, which speaks TLS. Its files are in a directory of its own below dir.
func StartNginx(ctx context.Context, dir, certFile, keyFile, upstream string) (*Nginx, error) {
	dir, err := os.MkdirTemp(dir, "nginx-*")
	if err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf(strings.ReplaceAll(nginxConfig, "DIR", dir), upstream, addr, certFile, keyFile)
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
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

// freeAddress returns a loopback address that nobody listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// Close ends nginx.
func (x *Nginx) Close() error { return x.process.stop() }
