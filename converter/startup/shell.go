package startup

import (
	"path"
	"slices"
	"strconv"
	"strings"
)

// maxCommands bounds the commands of one script.
const maxCommands = 2000

// shell follows what a shell is called with: a script, or -c and the text of one.
func (f *finder) shell(p *program, depth int) {
	for i := 0; i < len(p.args); i++ {
		a := p.args[i]
		switch {
		case strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "--") && strings.Contains(a, "c"):
			if i+1 < len(p.args) {
				name, rest := "sh", p.args[i+2:]
				if len(rest) > 0 {
					name, rest = rest[0], rest[1:]
				}
				f.script(p.args[i+1], name, rest, depth)
			}
			return
		case a == "-o" || a == "-O" || a == "+O":
			i++
		case strings.HasPrefix(a, "-") || strings.HasPrefix(a, "+"):
		default:
			if !strings.Contains(a, "/") || !path.IsAbs(a) {
				a = path.Join(f.workingDir, a)
			}
			if n := f.regular(a); n != nil {
				f.takeWhole(n)
				f.script(string(f.text(n)), a, p.args[i+1:], depth)
			}
			return
		}
	}
}

// builtins are commands of the shell itself, with its reserved words.
var builtins = func() map[string]bool {
	m := map[string]bool{}
	for _, w := range strings.Fields(`: [ [[ alias bg bind break builtin caller cd compgen complete continue declare dirs disown echo enable export
		false fc fg getopts hash help history jobs kill let local logout mapfile popd printf pushd pwd read readonly return set shift shopt
		suspend test times trap true type typeset ulimit umask unalias unset wait for case select function in esac done fi ;;`) {
		m[w] = true
	}
	return m
}()

// transparent are words before a command.
var transparent = map[string]bool{
	"exec": true, "command": true, "eval": true, "if": true, "then": true, "else": true, "elif": true, "while": true, "until": true, "do": true, "!": true, "time": true,
	"{": true, "(": true, "}": true,
}

// script follows the commands of a shell script: those that stand in it as words, in all its branches and functions. What a variable
// holds that the environment does not set is not known.
func (f *finder) script(text, self string, args []string, depth int) {
	if depth > maxDepth || !f.step(int64(len(text)/16)) {
		return
	}
	s := shellScanner{text: text, self: self, args: args, env: f.env}
	for range maxCommands {
		words, ok := s.next()
		if !ok {
			return
		}
		for len(words) > 0 && (transparent[words[0]] || isAssignment(words[0]) || words[0] == unknownWord) {
			words = words[1:]
		}
		switch {
		case len(words) == 0 || builtins[words[0]]:
		case words[0] == "." || words[0] == "source":
			if len(words) > 1 {
				at := words[1]
				if !path.IsAbs(at) {
					at = path.Join(f.workingDir, at)
				}
				if n := f.regular(at); n != nil && !f.whole[n] {
					f.takeWhole(n)
					f.script(string(f.text(n)), at, args, depth+1)
				}
			}
		default:
			f.command(words, depth+1)
		}
	}
}

func isAssignment(word string) bool {
	name, _, ok := strings.Cut(word, "=")
	return ok && name != "" && strings.Trim(strings.ToLower(name), "abcdefghijklmnopqrstuvwxyz_0123456789+") == ""
}

// unknownWord stands for a word whose value is not known.
const unknownWord = "\x00"

// shellScanner splits a script into simple commands.
type shellScanner struct {
	text string
	self string
	args []string
	env  map[string]string

	nested []string // texts of the command's substitutions, which are commands, too
	rest   []string // what comes after text, the last first
	word   strings.Builder
	inWord bool
	words  []string
}

// next returns the words of the next command, quotes removed and variables replaced; there may be none.
func (s *shellScanner) next() ([]string, bool) {
	s.words = nil
	if len(s.nested) > 0 {
		slices.Reverse(s.nested)
		s.rest = append(append(s.rest, s.text), s.nested...)
		s.text, s.nested = "", nil
	}
	for s.text == "" {
		n := len(s.rest) - 1
		if n < 0 {
			return nil, false
		}
		s.text, s.rest = s.rest[n], s.rest[:n]
	}
	for s.text != "" {
		c := s.text[0]
		s.text = s.text[1:]
		switch c {
		case ' ', '\t', '\r':
			s.endWord()
		case '\n', ';', '&', '|', '(', ')':
			s.endWord()
			return s.words, true
		case '#':
			if s.inWord {
				s.put("#")
				break
			}
			_, rest, _ := strings.Cut(s.text, "\n")
			s.text = "\n" + rest
		case '\\':
			if s.text != "" {
				if s.text[0] != '\n' {
					s.put(s.text[:1])
				}
				s.text = s.text[1:]
			}
		case '\'':
			quoted, rest, _ := strings.Cut(s.text, "'")
			s.text = rest
			s.put(quoted)
		case '"':
			s.quoted()
		case '$':
			s.dollar(false)
		case '`':
			inner, rest, _ := strings.Cut(s.text, "`")
			s.text = rest
			s.substitute(inner)
		case '<', '>':
			s.endWord()
			s.text = strings.TrimLeft(s.text, "<>&-| \t")
			s.redirect()
		default:
			s.put(string(c))
		}
	}
	s.endWord()
	return s.words, true
}

