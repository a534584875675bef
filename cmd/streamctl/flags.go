package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/artifact"
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

func (f *registryFlags) open(image string) (converter.Place, string, error) {
	p, ref, err := converter.Open(image, converter.OpenOptions{Registry: converter.RegistryOptions{
		PlainHTTP: f.plainHTTP, Insecure: f.insecure, UserAgent: "streamctl/" + version(),
	}})
	if err != nil {
		return nil, "", usageError{err}
	}
	return p, ref, nil
}

// imageFlags name an image: REF, or -n REGISTRY -t REPO:TAG as with Azure's command line.
type imageFlags struct {
	registryFlags
	registry, image string
	platforms       []string
}

func (f *imageFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.registry, "name", "n", "", "registry of the image that --image names")
	cmd.Flags().StringVarP(&f.image, "image", "t", "", "image in the registry: REPO:TAG or REPO@DIGEST")
	cmd.Flags().StringArrayVar(&f.platforms, "platform", nil, "only this platform of an index, OS/ARCHITECTURE[/VARIANT] (repeatable)")
	f.registryFlags.add(cmd)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		named := f.registry != "" || f.image != ""
		switch {
		case len(args) > 1, len(args) == 1 && named, len(args) == 0 && !named:
			return usage("%s takes one image: REF, or -n REGISTRY -t REPO:TAG", cmd.Name())
		case named && (f.registry == "" || f.image == ""):
			return usage("%s: -n REGISTRY and -t REPO:TAG go together", cmd.Name())
		}
		return nil
	}
}

// ref is the image's name as one string.
func (f *imageFlags) ref(args []string) string {
	if len(args) == 1 {
		return args[0]
	}
	return strings.TrimSuffix(f.registry, "/") + "/" + f.image
}

// open opens the place of the image, and returns the image's name there and the platforms asked for.
func (f *imageFlags) open(args []string) (converter.Place, string, []ocispec.Platform, error) {
	if f.registry != "" && !strings.ContainsAny(f.registry, ".:") && f.registry != "localhost" {
		// REGISTRY/REPO would be taken for a repository of Docker Hub.
		return nil, "", nil, usage("-n %s: give the registry's host, as in -n %s.azurecr.io", f.registry, f.registry)
	}
	var platforms []ocispec.Platform
	for _, s := range f.platforms {
		p, err := converter.ParsePlatform(s)
		if err != nil {
			return nil, "", nil, usageError{err}
		}
		platforms = append(platforms, p)
	}
	p, ref, err := f.registryFlags.open(f.ref(args))
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
	switch n := int(*f); {
	case n != 0 && n%(1<<20) == 0:
		return strconv.Itoa(n>>20) + "MiB"
	case n != 0 && n%(1<<10) == 0:
		return strconv.Itoa(n>>10) + "KiB"
	default:
		return strconv.Itoa(n)
	}
}

func (f *sizeFlag) Set(s string) error {
	unit := 1
	num := s
	for suffix, u := range map[string]int{"KiB": 1 << 10, "MiB": 1 << 20} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			num, unit = n, u
		}
	}
	n, err := strconv.Atoi(num)
	if err != nil || n < 1 || n > artifact.MaxChunkSize/unit || n*unit < minChunkSize {
		return usage("%q is not a size from %d to %d bytes; KiB and MiB may follow", s, minChunkSize, artifact.MaxChunkSize)
	}
	*f = sizeFlag(n * unit)
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
