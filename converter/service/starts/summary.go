package starts

import (
	"cmp"
	"hash/fnv"
	"math"
	"math/bits"
	"slices"
	"sort"
	"time"

	"github.com/opencontainers/go-digest"
)

// Summary adds up what was reported of one platform of an image. Its size in JSON is some kilobytes, whatever was added.
type Summary struct {
	Nodes    []byte    `json:"nodes"`    // a bit for each node, by a hash of it: see NodeCount
	Variants []Variant `json:"variants"` // the one that was last reported first
}

// Variant is what the starts had in common: how the image was read. A new artifact or a new profile begins a new one.
type Variant struct {
	Artifact digest.Digest `json:"artifact"`
	Profile  string        `json:"profile"`                // recorded, learned, static or none
	Fetched  digest.Digest `json:"profileDigest,omitzero"` // "" where it is not known
	Starts   int64         `json:"starts"`
	First    time.Time     `json:"first"` // report
	Last     time.Time     `json:"last"`

	Pull  Histogram `json:"pull"`
	Reads Histogram `json:"reads"` // pull and reads, of starts of which both are known
	Ready Histogram `json:"ready"` // pull and ready, likewise

	Weight int64 `json:"weight"` // starts in the sums that follow, see halve
	Bytes  int64 `json:"bytes"`
	Missed int64 `json:"missedBytes"`
	Misses int64 `json:"misses"`
}

const (
	maxVariants = 8
	maxWeight   = 1 << 20 // starts: sums of maxBytes stay below 1 << 60
	nodeBits    = 4096    // the count of nodes is right to a few percent up to some thousands
)

// Add adds a start on a node, which was reported at now.
func (s *Summary) Add(node string, st Start, now time.Time) {
	if len(s.Nodes) != nodeBits/8 {
		s.Nodes = make([]byte, nodeBits/8)
	}
	h := fnv.New64a()
	h.Write([]byte(node))
	bit := mix(h.Sum64()) % nodeBits
	s.Nodes[bit/8] |= 1 << (bit % 8)

	i := slices.IndexFunc(s.Variants, func(v Variant) bool {
		return v.Artifact == st.Artifact && v.Profile == st.Profile && v.Fetched == st.Fetched
	})
	if i < 0 {
		i = 0
		s.Variants = slices.Insert(s.Variants, 0, Variant{Artifact: st.Artifact, Profile: st.Profile, Fetched: st.Fetched, First: now})
	}
	s.Variants[i].add(st, now)
	slices.SortStableFunc(s.Variants, func(a, b Variant) int { return cmp.Compare(b.Last.UnixNano(), a.Last.UnixNano()) })
	s.Variants = s.Variants[:min(len(s.Variants), maxVariants)]
}

// mix spreads the bits of a hash: FNV's low ones depend on little of a short text.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	return x ^ x>>33
}

func (v *Variant) add(st Start, now time.Time) {
	if v.Weight >= maxWeight {
		v.halve()
	}
	v.Starts++
	v.Last = now
	v.Weight++
	v.Bytes += st.Bytes
	v.Missed += st.Missed
	v.Misses += st.Misses
	v.Pull.add(st.Pull)
	if st.Reads > 0 {
		v.Reads.add(st.Pull + st.Reads)
	}
	if st.Ready > 0 {
		v.Ready.add(st.Pull + st.Ready)
	}
}

// halve makes what was added before count half, so that sums have a bound.
func (v *Variant) halve() {
	v.Weight, v.Bytes, v.Missed, v.Misses = v.Weight/2, v.Bytes/2, v.Missed/2, v.Misses/2
	for _, h := range []Histogram{v.Pull, v.Reads, v.Ready} {
		for i := range h {
			h[i] /= 2
		}
	}
}

// NodeCount returns about how many nodes have reported.
func (s *Summary) NodeCount() int {
	set := 0
	for _, b := range s.Nodes {
		set += bits.OnesCount8(b)
	}
	if set == 0 {
		return 0
	}
	// Linear counting: some nodes share a bit.
	empty := max(float64(nodeBits-set), 0.5)
	return int(math.Round(nodeBits * math.Log(nodeBits/empty)))
}

// Histogram counts times. Entry i is how many took more than bound(i-1), and bound(i) at most; trailing zeros are left out.
type Histogram []int64

// Bounds of the histogram: each a quarter more than the one before, so that a quantile is known to a few percent.
const (
	firstBound = 0.05 // seconds
	growth     = 1.25
	buckets    = 52 // the last bound is over an hour
)

func bound(i int) float64 { return firstBound * math.Pow(growth, float64(i)) }

func (h *Histogram) add(seconds float64) {
	i := sort.Search(buckets-1, func(i int) bool { return seconds <= bound(i) })
	for len(*h) <= i {
		*h = append(*h, 0)
	}
	(*h)[i]++
}

// Count is how many times it has.
func (h Histogram) Count() (n int64) {
	for _, c := range h {
		n += c
	}
	return n
}

// Quantile returns the time in seconds that a share q, 0 to 1, of the times is below; 0 of none. Within an entry times count as spread evenly.
func (h Histogram) Quantile(q float64) float64 {
	want := q * float64(h.Count())
	seen := 0.0
	for i, c := range h {
		if c == 0 || seen+float64(c) < want {
			seen += float64(c)
			continue
		}
		low := 0.0
		if i > 0 {
			low = bound(i - 1)
		}
		return low + (bound(i)-low)*(want-seen)/float64(c)
	}
	return 0
}

// Bucket is an entry of a histogram: Count times above Over seconds, and UpTo at most.
type Bucket struct {
	Over  float64 `json:"over"`
	UpTo  float64 `json:"upTo"`
	Count int64   `json:"count"`
}

// Buckets returns the entries that are not empty.
func (h Histogram) Buckets() []Bucket {
	list := []Bucket{}
	for i, c := range h {
		if c == 0 {
			continue
		}
		b := Bucket{UpTo: bound(i), Count: c}
		if i > 0 {
			b.Over = bound(i - 1)
		}
		list = append(list, b)
	}
	return list
}
