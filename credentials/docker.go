package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

const helperTimeout = 30 * time.Second

// Docker is docker's config.json with its credential helpers, or podman's auth.json where there is none. They are read at each lookup, so a new login is
// seen.
//
// go-containerregistry's reader of the same files waits for a helper as long as that takes, whatever the context.
type Docker struct {
	calls   *calls
	timeout time.Duration
}

// NewDocker returns a source of the first of these files that there is: config.json in $DOCKER_CONFIG or else ~/.docker, $REGISTRY_AUTH_FILE,
// containers/auth.json in $XDG_RUNTIME_DIR, .config/containers/auth.json in ~.
func NewDocker() *Docker { return &Docker{newCalls(), helperTimeout} }

// Close kills the helpers that are running.
func (s *Docker) Close() error {
	s.calls.close()
	return nil
}

// Name implements Source.
func (s *Docker) Name() string { return "docker config" }

// Lookup implements Source. What the file itself has comes after what a helper says.
func (s *Docker) Lookup(ctx context.Context, p registryclient.Place) (list []Login, err error) {
	var c struct {
		Auths       map[string]json.RawMessage `json:"auths"`
		CredHelpers map[string]string          `json:"credHelpers"`
		CredsStore  string                     `json:"credsStore"`
	}
	file, b, err := readFirst(dockerFiles())
	if err != nil || file == "" {
		return nil, err
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("%s is malformed: want JSON as `docker login` writes it", file) // the text of err may show some of a secret
	}
	all := parseAuths(c.Auths)
	var errs []error
	for _, image := range p.Names {
		host, _, _ := strings.Cut(string(image), "/")
		name, server := c.CredHelpers[host], host
		if host == "docker.io" {
			server = "https://" + dockerHub + "/v1/"
			if name == "" {
				name = c.CredHelpers[dockerHub]
			}
		}
		if name == "" {
			name = c.CredsStore
		}
		if name != "" {
			l, err := s.help(ctx, name, server)
			if err != nil {
				errs = append(errs, fmt.Errorf("docker-credential-%s: %w", name, err))
			} else if l.Secret != "" {
				list = append(list, l)
			}
		}
		own, err := all.lookup(image)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
		}
		list = append(list, own...)
	}
	return list, errors.Join(errs...)
}

// help asks a helper (docker-credential-helpers' protocol) for a server's login.
func (s *Docker) help(ctx context.Context, name, server string) (Login, error) {
	l, err := s.calls.once(ctx, name+" "+server, func(ctx context.Context) (any, error) {
		path, err := exec.LookPath("docker-credential-" + name)
		if err != nil {
			return Login{}, fmt.Errorf("%w of the daemon", errors.Unwrap(err)) // "executable file not found in $PATH"
		}
		b, err := program{path: path, args: []string{"get"}, timeout: s.timeout}.run(ctx, []byte(server))
		if err != nil {
			if said := strings.TrimSpace(string(b)); said == "credentials not found in native keychain" {
				return Login{}, nil
			}
			return Login{}, err
		}
		var r struct{ Username, Secret string }
		if json.Unmarshal(b, &r) != nil {
			return Login{}, errors.New("its answer is no JSON")
		}
		if r.Username == "<token>" {
			r.Username = ""
		}
		return Login{r.Username, r.Secret}, nil
	})
	if err != nil {
		return Login{}, err
	}
	return l.(Login), nil
}

func dockerFiles() (list []string) {
	home, err := os.UserHomeDir()
	if err != nil { // as in a unit of systemd
		if u, err := user.Current(); err == nil {
			home = u.HomeDir
		}
	}
	add := func(dir, name string) {
		if dir != "" {
			list = append(list, filepath.Join(dir, name))
		}
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		add(dir, "config.json")
	} else {
		add(home, ".docker/config.json")
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"), "")
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers/auth.json")
	add(home, ".config/containers/auth.json")
	return list
}

// readFirst reads the first file that there is; "" is none.
func readFirst(files []string) (file string, b []byte, err error) {
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return f, b, err
		}
	}
	return "", nil, nil
}
