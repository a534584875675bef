package console

import (
	"strconv"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// startMap draws which parts of a platform's layers a container reads at start. Each layer is a bar, as long as its tar is, among the
// layers; the table around the bars says the same in numbers, which is the map's text.
type startMap struct {
	platformView
	Known  bool // there is an artifact, and a profile of it
	Source string
	Layers []layerRow
	Hot    int64 // bytes of the tars that a start reads
	Tar    int64 // bytes of all tars
	Read   int   // layers of which something is read
	Parts  int
}

// layerRow is a layer of the map.
type layerRow struct {
	service.LayerMap
	N     int
	Hot   int64
	Parts int
	Width string // of the bar, in units of the drawing
	Cells []cell
}

// cell is a part of a bar that is read: the more of it, the higher its heat, 1 to 4.
type cell struct {
	X, Width string
	Heat     int
}

// mapUnits is how wide the drawing of the longest layer is, and cellUnits of what is drawn in one shade: a pixel or two on a screen.
// A bar of fewer than leastUnits could not be seen.
const (
	mapUnits   = 1000
	cellUnits  = 2
	leastUnits = 6
)

// sources say where a profile comes from.
var sources = map[string]string{
	"recorded": "Recorded: what containers of this image read on nodes until they were ready.",
	"learned":  "Learned: what nodes of the fleet read at their first starts of this image.",
	"static":   "Static: found in the image’s command and its files, without running it.",
}

func mapOf(p platformView) startMap {
	m := startMap{platformView: p}
	if p.Streaming == nil {
		return m
	}
	m.Known = p.Streaming.Profile != ""
	m.Source = sources[p.Streaming.Profile]
	longest := int64(1)
	for _, l := range p.Streaming.Layers {
		longest = max(longest, l.TarSize)
	}
	for i, l := range p.Streaming.Layers {
		row := layerRow{LayerMap: l, N: i + 1, Parts: len(l.Hot)}
		for _, s := range l.Hot {
			row.Hot += s.Len
		}
		units := max(leastUnits, int(float64(mapUnits)*float64(l.TarSize)/float64(longest)))
		row.Width = strconv.Itoa(units)
		row.Cells = cells(l, units)
		if row.Hot > 0 {
			m.Read++
		}
		m.Hot, m.Tar, m.Parts = m.Hot+row.Hot, m.Tar+l.TarSize, m.Parts+row.Parts
		m.Layers = append(m.Layers, row)
	}
	return m
}

// cells cuts a bar into equal parts, finds how much of each is read, and joins neighbours of one shade. However many spans there are, a
// bar has no more than mapUnits/cellUnits parts.
func cells(l service.LayerMap, units int) []cell {
	n := max(1, units/cellUnits)
	if l.TarSize <= 0 {
		return nil
	}
	read := make([]float64, n) // of each part, in parts
	per := float64(l.TarSize) / float64(n)
	for _, s := range l.Hot {
		from, to := float64(s.Off)/per, float64(s.Off+s.Len)/per
		for i := max(0, int(from)); i < n && float64(i) < to; i++ {
			read[i] += min(to, float64(i+1)) - max(from, float64(i))
		}
	}
	var out []cell
	width := float64(units) / float64(n)
	for i := 0; i < n; {
		heat := heatOf(read[i])
		j := i + 1
		for j < n && heatOf(read[j]) == heat {
			j++
		}
		if heat > 0 {
			out = append(out, cell{units2(float64(i) * width), units2(float64(j-i) * width), heat})
		}
		i = j
	}
	return out
}

// heatOf is 0 for what is not read, and 1 to 4 for quarters.
func heatOf(read float64) int {
	switch {
	case read <= 0:
		return 0
	case read >= 0.75:
		return 4
	}
	return 1 + int(read*4)
}

// units2 writes a length in the drawing with two places at most.
func units2(f float64) string { return strconv.FormatFloat(float64(int(f*100+0.5))/100, 'f', -1, 64) }
