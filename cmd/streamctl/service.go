package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
)

// serviceFlags name the conversion service.
type serviceFlags struct {
	server, tokenFile, ca string
}

func (f *serviceFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.server, "server", "", "URL of the conversion service; \"\" for none")
	cmd.Flags().StringVar(&f.tokenFile, "token-file", "", "file of the token for it")
	cmd.Flags().StringVar(&f.ca, "server-ca", "", "PEM file of certificates to trust for it, beside the system's")
}

// client returns a client of the service that the flags, the environment or the defaults name; nil if they name none.
func (f *serviceFlags) client(cmd *cobra.Command) (*client.Client, error) {
	p, err := effective()
	if err != nil && !cmd.Flags().Changed("server") {
		return nil, err
	}
	if cmd.Flags().Changed("server") {
		p.Server = f.server
	}
	if cmd.Flags().Changed("server-ca") {
		p.ServerCA = f.ca
	}
	if p.Server == "" {
		return nil, nil
	}
	if err := checkServer(p.Server); err != nil {
		return nil, err
	}
	token := func() (string, error) { return readToken(p.TokenFile) }
	switch {
	case cmd.Flags().Changed("token-file"):
		token = func() (string, error) { return readToken(f.tokenFile) }
	case os.Getenv(tokenEnv) != "":
		token = func() (string, error) { return os.Getenv(tokenEnv), nil }
	}
	c, err := client.New(client.Config{Server: p.Server, CAFile: p.ServerCA, Agent: "streamctl/" + version(), Token: token})
	if err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

// need is client for commands that cannot do without.
func (f *serviceFlags) need(cmd *cobra.Command) (*client.Client, error) {
	c, err := f.client(cmd)
	if c == nil && err == nil {
		path := strings.TrimPrefix(cmd.CommandPath(), "streamctl ")
		return nil, usage("%s: this is what the conversion service knows: name it by --server URL, STREAMCTL_SERVER or `streamctl configure --server URL` (`streamctl serve` is one)", path)
	}
	return c, err
}

func checkServer(server string) error {
	if server == "" {
		return nil
	}
	if u, err := url.Parse(server); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return usage("server %q: want a URL, as in https://streaming.example.com", server)
	}
	return nil
}

// readToken reads a token, again for each request: whoever renews it replaces the file.
func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// here refuses flags that are about work in this process where a service does the work.
func here(cmd *cobra.Command, flags ...string) error {
	for _, f := range flags {
		if cmd.Flags().Changed(f) {
			return usage("%s: --%s is for work in this process, and the conversion service is named: leave it out, or give --server \"\"", cmd.Name(), f)
		}
	}
	return nil
}

// there refuses flags that are about the service where there is none.
func there(cmd *cobra.Command, flags ...string) error {
	for _, f := range flags {
		if cmd.Flags().Changed(f) {
			return usage("%s: --%s is for the conversion service: name it by --server URL, STREAMCTL_SERVER or `streamctl configure --server URL`", cmd.Name(), f)
		}
	}
	return nil
}

// azure is an error in Azure's words, which begin with a capital.
func azure(format string, args ...any) error { return fmt.Errorf(format, args...) }

// splitImage splits an image's name as it is known to the service.
func splitImage(image string) (registry, repository, ref string, err error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", "", "", usage("image name %q: %w", image, err)
	}
	ref = "latest"
	if t, ok := named.(reference.Tagged); ok {
		ref = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		ref = d.Digest().String()
	}
	return reference.Domain(named), reference.Path(named), ref, nil
}

// target is an image, and who does the work: the conversion service, or this process.
type target struct {
	imageFlags
	serviceFlags
}

func (t *target) add(cmd *cobra.Command) {
	t.imageFlags.add(cmd)
	t.serviceFlags.add(cmd)
}

// named is an image as the service knows it. Ref is its tag or digest.
type named struct{ name, registry, repository, ref string }

// tag is "" for an image that is named by its digest.
func (n named) tag() string {
	if strings.Contains(n.ref, ":") {
		return ""
	}
	return n.ref
}

// atService returns a client if the service does the work; hereOnly are the flags that it cannot heed. An OCI layout is in this machine's files: the service does not
// see it.
func (t *target) atService(cmd *cobra.Command, args []string, hereOnly ...string) (c *client.Client, n named, err error) {
	if len(args) == 1 && strings.HasPrefix(args[0], "oci:") {
		if t.server != "" {
			err = usage("%s %s: an OCI layout is worked on in this process: leave --server out", cmd.Name(), args[0])
		}
		return nil, n, err
	}
	if c, err = t.client(cmd); c == nil || err != nil {
		return nil, n, err
	}
	if err := here(cmd, append(hereOnly, "username", "password", "plain-http", "insecure")...); err != nil {
		return nil, n, err
	}
	n, err = t.named(args)
	return c, n, err
}

// named is the image that the flags name.
func (f *imageFlags) named(args []string) (n named, err error) {
	if n.name, err = f.ref(args); err != nil {
		return n, err
	}
	n.registry, n.repository, n.ref, err = splitImage(n.name)
	return n, err
}

// resolve asks the service for the digest.
func resolve(ctx context.Context, c *client.Client, n named) (service.Image, error) {
	img, err := c.Resolve(ctx, n.registry, n.repository, n.ref)
	if errors.Is(err, service.ErrNotFound) {
		err = azure("Could not find image '%s'. %w", n.name, err)
	}
	return img, err
}
