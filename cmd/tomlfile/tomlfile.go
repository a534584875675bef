// Package tomlfile is what the configuration files of our programs have in common: TOML that is decoded over filled defaults, so that a
// zero can be said, in which a key that does not exist is an error; durations as in "30s", sizes as in "20GiB" and levels of the log;
// and errors that say the line, the key and what is expected.
//
// What the keys are and which values make sense each program says itself.
package tomlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// Decode decodes the file name, whose bytes are b, into v, which has the defaults. printer is the command that prints every key, and
// example a configuration in which each key that takes a value has one, for errors.
func Decode(name string, b []byte, v any, printer string, example any) error {
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(v); err != nil {
		return fmt.Errorf("%s: %s", name, explain(err, printer, example))
	}
	return nil
}

// Write prints v as a configuration file, with the comments of its fields' tags.
func Write(w io.Writer, v any) error { return toml.NewEncoder(w).Encode(v) }

// explain says where and what: go-toml's own Error leaves out the place.
func explain(err error, printer string, example any) string {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		var keys []string
		for _, e := range missing.Errors {
			row, _ := e.Position()
			keys = append(keys, fmt.Sprintf("line %d: unknown key %q (`%s` prints those there are)", row, strings.Join(e.Key(), "."), printer))
		}
		return strings.Join(keys, "; ")
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, col := at.Position()
		what := err.Error()
		if strings.Contains(what, "cannot decode TOML ") || strings.Contains(what, "cannot store ") { // and then come names of Go's
			key := strings.Join(at.Key(), ".")
			what = fmt.Sprintf("the value of %s is of another type than expected, as in: %s", key, line(example, key))
		}
		return fmt.Sprintf("line %d, column %d: %s", row, col, what)
	}
	return err.Error()
}

// line returns the line of example that sets key.
func line(example any, key string) string {
	var b strings.Builder
	Write(&b, example) // cannot fail
	table := ""
	for l := range strings.Lines(b.String()) {
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "[") {
			table = strings.Trim(l, "[]") + "."
		}
		if strings.HasPrefix(table+l, key+" = ") {
			return l
		}
	}
	return ""
}

// Duration is written as in "15s". It is no integer, which would be taken as nanoseconds.
type Duration struct{ D time.Duration }

func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is no duration, as in \"15s\" or \"2m\"", b)
	}
	d.D = v
	return nil
}

func (d Duration) MarshalText() ([]byte, error) { return []byte(d.D.String()), nil }

// Level is a slog.Level, written as our documentation has it.
type Level slog.Level

func (l *Level) UnmarshalText(b []byte) error {
	if err := (*slog.Level)(l).UnmarshalText(b); err != nil {
		return fmt.Errorf("%q is no level: want debug, info, warn or error", b)
	}
	return nil
}

func (l Level) MarshalText() ([]byte, error) {
	return []byte(strings.ToLower(slog.Level(l).String())), nil
}

// Size is bytes, written as in "20GiB".
type Size int64

func (s *Size) UnmarshalText(b []byte) error {
	n, err := ParseSize(string(b))
	*s = Size(n)
	return err
}

func (s Size) MarshalText() ([]byte, error) {
	n, unit := int64(s), 0
	for n != 0 && n%1024 == 0 && unit < len(units)-1 {
		n, unit = n/1024, unit+1
	}
	return []byte(strconv.FormatInt(n, 10) + units[unit]), nil
}

// units of a size; each is 1024 of the one before.
var units = [...]string{"", "KiB", "MiB", "GiB", "TiB"}

// ParseSize reads bytes: "512", "512B", "20GiB". The unit is KiB, MiB, GiB or TiB.
func ParseSize(s string) (int64, error) {
	unit := strings.TrimLeft(s, "0123456789")
	n, err := strconv.ParseInt(strings.TrimSuffix(s, unit), 10, 64)
	for i, u := range units {
		if shift := 10 * i; err == nil && (unit == u || unit == "B" && i == 0) && n <= math.MaxInt64>>shift {
			return n << shift, nil
		}
	}
	return 0, fmt.Errorf("%q is no size, as in \"20GiB\"", s)
}
