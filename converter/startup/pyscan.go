package startup

import "strings"

// pythonScanner yields the statements of Python source that begin with import or from and are executed when the module is: not
// those inside of functions, and not those for type checkers or, unless it is one, for the main program.
type pythonScanner struct {
	text string
	main bool

	skip int // statements indented deeper are not executed; -1 while all are
	init bool

	indent int // of the line, if joined: the next statement stands on the same one
	joined bool
}

// next returns the words of the next such statement; there is at least one.
func (s *pythonScanner) next() ([]string, bool) {
	if !s.init {
		s.init, s.skip = true, -1
	}
	for s.text != "" {
		indent, words := s.statement()
		if len(words) == 0 {
			continue
		}
		if s.skip >= 0 && indent > s.skip {
			continue
		}
		s.skip = -1
		switch words[0] {
		case "def", "async":
			s.skip = indent
		case "if":
			cond := strings.Join(words[1:], "")
			if strings.HasPrefix(cond, "TYPE_CHECKING") || strings.HasPrefix(cond, "typing.TYPE_CHECKING") || strings.HasPrefix(cond, "__name__==") && !s.main {
				s.skip = indent
			}
		case "import", "from":
			return words, true
		case "try", "else", "finally", "with", "class", "except":
			// import on the same line, behind a colon
			for i, w := range words {
				if w == ":" && i+1 < len(words) && (words[i+1] == "import" || words[i+1] == "from") {
					return words[i+1:], true
				}
			}
		}
	}
	return nil, false
}

const maxWords = 4096 // of one statement that are kept

// statement reads one logical line and returns its indentation and words. Strings are one word, `""`; what stands in brackets
// is part of the line. After a semicolon there is a new statement with the same indentation as far as this is concerned: none.
func (s *pythonScanner) statement() (indent int, words []string) {
	for s.text != "" && (s.text[0] == ' ' || s.text[0] == '\t' || s.text[0] == '\f') {
		if s.text[0] == '\t' {
			indent += 7
		}
		indent++
		s.text = s.text[1:]
	}
	if s.joined {
		indent, s.joined = s.indent, false
	}
	depth := 0
	add := func(w string) {
		if len(words) < maxWords {
			words = append(words, w)
		}
	}
	for s.text != "" {
		c := s.text[0]
		switch {
		case c == '\n' && depth == 0:
			s.text = s.text[1:]
			return indent, words
		case c == ';' && depth == 0:
			s.text = strings.TrimLeft(s.text[1:], " \t")
			s.indent, s.joined = indent, true
			return indent, words
		case c == '#':
			i := strings.IndexByte(s.text, '\n')
			if i < 0 {
				i = len(s.text)
			}
			s.text = s.text[i:]
		case c == '\\':
			s.text = strings.TrimPrefix(strings.TrimPrefix(s.text[1:], "\r"), "\n")
		case c == '"' || c == '\'':
			s.skipString(c)
			add(`""`)
		case isWordByte(c):
			i := 1
			for i < len(s.text) && isWordByte(s.text[i]) {
				i++
			}
			add(s.text[:i])
			s.text = s.text[i:]
		default:
			switch c {
			case '(', '[', '{':
				depth++
			case ')', ']', '}':
				depth = max(0, depth-1)
			case ' ', '\t', '\r', '\n', '\f':
			default:
				add(s.text[:1])
			}
			s.text = s.text[1:]
		}
	}
	return indent, words
}

func isWordByte(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z' || c >= 0x80
}

// skipString reads past a string that begins with quote.
func (s *pythonScanner) skipString(quote byte) {
	end := string(quote)
	if triple := strings.Repeat(end, 3); strings.HasPrefix(s.text, triple) {
		end = triple
	}
	t := s.text[len(end):]
	for i := 0; i < len(t); i++ {
		switch {
		case t[i] == '\\':
			i++
		case t[i] == '\n' && len(end) == 1:
			s.text = t[i:] // not closed: the line ends it
			return
		case strings.HasPrefix(t[i:], end):
			s.text = t[i+len(end):]
			return
		}
	}
	s.text = ""
}

// splitWords splits words at each sep.
func splitWords(words []string, sep string) (parts [][]string) {
	begin := 0
	for i, w := range words {
		if w == sep {
			parts = append(parts, words[begin:i])
			begin = i + 1
		}
	}
	return append(parts, words[begin:])
}

// cutWords returns the words before sep.
func cutWords(words []string, sep string) []string {
	for i, w := range words {
		if w == sep {
			return words[:i]
		}
	}
	return words
}
