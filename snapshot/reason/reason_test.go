package reason

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The list has every code there is, and so has the table of docs/operations.md, in the same order.
func TestListIsDocumented(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var declared []Code
	ast.Inspect(f, func(n ast.Node) bool {
		if d, ok := n.(*ast.GenDecl); ok && d.Tok == token.CONST {
			for _, s := range d.Specs {
				for _, v := range s.(*ast.ValueSpec).Values {
					declared = append(declared, Code(strings.Trim(v.(*ast.BasicLit).Value, `"`)))
				}
			}
		}
		return true
	})
	if !slices.Equal(declared, All()) {
		t.Errorf("declared: %v\nlisted:   %v", declared, All())
	}
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## The log\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []Code
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, Code(m[1]))
	}
	if !slices.Equal(documented, All()) {
		t.Errorf("documented: %v\nlisted:     %v", documented, All())
	}
	said := map[string]bool{}
	for _, c := range All() {
		said[c.Remedy()] = true
	}
	if len(said) != len(All()) {
		t.Errorf("%d codes have %d remedies", len(All()), len(said))
	}
}

// A code is found below what is wrapped around it, and the first one stays.
func TestCodes(t *testing.T) {
	inner := errors.New("no")
	err := New(Damaged, fmt.Errorf("pull: %w", New(Auth, inner)))
	if Of(err) != Auth || !errors.Is(err, inner) || err.Error() != "pull: no" {
		t.Errorf("got %s, %v", Of(err), err)
	}
	if Of(inner) != NodeFailure {
		t.Errorf("got %s", Of(inner))
	}
}
