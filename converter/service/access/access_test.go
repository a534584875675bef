package access

import (
	"crypto/sha256"
	"encoding/hex"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

const (
	tokenOfOwner  = "owner-0123456789abcdef0123456789"
	tokenOfReader = "reader-0123456789abcdef0123456789"
)

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func tokens() []Token {
	return []Token{
		{Name: "root", SHA256: sum(tokenOfOwner), Grants: []Grant{{Role: Owner}}},
		{Name: "ci", SHA256: sum(tokenOfReader), Grants: []Grant{{Role: Reader, Registry: "a.example.com", Repository: "team/*"}}},
	}
}

func TestMay(t *testing.T) {
	id := &Identity{Grants: []Grant{
		{Role: Reader, Registry: "a"},
		{Role: Writer, Registry: "a", Repository: "team/*"},
		{Role: Owner, Registry: "a", Repository: "team/app"},
		{Role: Writer, Registry: "*", Repository: "public/*"},
	}}
	for _, c := range []struct {
		registry, repository string
		want                 Role // the highest
	}{
		{"a", "other", Reader}, {"a", "team/x", Writer}, {"a", "team/app", Owner}, {"a", "public/x", Writer}, {"a", "", Reader},
		{"b", "other", None}, {"b", "team/app", None}, {"b", "public/x", Writer}, {"", "x", None},
		// A pattern is asked for as a whole.
		{"a", "*", Reader}, {"a", "team/*", Writer}, {"a", "team/a*", Writer}, {"a", "team*", Reader}, {"a", "team/app*", Writer},
		{"b", "public/*", Writer}, {"b", "*", None},
	} {
		for r := None; r <= Owner; r++ {
			want := r > None && r <= c.want
			if got := id.May(r, c.registry, c.repository); got != want {
				t.Errorf("May(%v, %q, %q) = %v, want %v", r, c.registry, c.repository, got, want)
			}
		}
	}
	for _, c := range []struct {
		registry string
		want     Role
	}{{"a", Owner}, {"b", Writer}, {"", Owner}} {
		for r := None; r <= Owner; r++ {
			if got, want := id.MaySome(r, c.registry), r > None && r <= c.want; got != want {
				t.Errorf("MaySome(%v, %q) = %v, want %v", r, c.registry, got, want)
			}
		}
	}
	if !id.May(Reporter, "a", "team/app") || id.May(Reporter, "a", "team/x") {
		t.Error("an owner may report, and nobody else")
	}
	node := &Identity{Grants: []Grant{{Role: Reporter, Registry: "a", Repository: "team/*"}}}
	if !node.May(Reporter, "a", "team/x") || node.May(Reporter, "a", "x") || node.May(Reporter, "b", "team/x") || !node.MaySome(Reporter, "a") {
		t.Error("a reporter may not report where it should, or where it should not")
	}
	for r := None; r <= Owner; r++ {
		if node.May(r, "a", "team/x") || node.MaySome(r, "a") || node.MaySome(r, "") {
			t.Errorf("a reporter is a %v", r)
		}
	}
	if From(t.Context()).May(Reader, "a", "b") || From(With(t.Context(), nil)).MaySome(Reader, "") {
		t.Error("nobody may something")
	}
}

// What a grant's pattern matches as a text, it matches in each of that text's own matches.
func TestPatternsCover(t *testing.T) {
	parts := []string{"", "a", "b", "*", "a*", "*b", "a*b", "ab*", "**", "a*a", "*a*"}
	names := []string{"", "a", "b", "ab", "ba", "aa", "aab", "abab", "bab"}
	covered := 0
	for _, grant := range parts {
		for _, asked := range parts {
			if !service.Match(grant, asked) {
				continue
			}
			for _, name := range names {
				if service.Match(asked, name) {
					covered++
					if !service.Match(grant, name) {
						t.Errorf("%q matches %q, but not %q", grant, asked, name)
					}
				}
			}
		}
	}
	if covered < 100 {
		t.Errorf("only %d combinations", covered)
	}
}

func TestRoles(t *testing.T) {
	for r := Reader; r <= Reporter; r++ {
		text, err := r.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back Role
		if err := back.UnmarshalText(text); err != nil || back != r {
			t.Errorf("%v comes back as %v, %v", r, back, err)
		}
	}
	for _, s := range []string{"", "none", "Owner", "admin"} {
		if r, err := ParseRole(s); err == nil {
			t.Errorf("ParseRole(%q) = %v", s, r)
		}
	}
}

func TestCheckListen(t *testing.T) {
	for _, c := range []struct {
		addr                     string
		authenticated, encrypted bool
		want                     string // of the error
	}{
		{"127.0.0.1:80", false, false, ""}, {"127.9.9.9:80", false, false, ""}, {"[::1]:80", false, false, ""}, {"[::ffff:127.0.0.1]:80", false, false, ""},
		{"0.0.0.0:80", false, true, "authentication"}, {"[::]:80", false, true, "authentication"}, {"10.0.0.1:80", false, false, "authentication"},
		{":80", false, true, "authentication"}, {"localhost.example.com:80", false, true, "authentication"}, {"/run/x.sock", false, true, "authentication"},
		{"10.0.0.1:80", true, false, "TLS"}, {"0.0.0.0:80", true, false, "TLS"}, {"10.0.0.1:80", true, true, ""}, {"[::]:80", true, true, ""},
	} {
		err := CheckListen(c.addr, c.authenticated, c.encrypted)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("CheckListen(%q, %v, %v) = %v, want %q", c.addr, c.authenticated, c.encrypted, err, c.want)
		}
	}
}

