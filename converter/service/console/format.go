package console

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// size writes bytes as streamctl does: "79.0 MB".
func size(n int64) string {
	if n < 1000 {
		return strconv.FormatInt(n, 10) + " B"
	}
	units := "kMGTPE"
	f := float64(n)
	i := -1
	for f >= 999.95 && i < len(units)-1 {
		f /= 1000
		i++
	}
	return fmt.Sprintf("%.1f %cB", f, units[i])
}

// parseSize reads what people write for a size: "100 MB", "1.5GiB", "4096". Empty is 0.
func parseSize(s string) (int64, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return 0, nil
	}
	end := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	number, unit := s, ""
	if end >= 0 {
		number, unit = s[:end], strings.ToLower(strings.TrimSpace(s[end:]))
	}
	f, err := strconv.ParseFloat(number, 64)
	factor, ok := map[string]float64{
		"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9, "t": 1e12, "tb": 1e12,
		"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
	}[unit]
	if err != nil || !ok || f*factor >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is no size: write a number with B, kB, MB or GB, for example 100 MB", s)
	}
	return int64(f * factor), nil
}

// exactSize writes bytes so that parseSize reads the same.
func exactSize(n int64) string {
	if back, err := parseSize(size(n)); err == nil && back == n {
		return size(n)
	}
	return strconv.FormatInt(n, 10) + " B"
}

// count writes a number with a separator for thousands.
func count(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural is "1 tag", "2 tags".
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	if strings.HasSuffix(one, "y") {
		one = strings.TrimSuffix(one, "y") + "ie"
	}
	return count(n) + " " + one + "s"
}

// share is a part of a whole in percent, with as many places as say something.
func share(part, whole int64) string {
	if part <= 0 || whole <= 0 {
		return "0 %"
	}
	p := 100 * float64(part) / float64(whole)
	switch {
	case p < 0.1:
		return "< 0.1 %"
	case p < 10:
		return fmt.Sprintf("%.1f %%", p)
	}
	return fmt.Sprintf("%.0f %%", p)
}

// took writes a duration for people: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min".
func took(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return strings.TrimSuffix(fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60), " 0 s")
	}
	return strings.TrimSuffix(fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60), " 0 min")
}

// moment is a time as a page shows it.
type moment struct {
	ISO, Text, Full string
}

// momentAt says how long ago t was, or its date if that was more than a month ago.
func momentAt(t, now time.Time) moment {
	t = t.UTC()
	m := moment{ISO: t.Format(time.RFC3339), Full: t.Format("2 January 2006, 15:04:05 UTC")}
	ago := now.Sub(t)
	unit := func(n int, one string) string {
		if n == 1 {
			return "1 " + one + " ago"
		}
		return strconv.Itoa(n) + " " + one + "s ago"
	}
	switch {
	case ago < 5*time.Second:
		m.Text = "just now"
	case ago < time.Minute:
		m.Text = unit(int(ago.Seconds()), "second")
	case ago < time.Hour:
		m.Text = unit(int(ago.Minutes()), "minute")
	case ago < 24*time.Hour:
		m.Text = unit(int(ago.Hours()), "hour")
	case ago < 31*24*time.Hour:
		m.Text = unit(int(ago.Hours()/24), "day")
	default:
		m.Text = t.Format("2 Jan 2006")
	}
	return m
}

// hash is a digest for a column: its beginning and its end, which is what people compare.
type hash struct{ Full, Algorithm, Head, Tail string }

func hashOf(d digest.Digest) hash {
	full := d.String()
	algorithm, hex, ok := strings.Cut(full, ":")
	if !ok || len(hex) < 24 {
		return hash{Full: full, Head: full}
	}
	return hash{full, algorithm + ":", hex[:8], hex[len(hex)-6:]}
}

// pathOf is a path of the console. Each segment is escaped whole.
func pathOf(segments ...string) string {
	var b strings.Builder
	for _, s := range segments {
		b.WriteString("/" + url.PathEscape(s))
	}
	return b.String()
}

func registryPath(registry string, below ...string) string {
	return pathOf(append([]string{"registries", registry}, below...)...)
}

// repositoryPath is that of a repository's page, or of what is below it. The slashes of a repository's name stay slashes.
func repositoryPath(registry, repository string, below ...string) string {
	return registryPath(registry, append(strings.Split(repository, "/"), below...)...)
}

// imagePath is that of an image's page, or of what is below it.
func imagePath(registry, repository, ref string, below ...string) string {
	return repositoryPath(registry, repository, append([]string{"-", "image", ref}, below...)...)
}

func operationPath(id string, below ...string) string {
	return pathOf(append([]string{"operations", id}, below...)...)
}

// settingsPath is that of the form for a repository or pattern.
func settingsPath(registry, repository string) string {
	p := registryPath(registry, "-", "settings")
	if repository == "" {
		return p
	}
	return p + "?" + url.Values{"repository": {repository}}.Encode()
}

// anchor is an id for what has a name that anybody may have chosen.
func anchor(kind, name string) string {
	sum := sha256.Sum256([]byte(name))
	return kind + "-" + hex.EncodeToString(sum[:6])
}

// imageName is how people call an image: by its tag, or by the beginning of its digest.
func imageName(repository, tag string, d digest.Digest) string {
	if tag != "" {
		return repository + ":" + tag
	}
	h := hashOf(d)
	if h.Tail == "" {
		return repository + "@" + h.Head
	}
	return repository + "@" + h.Algorithm + h.Head + "…" + h.Tail
}
