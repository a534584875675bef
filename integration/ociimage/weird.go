package ociimage

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Weird makes an image of what the image weird-files (integration/images) lacks: sparse members in each of the PAX formats that GNU tar writes,
// layers that are compressed with zstd or not at all, a layer that is there twice, empty attribute values, access lists and character device 0:0.
func Weird(ctx context.Context, dir string, guest []byte) (v1.Image, error) {
	base, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	layers := []v1.Layer{base}
	for i, format := range [][]string{
		{"--format=pax", "--sparse-version=0.0"},
		{"--format=pax", "--sparse-version=0.1"},
		{"--format=pax", "--sparse-version=1.0"},
	} {
		b, err := sparseTar(ctx, dir, fmt.Sprintf("sparse%d", i), format)
		if err != nil {
			return nil, err
		}
		l, err := layerOf(b, i)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	attributes, err := attributesTar()
	if err != nil {
		return nil, err
	}
	l, err := layerOf(attributes, 0)
	if err != nil {
		return nil, err
	}
	layers = append(layers, l, layers[1], l)
	return Image(v1.Config{Cmd: []string{"/guest", "sum", "/etc", "/sparse", "/sparse0", "/sparse1", "/sparse2", "/attr"}}, layers...)
}

// OldGNUSparse makes an image with sparse members of GNU tar's own format, type S, which containerd refuses to unpack.
func OldGNUSparse(ctx context.Context, dir string, guest []byte) (v1.Image, error) {
	base, err := guestLayer(dir, guest)
	if err != nil {
		return nil, err
	}
	b, err := sparseTar(ctx, dir, "sparse", []string{"--format=gnu"})
	if err != nil {
		return nil, err
	}
	l, err := layerOf(b, 0)
	if err != nil {
		return nil, err
	}
	return Image(v1.Config{Cmd: []string{"/guest", "sum", "/etc", "/sparse", "/sparse0", "/sparse1", "/sparse2", "/attr"}}, base, l)
}

// layerOf makes a layer of a tar: zstd, gzip or not compressed, by turns.
func layerOf(b []byte, turn int) (v1.Layer, error) {
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	switch turn % 3 {
	case 0:
		return tarball.LayerFromOpener(open, tarball.WithCompression(compression.ZStd), tarball.WithCompressionLevel(int(zstd.SpeedDefault)),
			tarball.WithMediaType(types.OCILayerZStd))
	case 1:
		return static.NewLayer(b, types.OCIUncompressedLayer), nil
	}
	return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer))
}

// sparseTar lets GNU tar archive files with holes, of sizes around its block sizes, under name. Fragments are found by content, so
// their bounds are multiples of 512 only.
func sparseTar(ctx context.Context, dir, name string, format []string) ([]byte, error) {
	sub := filepath.Join(dir, name)
	if err := os.MkdirAll(sub, 0o755); err != nil {
		return nil, err
	}
	source := rand.New(rand.NewPCG(9, 9))
	files := map[string]struct {
		size  int64
		holes int // data and holes by turns, of random length
	}{
		"all-hole":      {1 << 20, 0},
		"all-hole-odd":  {1<<20 + 1, 0},
		"empty":         {0, 0},
		"few":           {1 << 20, 3},
		"many":          {4 << 20, 200}, // more than one extension block of the GNU format
		"odd-end":       {300_001, 5},
		"below-a-block": {511, 1},
		"above-a-block": {513, 1},
		"large":         {64 << 20, 4},
	}
	for name, f := range files {
		if err := writeSparse(filepath.Join(sub, name), f.size, f.holes, source); err != nil {
			return nil, err
		}
	}
	args := append(format, "--sparse", "--hole-detection=raw", "--sort=name", "--owner=0", "--group=0", "--mtime=@1700000000", "-cf", "-", "-C", dir, name)
	c := exec.CommandContext(ctx, "tar", args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	b, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("tar %v: %w\n%s", format, err, errs.Bytes())
	}
	return b, nil
}

func writeSparse(name string, size int64, fragments int, source *rand.Rand) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for range fragments {
		n := min(size, 1+source.Int64N(9000))
		off := source.Int64N(size - n + 1)
		if _, err := f.WriteAt(random(source, int(n)), off); err != nil {
			return err
		}
	}
	return f.Truncate(size)
}

func attributesTar() ([]byte, error) {
	var b bytes.Buffer
	t := &Tar{Writer: tar.NewWriter(&b)}
	for _, e := range []struct {
		name     string
		typeflag byte
		xattrs   map[string]string
	}{
		{"attr/", tar.TypeDir, map[string]string{"system.posix_acl_access": acl(7), "system.posix_acl_default": acl(5), "user.empty": ""}},
		{"attr/empty-value", tar.TypeReg, map[string]string{"user.empty": "", "user.other": "x"}},
		{"attr/acl", tar.TypeReg, map[string]string{"system.posix_acl_access": acl(6)}},
		{"attr/capability", tar.TypeReg, map[string]string{"security.capability": capability()}},
		{"attr/trusted", tar.TypeReg, map[string]string{"trusted.dropped": "by containerd"}},
		{"attr/zero-device", tar.TypeChar, nil},
		{"attr/fifo", tar.TypeFifo, nil},
	} {
		h := tar.Header{Name: e.name, Typeflag: e.typeflag, Mode: 0o750, Format: tar.FormatPAX, PAXRecords: map[string]string{}}
		for k, v := range e.xattrs {
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := t.Put(h, nil); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), t.Close()
}

// acl is an access list with an entry for user 1000, as the kernel keeps it (include/uapi/linux/posix_acl_xattr.h).
func acl(perm uint16) string {
	const none = 0xffffffff
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, none}, {2, perm, 1000}, {4, 5, none}, {16, 7, none}, {32, 0, none}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// capability is cap_net_bind_service+ep, version 2 (include/uapi/linux/capability.h).
func capability() string {
	b := make([]byte, 20)
	binary.LittleEndian.PutUint32(b, 0x02000001)
	binary.LittleEndian.PutUint32(b[4:], 1<<10)
	return string(b)
}