// Every way to misconfigure is refused, and says by what.
func TestConfigurations(t *testing.T) {
	file := func(content string) string {
		name := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	all := []Grant{{Role: Owner}}
	oidc := func(change func(*OIDC)) Config {
		o := OIDC{Issuer: "https://issuer.example.com", Audiences: []string{"api"}, Rules: []Rule{{"groups", "admins", all}}}
		change(&o)
		return Config{OIDC: &o}
	}
	one := func(t Token) Config { return Config{Tokens: []Token{t}} }
	for _, c := range []struct {
		name   string
		config Config
		want   string
	}{
		{"nothing", Config{}, "neither tokens nor OIDC"},
		{"loopback and tokens", Config{Loopback: true, Tokens: tokens()}, "one or the other"},
		{"no name", one(Token{SHA256: sum("x"), Grants: all}), "name"},
		{"a name with a control character", one(Token{Name: "a\x1b", SHA256: sum("x"), Grants: all}), "name"},
		{"no token", one(Token{Name: "a", Grants: all}), "either"},
		{"two tokens", one(Token{Name: "a", SHA256: sum("x"), File: "x", Grants: all}), "either"},
		{"no hash", one(Token{Name: "a", SHA256: tokenOfOwner, Grants: all}), "hexadecimal"},
		{"a short hash", one(Token{Name: "a", SHA256: sum("x")[2:], Grants: all}), "hexadecimal"},
		{"no file", one(Token{Name: "a", File: "/nonexistent/x", Grants: all}), "no such file"},
		{"an empty file", one(Token{Name: "a", File: file("\n"), Grants: all}), "characters"},
		{"a short token", one(Token{Name: "a", File: file("secret"), Grants: all}), "characters"},
		{"no role", one(Token{Name: "a", SHA256: sum("x")}), "role"},
		{"the role none", one(Token{Name: "a", SHA256: sum("x"), Grants: []Grant{{}}}), "role"},
		{"no such role", one(Token{Name: "a", SHA256: sum("x"), Grants: []Grant{{Role: Reporter + 1}}}), "role"},
		{"a name twice", Config{Tokens: append(tokens(), Token{Name: "ci", SHA256: sum("x"), Grants: all})}, "two of the name"},
		{"a token twice", Config{Tokens: append(tokens(), Token{Name: "x", SHA256: sum(tokenOfOwner), Grants: all})}, "the same"},
		{"an issuer without TLS", oidc(func(o *OIDC) { o.Issuer = "http://issuer.example.com" }), "https"},
		{"no issuer", oidc(func(o *OIDC) { o.Issuer = "" }), "https"},
		{"no audience", oidc(func(o *OIDC) { o.Audiences = nil }), "audiences"},
		{"an empty audience", oidc(func(o *OIDC) { o.Audiences = []string{""} }), "audiences"},
		{"no rules", oidc(func(o *OIDC) { o.Rules = nil }), "rules"},
		{"a rule for every value", oidc(func(o *OIDC) { o.Rules[0].Value = "" }), "must not be empty"},
		{"a rule without role", oidc(func(o *OIDC) { o.Rules[0].Grants = nil }), "role"},
		{"a console without URL", oidc(func(o *OIDC) { o.ClientID = "console" }), "URL"},
		{"a URL with a path", Config{Tokens: tokens(), URL: "https://example.com/console"}, "URL"},
		{"a URL without scheme", Config{Tokens: tokens(), URL: "example.com"}, "URL"},
		{"a short key", Config{Tokens: tokens(), Key: make([]byte, 31)}, "31 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.config)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one of %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), tokenOfOwner) {
				t.Errorf("the error has a token: %v", err)
			}
		})
	}
	for name, c := range map[string]Config{
		"tokens": {Tokens: tokens(), URL: "https://example.com/"}, "loopback": {Loopback: true}, "OIDC": oidc(func(*OIDC) {}),
		"file": one(Token{Name: "a", File: file(tokenOfOwner + "\n"), Grants: all}), "audit": {Tokens: tokens(), Audit: io.Discard, Key: make([]byte, 32)},
	} {
		if _, err := New(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// How long a comparison takes says nothing of a token: the loop over known tokens never ends early, and no secret is compared by
// anything else. A clock would not show it reliably; the source does.
func TestComparisonsTakeConstantTime(t *testing.T) {
	found := false
	for _, name := range []string{"gate.go", "codeflow.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Name.Name != "ofSum" {
					break
				}
				ast.Inspect(n.Body, func(n ast.Node) bool {
					loop, ok := n.(*ast.RangeStmt)
					if !ok {
						return true
					}
					ast.Inspect(loop.Body, func(n ast.Node) bool {
						switch n := n.(type) {
						case *ast.ReturnStmt, *ast.BranchStmt:
							t.Error("ofSum leaves its loop early")
						case *ast.SelectorExpr:
							found = found || n.Sel.Name == "ConstantTimeCompare"
						}
						return true
					})
					return true
				})
			case *ast.BinaryExpr:
				for _, side := range []ast.Expr{n.X, n.Y} {
					s, ok := side.(*ast.SelectorExpr)
					if ok && (n.Op == token.EQL || n.Op == token.NEQ) && (s.Sel.Name == "State" || s.Sel.Name == "Nonce" || s.Sel.Name == "nonce" || s.Sel.Name == "sum") {
						t.Errorf("%s: %s is compared with %v", name, s.Sel.Name, n.Op)
					}
				}
			}
			return true
		})
	}
	if !found {
		t.Error("ofSum does not compare in constant time")
	}
}
