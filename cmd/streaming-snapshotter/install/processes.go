package install

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"
)

// process is one of this host.
type process struct {
	pid  int
	args []string
}

// processes lists those that root itself runs on this host: what others, or a container, call a process, is not believed.
func processes() (list []process) {
	entries, _ := os.ReadDir("/proc") // without it there are none
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && hosts(pid) {
			list = append(list, process{pid, argumentsOf(pid)})
		}
	}
	return list
}

// hosts reports whether a process is of root, and of the same PID namespace and root directory as this one. Its mount namespace may be another: a unit of systemd has one of its own
// for PrivateTmp= and the like.
func hosts(pid int) bool {
	const ns = "/proc/%v/ns/pid"
	own, err := os.Readlink(fmt.Sprintf(ns, "self"))
	is, err2 := os.Readlink(fmt.Sprintf(ns, pid))
	root, err3 := os.Stat("/")
	at, err4 := os.Stat(fmt.Sprintf("/proc/%d/root/.", pid))
	if errors.Join(err, err2, err3, err4) != nil || is != own || !os.SameFile(at, root) {
		return false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n")
}

// argumentsOf returns the command line of a process, nil if there is none.
func argumentsOf(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// Argument returns the value that the process with this ID was given for an option of one of these names ("--config"), "" if for none. The last one counts.
func Argument(pid int, names ...string) string {
	return process{pid, argumentsOf(pid)}.option(names...)
}

func (p process) option(names ...string) (value string) {
	for i, a := range p.args {
		name, v, has := strings.Cut(a, "=")
		if !slices.Contains(names, name) {
			continue
		}
		if !has && i+1 < len(p.args) {
			v = p.args[i+1]
		}
		value = v
	}
	return value
}

// kubeletsAt says of each kubelet of this host that has its image service at one of some sockets where that is written.
func kubeletsAt(ours func(socket string) bool) (list []string) {
	for _, p := range processes() {
		endpoint, where := p.imageService()
		if socket := strings.TrimPrefix(endpoint, "unix://"); socket != "" && ours(filepath.Clean(socket)) {
			list = append(list, fmt.Sprintf("%s (process %d) has its image service at %s, by %s", filepath.Base(p.args[0]), p.pid, endpoint, where))
		}
	}
	return list
}

// imageService is what a kubelet's command line says, and else its configuration's files, the last of them that does.
func (p process) imageService() (endpoint, where string) {
	const option = "--image-service-endpoint"
	if endpoint = p.option(option); endpoint != "" {
		return endpoint, option
	}
	if len(p.args) == 0 || filepath.Base(p.args[0]) != "kubelet" {
		return "", ""
	}
	var files []string
	if file := p.option("--config"); file != "" {
		files = append(files, file)
	}
	if dir := p.option("--config-dir"); dir != "" {
		more, _ := filepath.Glob(p.sees(dir) + "/*.conf") // in order; a pattern that is none has no files
		for _, f := range more {
			files = append(files, filepath.Join(dir, filepath.Base(f)))
		}
	}
	for _, file := range files {
		var c struct{ ImageServiceEndpoint string }
		b, err := readSmall(p.sees(file))
		if err == nil && yaml.Unmarshal(b, &c) == nil && c.ImageServiceEndpoint != "" {
			endpoint, where = c.ImageServiceEndpoint, "imageServiceEndpoint in "+file
		}
	}
	return endpoint, where
}

// maxConfig is the size, in bytes, of the largest configuration of a kubelet that is read.
const maxConfig = 1 << 20

// readSmall reads a file of at most maxConfig bytes. It waits for nobody.
func readSmall(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && (!fi.Mode().IsRegular() || fi.Size() > maxConfig) {
		err = fmt.Errorf("%s: want a file of at most %d bytes", path, maxConfig)
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxConfig)) // it may grow meanwhile
}

// sees returns where this process finds what p knows as path.
func (p process) sees(path string) string {
	if !filepath.IsAbs(path) {
		return fmt.Sprintf("/proc/%d/cwd/%s", p.pid, path)
	}
	return fmt.Sprintf("/proc/%d/root%s", p.pid, path)
}
