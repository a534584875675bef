package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// DockerRegistry is Debian's docker-registry (distribution 2.8), which knows no referrers: the tag schema only.
type DockerRegistry struct {
	Socket  string // unix socket that it serves on
	process *process
}

// StartDockerRegistry runs docker-registry with its storage, socket and log in dir.
func StartDockerRegistry(ctx context.Context, dir string) (*DockerRegistry, error) {
	r := &DockerRegistry{Socket: filepath.Join(dir, "registry.sock")}
	os.Remove(r.Socket) // that of one that was killed
	config := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf(`version: 0.1
log: {accesslog: {disabled: true}, level: warn}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
http: {net: unix, addr: %s}
`, filepath.Join(dir, "registry"), r.Socket)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	p, err := start(dir, "docker-registry", "docker-registry", "serve", config)
	if err != nil {
		return nil, err
	}
	r.process = p
	if err := p.ready(ctx, func(context.Context) error { return dial(r.Socket) }); err != nil {
		p.kill()
		return nil, err
	}
	return r, nil
}

// Pause stops the process: it takes connections, and answers nothing.
func (r *DockerRegistry) Pause(ctx context.Context) error {
	pid := r.process.cmd.Process.Pid
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	return r.process.ready(ctx, func(context.Context) error { return stopped(pid) })
}

// Kill ends the registry as a crash would.
func (r *DockerRegistry) Kill() { r.process.kill() }

// Close ends the registry.
func (r *DockerRegistry) Close() error { return r.process.stop() }
