package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// registryFlags say how to reach registries.
type registryFlags struct {
	plainHTTP, insecure bool
}

func (f *registryFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.plainHTTP, "plain-http", false, "use plain HTTP where a registry has no HTTPS (loopback needs no flag)")
	cmd.Flags().BoolVar(&f.insecure, "insecure", false, "do not verify the registry's certificate")
}

// open opens the place that image is in, with credentials of login before docker's.
func (f *registryFlags) open(image string, login loginFlags) (converter.Place, string, error) {
	p, ref, err := converter.Open(image, converter.OpenOptions{Registry: converter.RegistryOptions{
		PlainHTTP: f.plainHTTP, Insecure: f.insecure, UserAgent: "streamctl/" + version(), Keychain: login.keychain(),
	}})
	if err != nil {
		return nil, "", usageError{err}
	}
	return p, ref, nil
}

// loginFlags are -u and -p.
type loginFlags struct{ username, password string }

func (f *loginFlags) add(cmd *cobra.Command, whose string) {
	cmd.Flags().StringVarP(&f.username, "username", "u", "", "user name for "+whose+" (`docker login` keeps it out of the command line)")
	cmd.Flags().StringVarP(&f.password, "password", "p", "", "password for it; - reads it from standard input")
}

// read replaces a password of - by the first line of standard input.
func (f *loginFlags) read(cmd *cobra.Command) error {
	if (f.username == "") != (f.password == "") {
		return usage("%s: -u and -p go together", cmd.Name())
	}
	if f.password != "-" {
		return nil
	}
	line, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if err != nil && (err != io.EOF || line == "") {
		return fmt.Errorf("password from standard input: %w", err)
	}
	f.password = strings.TrimRight(line, "\r\n")
	return nil
}

// keychain has the user name and password for every registry that is asked; nil without.
func (f loginFlags) keychain() authn.Keychain {
	if f.username == "" {
		return nil
	}
	return oneLogin{authn.FromConfig(authn.AuthConfig{Username: f.username, Password: f.password})}
}

type oneLogin struct{ authn.Authenticator }

func (l oneLogin) Resolve(authn.Resource) (authn.Authenticator, error) { return l.Authenticator, nil }

// hostFlags name a registry: -n, or the default one.
type hostFlags struct{ name, suffix string }

func (f *hostFlags) add(cmd *cobra.Command, of string) {
	cmd.Flags().StringVarP(&f.name, "name", "n", "", "registry of "+of+" (default: the one that `streamctl configure` keeps)")
	f.addSuffix(cmd)
}

func (f *hostFlags) addSuffix(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.suffix, "suffix", "", "tenant suffix of an Azure registry: -n REGISTRY --suffix TENANT is REGISTRY-TENANT.azurecr.io")
}

// host returns the registry's host.
func (f *hostFlags) host() (string, error) {
	name := f.name
	if name == "" {
		p, err := effective()
		if err != nil {
			return "", err
		}
		if name = p.Registry; name == "" {
			return "", usage("which registry? Give -n HOST, STREAMCTL_REGISTRY or `streamctl configure --registry HOST`")
		}
	}
	name = strings.TrimSuffix(name, "/")
	short := !strings.ContainsAny(name, ".:") && name != "localhost"
	switch {
	case f.suffix != "" && short:
		return name + "-" + f.suffix + ".azurecr.io", nil
	case f.suffix != "":
		return "", usage("--suffix %s: it belongs to the name of an Azure registry, and %s is a host", f.suffix, name)
	case short:
		// REGISTRY/REPO would be taken for a repository of Docker Hub.
		return "", usage("-n %s: give the registry's host, as in -n %s.azurecr.io", name, name)
	}
	return name, nil
}

// imageFlags name an image: REF, or -n REGISTRY -t REPO:TAG as with Azure's command line.
type imageFlags struct {
	registryFlags
	hostFlags
	loginFlags
	image     string
	platforms []string
}

func (f *imageFlags) add(cmd *cobra.Command) {
	f.hostFlags.add(cmd, "the image that --image names")
	cmd.Flags().StringVarP(&f.image, "image", "t", "", "image in the registry: REPO:TAG or REPO@DIGEST")
	f.addRest(cmd)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) > 1, len(args) == 1 && (f.name != "" || f.image != ""), len(args) == 0 && f.image == "" && f.name == "":
			return usage("%s takes one image: REF, or -n REGISTRY -t REPO:TAG", cmd.Name())
		case len(args) == 0 && f.image == "":
			return usage("%s: -n REGISTRY and -t REPO:TAG go together", cmd.Name())
		}
		return nil
	}
}

