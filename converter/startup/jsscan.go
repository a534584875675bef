package startup

import "strings"

// jsScanner looks for what JavaScript loads when it is loaded itself: require calls and import declarations that are not inside of a
// function, unless the function is called where it stands.
type jsScanner struct {
	text string
	pos  int
	prev string // the token before: a word, or a byte

	// brackets that are open, and for each whether what it holds is executed later only.
	open []bracket
	lazy int // of them
	last bracket
}

type bracket struct {
	lazy bool
	// of "(": what stood before it. Of "{": nothing.
	before, before2 string
}

const maxBrackets = 4096

// jsImports returns the names of the modules that source loads, in its order.
func jsImports(source string) (names []string) {
	s := &jsScanner{text: source}
	var before2 string // the token before prev
	for s.pos < len(s.text) && len(names) < maxModules {
		c := s.text[s.pos]
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			s.pos++
			continue
		case c == '/' && s.skipComment():
			continue
		case c == '/' && s.regexpHere():
			s.skipRegexp()
			before2, s.prev = s.prev, "/"
			continue
		case c == '"' || c == '\'' || c == '`':
			lit := s.literal(c)
			if s.lazy == 0 && c != '`' && s.loads(before2) {
				names = append(names, lit)
			}
			before2, s.prev = s.prev, `"`
			continue
		case isWordByte(c) || c == '$':
			i := s.pos
			for s.pos < len(s.text) && (isWordByte(s.text[s.pos]) || s.text[s.pos] == '$') {
				s.pos++
			}
			before2, s.prev = s.prev, s.text[i:s.pos]
			continue
		case c == '(' || c == '[' || c == '{':
			if len(s.open) == maxBrackets {
				return names
			}
			s.push(c, before2)
		case c == ')' || c == ']' || c == '}':
			s.pop()
		case c == '=' && strings.HasPrefix(s.text[s.pos:], "=>"):
			s.pos++
			c = '>'
			before2, s.prev = s.prev, "=>"
			s.pos++
			continue
		}
		s.pos++
		before2, s.prev = s.prev, string(c)
	}
	return names
}

// loads reports whether a string literal here names a module: after "require(", "import(", "from" or "import".
func (s *jsScanner) loads(before2 string) bool {
	switch s.prev {
	case "(":
		return before2 == "require" || before2 == "import"
	case "from", "import":
		return true
	}
	return false
}

// push opens a bracket.
func (s *jsScanner) push(c byte, before2 string) {
	b := bracket{before: s.prev, before2: before2}
	if c == '{' {
		switch s.prev {
		case "=>":
			b.lazy = true
		case ")":
			// The body of a function, unless a statement's; it runs at once if the function stands in brackets or behind an operator.
			head := s.last
			switch head.before {
			case "if", "for", "while", "switch", "catch", "with":
			default:
				b.lazy = !s.called(head)
			}
		}
	}
	if b.lazy {
		s.lazy++
	}
	s.open = append(s.open, b)
}

// called reports whether the function whose parameters head holds is called where it stands, as in (function () { ... })().
func (s *jsScanner) called(head bracket) bool {
	if head.before != "function" {
		return false
	}
	switch head.before2 {
	case "(", "!", "+", "~", "void":
		return true
	}
	return false
}

func (s *jsScanner) pop() {
	if len(s.open) == 0 {
		return
	}
	s.last = s.open[len(s.open)-1]
	s.open = s.open[:len(s.open)-1]
	if s.last.lazy {
		s.lazy--
	}
}

func (s *jsScanner) skipComment() bool {
	rest := s.text[s.pos:]
	end := ""
	switch {
	case strings.HasPrefix(rest, "//"):
		end = "\n"
	case strings.HasPrefix(rest, "/*"):
		end = "*/"
	default:
		return false
	}
	if i := strings.Index(rest[2:], end); i >= 0 {
		s.pos += 2 + i + len(end)
	} else {
		s.pos = len(s.text)
	}
	return true
}

// regexpHere: a slash behind a value divides.
func (s *jsScanner) regexpHere() bool {
	switch s.prev {
	case ")", "]", "}", `"`:
		return false
	case "return", "typeof", "case", "in", "of", "void", "delete":
		return true
	}
	return s.prev == "" || !isWordByte(s.prev[len(s.prev)-1]) && s.prev != "$"
}

func (s *jsScanner) skipRegexp() {
	class := false
	for s.pos++; s.pos < len(s.text); s.pos++ {
		switch c := s.text[s.pos]; {
		case c == '\\':
			s.pos++
		case c == '[':
			class = true
		case c == ']':
			class = false
		case c == '\n':
			return
		case c == '/' && !class:
			s.pos++
			return
		}
	}
}

// literal reads a string and returns what is in it. (What a template has inside ${} is skipped as if it were text.)
func (s *jsScanner) literal(quote byte) string {
	s.pos++
	i := s.pos
	for ; s.pos < len(s.text); s.pos++ {
		switch c := s.text[s.pos]; {
		case c == '\\':
			s.pos++
		case c == quote:
			s.pos++
			return s.text[i : s.pos-1]
		case c == '\n' && quote != '`':
			return ""
		}
	}
	s.pos = len(s.text)
	return ""
}
