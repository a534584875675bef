package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Sizes of a plot, pixels.
const (
	plotWidth  = 860
	plotLabel  = 200 // left of the bars
	plotRight  = 150 // right of them
	barHeight  = 14
	barGap     = 4
	imageGap   = 14
	plotHeader = 46
	plotFooter = 30
)

// plot draws the times to ready over a link, a bar for each image and system: the pull dark, the rest light, and a line from the least to the most.
func (r *results) plot(l *link) string {
	systems := r.measured()
	most := 0.0
	for _, image := range r.Images {
		for _, s := range systems {
			if fs := r.of(l.Name, image, s, ready); len(fs) > 0 {
				most = max(most, slices.Max(fs))
			}
		}
	}
	if most == 0 {
		most = 1
	}
	scale := float64(plotWidth-plotLabel-plotRight) / most
	height := plotHeader + plotFooter + len(r.Images)*(imageGap+(len(systems)+1)*(barHeight+barGap))
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", plotWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotWidth, height)
	text(&b, 10, 18, "start", 14, "Seconds from pull to ready over "+l.String())
	text(&b, 10, 34, "start", 11, "dark: pull; light: create, start, and the container's own start; line: least to most; red: the floor")
	grid(&b, most, scale, height)
	y := plotHeader
	for _, image := range r.Images {
		text(&b, 10, y+barHeight-3, "start", 12, image)
		top := y
		for i, s := range systems {
			r.bar(&b, l, image, s, i, y, scale)
			y += barHeight + barGap
		}
		if f := r.floor(l, image); !math.IsNaN(f) {
			x := plotLabel + f*scale
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#c0392b" stroke-width="1.5"/>`+"\n", x, x, top-2, y)
		}
		y += imageGap + barHeight + barGap
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// colours are of the systems in their order: of the pull, and of the rest.
func colours(i int) (dark, light string) {
	all := [...][2]string{{"#555555", "#bbbbbb"}, {"#9c6b1e", "#e8c58a"}, {"#7a4a10", "#d9a55a"}, {"#1d4e89", "#8fb8de"}, {"#1b6e5a", "#8fd0bd"}, {"#5b2a86", "#c3a3dd"}}
	c := all[i%len(all)]
	return c[0], c[1]
}

func (r *results) bar(b *strings.Builder, l *link, image, system string, i, y int, scale float64) {
	fs := r.of(l.Name, image, system, ready)
	if len(fs) == 0 {
		return
	}
	dark, light := colours(i)
	pull, all := median(r.of(l.Name, image, system, pulled)), median(fs)
	text(b, plotLabel-6, y+barHeight-3, "end", 11, system)
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", plotLabel, y, all*scale, barHeight, light)
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", plotLabel, y, pull*scale, barHeight, dark)
	least, most := plotLabel+slices.Min(fs)*scale, plotLabel+slices.Max(fs)*scale
	fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="black"/>`+"\n", least, most, y+barHeight/2, y+barHeight/2)
	label := fmt.Sprintf("%.2f s", all)
	if x := r.speedup(l.Name, image, system); i > 0 && !math.IsNaN(x) {
		label += fmt.Sprintf(", %.1f times faster", x)
	}
	text(b, int(most)+5, y+barHeight-3, "start", 11, label)
}

// grid draws the time axis.
func grid(b *strings.Builder, most, scale float64, height int) {
	step := math.Pow(10, math.Floor(math.Log10(most)))
	for _, f := range []float64{0.1, 0.2, 0.5, 1} {
		if most/(step*f) <= 8 {
			step *= f
			break
		}
	}
	for i := 0; float64(i)*step <= most; i++ {
		x := plotLabel + float64(i)*step*scale
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#dddddd"/>`+"\n", x, x, plotHeader-6, height-plotFooter)
		text(b, int(x), height-plotFooter+14, "middle", 11, fmt.Sprintf("%g", float64(i)*step))
	}
}

func text(b *strings.Builder, x, y int, anchor string, size int, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s" font-size="%d">%s</text>`+"\n", x, y, anchor, size, html.EscapeString(s))
}
