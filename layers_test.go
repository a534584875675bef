// Package layers keeps the layering of docs/design.md: lint that is a test needs no service.
package layers

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/streaming-snapshotter/streaming-snapshotter/"

const (
	fuse       = "github.com/hanwen/go-fuse"
	containerd = "github.com/containerd/containerd"
	client     = containerd + "/v2/client"
	ggcr       = "github.com/google/go-containerregistry"
	notary     = "github.com/notaryproject"
	oras       = "oras.land"
)

// layers says for each package which of ours it may import, and what it stays clear of.
var layers = map[string]struct{ ours, clearOf []string }{
	"artifact":                          {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"fs/erofs":                          {nil, []string{"net/http", containerd, fuse, ggcr}},
	"fs/tree":                           {[]string{"artifact", "fs/erofs", "fs/mapped"}, []string{"os", "net/http", containerd, fuse, ggcr}},
	"fs/mapped":                         {nil, []string{"net/http", containerd, fuse, ggcr}},
	"fs/cache":                          {[]string{"artifact", "fs/mapped"}, []string{"net/http", containerd, fuse, ggcr}},
	"fs":                                {[]string{"fs/erofs", "fs/mapped"}, []string{"net/http", containerd, ggcr}},
	"plain":                             {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"trust":                             {[]string{"artifact"}, []string{"os", "net/http", containerd, fuse, ggcr, notary, oras}},
	"trust/notary":                      {[]string{"plain", "trust"}, []string{containerd, fuse, ggcr}},
	"registryclient":                    {[]string{"plain"}, []string{client, fuse}},
	"kubeapi":                           {[]string{"plain"}, []string{containerd, fuse, ggcr}},
	"events":                            {[]string{"kubeapi", "registryclient"}, []string{"net/http", containerd, fuse, ggcr}},
	"credentials":                       {[]string{"kubeapi", "plain", "registryclient"}, []string{containerd, fuse, ggcr}},
	"criproxy":                          {[]string{"credentials", "registryclient"}, []string{"net/http", containerd, fuse, ggcr}},
	"snapshot":                          {[]string{"snapshot/reason"}, []string{"net/http", fuse, ggcr}},
	"snapshot/stream":                   {[]string{"artifact", "fs", "fs/cache", "fs/erofs", "fs/mapped", "fs/tree", "registryclient", "snapshot/ledger", "snapshot/reason", "snapshot/span", "trust"}, []string{"net/http", containerd, fuse, ggcr, notary, oras}},
	"snapshot/ledger":                   {nil, []string{"net/http", containerd, fuse, ggcr, notary, oras}},
	"snapshot/span":                     {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"snapshot/reason":                   {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"converter":                         {[]string{"artifact", "converter/startup", "fs/tree", "trust"}, []string{containerd, fuse}},
	"converter/service":                 {[]string{"artifact", "converter", "converter/service/starts", "plain", "trust"}, []string{containerd, fuse}},
	"converter/service/access":          {[]string{"converter/service"}, []string{containerd, fuse, ggcr}},
	"converter/service/client":          {[]string{"converter", "converter/service"}, []string{containerd, fuse, ggcr}},
	"converter/service/embedded":        {nil, []string{"net/http", containerd, fuse, ggcr}},
	"converter/service/rest":            {[]string{"artifact", "converter", "converter/service", "converter/service/access", "converter/service/starts"}, []string{containerd, fuse, ggcr}},
	"converter/service/starts":          {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"converter/service/webhook":         {[]string{"converter/service", "converter/service/access"}, []string{containerd, fuse, ggcr}},
	"converter/service/console":         {[]string{"converter", "converter/service", "converter/service/access"}, []string{"os", containerd, fuse, ggcr}},
	"converter/startup":                 {[]string{"fs/erofs"}, []string{"os", "net/http", containerd, fuse, ggcr}},
	"cmd/metrics":                       {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"cmd/tomlfile":                      {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"cmd/streamctl":                     {[]string{"artifact", "cmd/streamctl/serve", "cmd/tomlfile", "converter", "converter/service", "converter/service/client", "trust", "trust/notary"}, []string{containerd, fuse}},
	"cmd/streamctl/serve":               {[]string{"artifact", "cmd/metrics", "cmd/tomlfile", "converter", "converter/service", "converter/service/access", "converter/service/console", "converter/service/embedded", "converter/service/rest", "converter/service/webhook", "trust", "trust/notary"}, []string{containerd, fuse}},
	"cmd/streaming-snapshotter/blobs":   {nil, []string{"net/http", fuse, ggcr}},
	"cmd/streaming-snapshotter/fdstore": {nil, []string{"net/http", containerd, fuse, ggcr}},
	"cmd/streaming-snapshotter/report":  {[]string{"converter/service/starts", "plain", "registryclient"}, []string{containerd, fuse, ggcr}},
	"cmd/streaming-snapshotter/traps":   {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"cmd/streaming-snapshotter/install": {[]string{"cmd/streaming-snapshotter/blobs", "cmd/streaming-snapshotter/traps", "deploy"}, []string{"net/http", fuse, ggcr}},
	"deploy/image":                      {nil, []string{containerd, fuse}},
	"deploy":                            {nil, []string{"os", "net/http", containerd, fuse, ggcr}},
	"cmd/streaming-snapshotter":         {[]string{"cmd/metrics", "cmd/streaming-snapshotter/blobs", "cmd/streaming-snapshotter/fdstore", "cmd/streaming-snapshotter/install", "cmd/streaming-snapshotter/report", "cmd/streaming-snapshotter/traps", "cmd/tomlfile", "converter/service/starts", "credentials", "criproxy", "events", "fs", "fs/cache", "kubeapi", "plain", "registryclient", "snapshot", "snapshot/ledger", "snapshot/reason", "snapshot/span", "snapshot/stream", "trust", "trust/notary"}, []string{ggcr}},
	"converter/service/access/oidctest": {nil, nil},
	"fs/erofs/erofstest":                {[]string{"fs/erofs"}, nil},
	"kubeapi/kubeapitest":               {nil, nil},
	"registryclient/registrytest":       {nil, nil},
	"trust/trusttest":                   {[]string{"trust", "trust/notary"}, nil},
}

func TestImports(t *testing.T) {
	for _, file := range sources(t) {
		dir := filepath.Dir(file)
		if strings.HasPrefix(dir, "integration") {
			continue // sees everything
		}
		layer, known := layers[dir]
		if !known {
			t.Errorf("%s is in no layer: say in layers_test.go and docs/design.md where it belongs", file)
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range f.Imports {
			path := strings.Trim(spec.Path.Value, `"`)
			if own, ok := strings.CutPrefix(path, module); ok && !slices.Contains(layer.ours, own) {
				t.Errorf("%s imports %s: its layer must not", file, own)
			}
			clearOf := layer.clearOf
			if dir != "trust/notary" {
				clearOf = slices.Concat(clearOf, []string{notary, oras})
			}
			for _, p := range clearOf {
				if path == p || strings.HasPrefix(path, p+"/") {
					t.Errorf("%s imports %s: its layer stays clear of %s", file, path, p)
				}
			}
		}
	}
}

// Caps on the tail, not the median: one function or file that absorbs every feature is how the peers became what they are.
const (
	maxFileLines     = 450
	maxFunctionLines = 90
)

func TestSizes(t *testing.T) {
	for _, file := range sources(t) {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if n := fset.Position(f.End()).Line; n > maxFileLines {
			t.Errorf("%s has %d lines, more than %d", file, n, maxFileLines)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line; n > maxFunctionLines {
				t.Errorf("%s: %s has %d lines, more than %d", file, fn.Name.Name, n, maxFunctionLines)
			}
			if fn.Name.Name == "init" && fn.Recv == nil {
				t.Errorf("%s has an init function: wire in cmd", file)
			}
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, file := range sources(t) {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(file)
		documented[dir] = documented[dir] || f.Doc != nil
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package comment", dir)
		}
	}
}

// sources returns the Go files of the module that are not tests.
func sources(t *testing.T) (files []string) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, nested := os.Stat(filepath.Join(path, "go.mod"))
			if path != "." && (nested == nil || strings.HasPrefix(d.Name(), ".")) {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 50 {
		t.Fatalf("found only %d files", len(files))
	}
	return files
}