func (s *shellScanner) put(t string) {
	s.inWord = true
	s.word.WriteString(t)
}

func (s *shellScanner) endWord() {
	if s.inWord {
		w := s.word.String()
		if strings.Contains(w, unknownWord) {
			w = unknownWord
		}
		s.words = append(s.words, w)
	}
	s.word.Reset()
	s.inWord = false
}

// redirect drops the name of a file.
func (s *shellScanner) redirect() {
	i := strings.IndexAny(s.text, " \t\r\n;&|()")
	if i < 0 {
		i = len(s.text)
	}
	s.text = s.text[i:]
}

// quoted reads up to the closing double quote.
func (s *shellScanner) quoted() {
	s.inWord = true
	for s.text != "" {
		c := s.text[0]
		s.text = s.text[1:]
		switch c {
		case '"':
			return
		case '\\':
			if s.text != "" {
				s.put(s.text[:1])
				s.text = s.text[1:]
			}
		case '$':
			s.dollar(true)
		case '`':
			inner, rest, _ := strings.Cut(s.text, "`")
			s.text = rest
			s.substitute(inner)
		default:
			s.put(string(c))
		}
	}
}

// substitute notes the text of a command substitution; what it prints is not known.
func (s *shellScanner) substitute(inner string) {
	if len(s.nested) < maxCommands {
		s.nested = append(s.nested, inner)
	}
	s.put(unknownWord)
}

// dollar reads an expansion.
func (s *shellScanner) dollar(quoted bool) {
	switch {
	case strings.HasPrefix(s.text, "(("):
		if i := strings.Index(s.text, "))"); i >= 0 {
			s.text = s.text[i+2:]
		} else {
			s.text = ""
		}
		s.put(unknownWord)
	case strings.HasPrefix(s.text, "("):
		inner := balanced(s.text[1:], '(', ')')
		s.text = s.text[min(len(s.text), len(inner)+2):]
		s.substitute(inner)
	case strings.HasPrefix(s.text, "{"):
		inner := balanced(s.text[1:], '{', '}')
		s.text = s.text[min(len(s.text), len(inner)+2):]
		s.expand(inner, quoted)
	case s.text != "" && strings.ContainsRune("@*#?$!-0123456789", rune(s.text[0])):
		name := s.text[:1]
		s.text = s.text[1:]
		s.expand(name, quoted)
	default:
		i := 0
		for i < len(s.text) && (s.text[i] == '_' || s.text[i]|0x20 >= 'a' && s.text[i]|0x20 <= 'z' || s.text[i] >= '0' && s.text[i] <= '9') {
			i++
		}
		name := s.text[:i]
		s.text = s.text[i:]
		s.expand(name, quoted)
	}
}

// balanced returns what comes before the bracket that closes.
func balanced(t string, open, close byte) string {
	depth := 1
	for i := range len(t) {
		switch t[i] {
		case open:
			depth++
		case close:
			if depth--; depth == 0 {
				return t[:i]
			}
		}
	}
	return t
}

// expand puts the value of ${name}.
func (s *shellScanner) expand(name string, quoted bool) {
	plain, fallback, hasDefault := strings.Cut(name, ":-")
	switch n, err := strconv.Atoi(plain); {
	case plain == "@" || plain == "*" || plain == "@:1":
		for i, a := range s.args {
			if i > 0 {
				s.endWord()
			}
			s.put(a)
		}
	case plain == "0" || plain == "BASH_SOURCE" || strings.HasPrefix(plain, "BASH_SOURCE["):
		s.put(s.self)
	case err == nil && n > 0 && n <= len(s.args):
		s.put(s.args[n-1])
	case s.env[plain] != "":
		if quoted {
			s.put(s.env[plain])
			break
		}
		for i, w := range strings.Fields(s.env[plain]) {
			if i > 0 {
				s.endWord()
			}
			s.put(w)
		}
	case hasDefault && !strings.ContainsAny(fallback, "$`"):
		s.put(fallback)
	default:
		s.put(unknownWord)
	}
}