// addRest adds what is not about the image's name.
func (f *imageFlags) addRest(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.platforms, "platform", nil, "only this platform of an index, OS/ARCHITECTURE[/VARIANT] (repeatable)")
	f.loginFlags.add(cmd, "the registry")
	f.registryFlags.add(cmd)
}

// ref is the image's name as one string.
func (f *imageFlags) ref(args []string) (string, error) {
	if len(args) == 1 {
		return args[0], nil
	}
	host, err := f.host()
	return host + "/" + f.image, err
}

// open opens the place of the image, and returns the image's name there and the platforms asked for.
func (f *imageFlags) open(cmd *cobra.Command, args []string) (p converter.Place, ref string, platforms []ocispec.Platform, err error) {
	name, err := f.ref(args)
	if err != nil {
		return nil, "", nil, err
	}
	for _, s := range f.platforms {
		p, err := converter.ParsePlatform(s)
		if err != nil {
			return nil, "", nil, usageError{err}
		}
		platforms = append(platforms, p)
	}
	if err := f.read(cmd); err != nil {
		return nil, "", nil, err
	}
	p, ref, err = f.registryFlags.open(name, f.loginFlags)
	return p, ref, platforms, err
}

// outputFlag is -o.
type outputFlag string

func (f *outputFlag) add(cmd *cobra.Command) {
	*f = "table"
	cmd.Flags().VarP(f, "output", "o", "output: table or json")
}

func (f *outputFlag) String() string { return string(*f) }
func (f *outputFlag) Type() string   { return "FORMAT" }

func (f *outputFlag) Set(s string) error {
	if s != "table" && s != "json" {
		return usage("%q is neither table nor json", s)
	}
	*f = outputFlag(s)
	return nil
}

func (f outputFlag) json() bool { return f == "json" }

// profileFlag is --profile.
type profileFlag string

func (f *profileFlag) String() string { return string(*f) }
func (f *profileFlag) Type() string   { return "SOURCE" }

func (f *profileFlag) Set(s string) error {
	if s != "static" && s != "none" {
		return usage("%q is neither static nor none", s)
	}
	*f = profileFlag(s)
	return nil
}

// jobsFlag is --jobs.
type jobsFlag int

func (f *jobsFlag) add(cmd *cobra.Command) {
	cmd.Flags().Var(f, "jobs", "layers at once (default: one for each processor, two at least)")
}

func (f *jobsFlag) Type() string { return "N" }

func (f *jobsFlag) String() string {
	if *f == 0 {
		return ""
	}
	return strconv.Itoa(int(*f))
}

func (f *jobsFlag) Set(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return usage("%q is not a number from 1 on", s)
	}
	*f = jobsFlag(n)
	return nil
}

// sizeFlag is a number of bytes: "65536", "128KiB", "1MiB".
type sizeFlag int

func (f *sizeFlag) Type() string { return "SIZE" }

func (f *sizeFlag) String() string {
	b, _ := tomlfile.Size(*f).MarshalText() // cannot fail
	return string(b)
}

func (f *sizeFlag) Set(s string) error {
	n, err := tomlfile.ParseSize(s)
	if err != nil || n > artifact.MaxChunkSize || n < minChunkSize {
		return usage("%q is not a size from %d to %d bytes; KiB and MiB may follow", s, minChunkSize, artifact.MaxChunkSize)
	}
	*f = sizeFlag(n)
	return nil
}

// minChunkSize is the smallest that artifact encodes: a tar's block.
const minChunkSize = 512

// convertFlags say how to convert.
type convertFlags struct {
	jobs      jobsFlag
	chunkSize sizeFlag
	tempDir   string
	record    string
}

func (f *convertFlags) add(cmd *cobra.Command) {
	f.jobs.add(cmd)
	f.chunkSize = 128 << 10
	cmd.Flags().Var(&f.chunkSize, "chunk-size", "most bytes of tar in a chunk")
	cmd.Flags().StringVar(&f.tempDir, "temp-dir", os.TempDir(), "where converted layers wait for their push")
	cmd.Flags().StringVar(&f.record, "record", defaultRecord(), "directory that remembers layers converted before; \"\" for none")
}

// defaultRecord is in the user's cache directory, or nowhere if there is none.
func defaultRecord() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "streamctl")
}

func (f *convertFlags) options() converter.Options {
	o := converter.Options{
		Encode: artifact.EncodeOptions{ChunkSize: int(f.chunkSize)},
		Jobs:   int(f.jobs), TempDir: f.tempDir,
	}
	if f.record != "" {
		o.Record = converter.NewRecord(f.record)
	}
	return o
}
