package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"
)

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// newTable aligns what is written to it in columns, which tabs separate.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 0, 2, ' ', 0) }

// size prints bytes as people read them, decimal as registries' sizes are.
func size(n int64) string {
	f := float64(n)
	for _, unit := range []string{"B", "kB", "MB", "GB"} {
		if f < 999.5 || unit == "GB" {
			if unit == "B" {
				return fmt.Sprintf("%d B", n)
			}
			return fmt.Sprintf("%.1f %s", f, unit)
		}
		f /= 1000
	}
	return ""
}

// ratio prints n as a part of m.
func ratio(n, m int64) string {
	if m == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f", float64(n)/float64(m))
}

// short abbreviates a digest for tables.
func short(d digest.Digest) string {
	if d.Validate() != nil {
		return string(d)
	}
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
