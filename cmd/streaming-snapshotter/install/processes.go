package install

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// process is one of this host.
type process struct {
	pid  int
	args []string
}

// processes lists those of this process's PID namespace: containers have others.
func processes() (list []process) {
	const ns = "/proc/%v/ns/pid"
	own, err := os.Readlink(fmt.Sprintf(ns, "self"))
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir("/proc") // without it there is no own
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if is, err := os.Readlink(fmt.Sprintf(ns, pid)); err == nil && is == own {
			list = append(list, process{pid, argumentsOf(pid)})
		}
	}
	return list
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

// proxied says of each kubelet of this host that has its image service at a socket that is ours where that is written.
func proxied(ours func(socket string) bool) (list []string) {
	for _, p := range processes() {
		endpoint, where := p.imageService()
		if endpoint != "" && ours(filepath.Clean(strings.TrimPrefix(endpoint, "unix://"))) {
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
		b, err := os.ReadFile(p.sees(file))
		if err == nil && yaml.Unmarshal(b, &c) == nil && c.ImageServiceEndpoint != "" {
			endpoint, where = c.ImageServiceEndpoint, "imageServiceEndpoint in "+file
		}
	}
	return endpoint, where
}

// sees returns where this process finds what p knows as path.
func (p process) sees(path string) string {
	if !filepath.IsAbs(path) {
		return fmt.Sprintf("/proc/%d/cwd/%s", p.pid, path)
	}
	return fmt.Sprintf("/proc/%d/root%s", p.pid, path)
}
