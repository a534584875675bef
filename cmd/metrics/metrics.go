// Package metrics prints metrics in the text format of Prometheus (exposition format 0.0.4). Our programs have their counts already, where
// they count; what they need is the format.
package metrics

import (
	"fmt"
	"io"
	"strconv"
	"strings"
)

// ContentType is the format's.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// Metric is one metric. Labels take a few values that are known beforehand: never an image or a digest, and a host only if the configuration names it.
type Metric struct {
	Name, Kind, Help string
	Samples          []Sample
}

// Sample is a value of a metric.
type Sample struct {
	Suffix, Label, Value string // Suffix of a histogram; "" for none
	N                    float64
}

func Gauge(name, help string, n float64) Metric {
	return Metric{name, "gauge", help, []Sample{{N: n}}}
}

// Counter is a metric whose name ends in _total, which is added.
func Counter(name, help string, n int64) Metric {
	return Metric{name + "_total", "counter", help, []Sample{{N: float64(n)}}}
}

// By is a metric with one label.
func By(kind, name, help, label string, values []string, n func(i int) int64) Metric {
	m := Metric{Name: name, Kind: kind, Help: help}
	for i, v := range values {
		m.Samples = append(m.Samples, Sample{Label: label, Value: v, N: float64(n(i))})
	}
	return m
}

// Flag is 1 for true.
func Flag(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// Write prints metrics with prefix before each name.
func Write(w io.Writer, prefix string, list []Metric) error {
	var b strings.Builder
	for _, m := range list {
		name := prefix + m.Name
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, m.Help, name, m.Kind)
		for _, x := range m.Samples {
			b.WriteString(name + x.Suffix)
			if x.Label != "" {
				fmt.Fprintf(&b, "{%s=%q}", x.Label, x.Value)
			}
			b.WriteString(" " + strconv.FormatFloat(x.N, 'g', -1, 64) + "\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
