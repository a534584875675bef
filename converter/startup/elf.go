package startup

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
)

const elfMagic = "\x7fELF"

// What of ELF is needed here. (System V ABI, "Object Files" and "Program Loading and Dynamic Linking".)
const (
	elf64 = 2 // EI_CLASS

	ptLoad       = 1
	ptDynamic    = 2
	ptInterp     = 3
	ptGNUEHFrame = 0x6474e550

	flagExec  = 1
	flagWrite = 2

	dtNeeded    = 1
	dtPltRelSz  = 2
	dtHash      = 4
	dtStrTab    = 5
	dtSymTab    = 6
	dtRela      = 7
	dtRelaSz    = 8
	dtStrSz     = 10
	dtInit      = 12
	dtRPath     = 15
	dtJmpRel    = 23
	dtInitArr   = 25
	dtInitArrSz = 27
	dtRunPath   = 29
	dtRelrSz    = 35
	dtRelr      = 36
	dtGNUHash   = 0x6ffffef5
	dtVerDef    = 0x6ffffffc
	dtVerNeed   = 0x6ffffffe
	dtVerSym    = 0x6ffffff0

	relaSize = 24
	symSize  = 24
)

// Limits on one object.
const (
	maxSegments = 64
	maxDynamic  = 1024      // entries of the dynamic section
	maxRelocs   = 2 << 20   // relocations
	maxStrings  = 512       // bytes of a name
	maxSymbols  = 512 << 10 // of the dynamic symbol table
)

var errELF = errors.New("not an ELF object that is understood")

// segment is a program header.
type segment struct {
	typ, flags           uint32
	off, addr            uint64
	fileSize, memorySize uint64
}

// object is an ELF file as the dynamic linker sees it: its section headers do not count.
type object struct {
	r        io.ReaderAt
	order    binary.ByteOrder
	machine  uint16
	segments []segment
	interp   string
	dynamic  map[uint64]uint64 // the last value of each tag
	needed   []string
	rpath    string
	runpath  string
	initFns  []uint64 // addresses of functions that run when the object is loaded
	pages    []uint64 // addresses that relocations write to
	headers  uint64   // end of the program headers in the file
}

// span is a run of a file, bytes.
type span struct{ off, size int64 }

// parseELF reads a 64-bit object of size bytes.
func parseELF(r io.ReaderAt, size int64) (*object, error) {
	head := make([]byte, 64)
	if _, err := r.ReadAt(head, 0); err != nil || string(head[:4]) != elfMagic || head[4] != elf64 {
		return nil, errELF
	}
	o := &object{r: r, order: binary.LittleEndian, dynamic: map[uint64]uint64{}}
	if head[5] == 2 {
		o.order = binary.BigEndian
	}
	o.machine = o.order.Uint16(head[18:])
	phoff, phentsize, phnum := o.order.Uint64(head[32:]), o.order.Uint16(head[54:]), o.order.Uint16(head[56:])
	if phentsize != 56 || phnum > maxSegments || phoff > uint64(size) {
		return nil, errELF
	}
	b := make([]byte, int(phnum)*56)
	if _, err := r.ReadAt(b, int64(phoff)); err != nil {
		return nil, errELF
	}
	o.headers = phoff + uint64(len(b))
	for ; len(b) > 0; b = b[56:] {
		s := segment{
			typ: o.order.Uint32(b), flags: o.order.Uint32(b[4:]), off: o.order.Uint64(b[8:]), addr: o.order.Uint64(b[16:]),
			fileSize: o.order.Uint64(b[32:]), memorySize: o.order.Uint64(b[40:]),
		}
		if s.off > uint64(size) || s.fileSize > uint64(size)-s.off || s.addr > math.MaxInt64-s.fileSize {
			return nil, errELF
		}
		o.segments = append(o.segments, s)
	}
	if s := o.segment(ptInterp); s != nil {
		o.interp = o.stringAt(int64(s.off))
	}
	o.readDynamic()
	return o, nil
}

func (o *object) segment(typ uint32) *segment {
	for i := range o.segments {
		if o.segments[i].typ == typ {
			return &o.segments[i]
		}
	}
	return nil
}

// stringAt returns the string at a file offset.
func (o *object) stringAt(off int64) string {
	for n := maxStrings; n > 0; n /= 2 { // the end of the file may be near
		b := make([]byte, n)
		if _, err := o.r.ReadAt(b, off); err != nil {
			continue
		}
		if i := slices.Index(b, 0); i >= 0 {
			return string(b[:i])
		}
		return ""
	}
	return ""
}

// offset returns where size bytes at a virtual address lie in the file, or -1.
func (o *object) offset(addr, size uint64) int64 {
	for _, s := range o.segments {
		if s.typ == ptLoad && addr >= s.addr && addr-s.addr <= s.fileSize && size <= s.fileSize-(addr-s.addr) {
			return int64(s.off + addr - s.addr)
		}
	}
	return -1
}

func (o *object) readDynamic() {
	d := o.segment(ptDynamic)
	if d == nil {
		return
	}
	b := make([]byte, min(d.fileSize, maxDynamic*16)/16*16)
	if _, err := o.r.ReadAt(b, int64(d.off)); err != nil {
		return
	}
	var needed []uint64
	for ; len(b) > 0; b = b[16:] {
		tag, v := o.order.Uint64(b), o.order.Uint64(b[8:])
		if tag == 0 {
			break
		}
		if tag == dtNeeded {
			needed = append(needed, v)
		}
		o.dynamic[tag] = v
	}
	strtab := o.offset(o.dynamic[dtStrTab], 1)
	name := func(v uint64) string {
		if strtab < 0 || v > math.MaxInt32 {
			return ""
		}
		return o.stringAt(strtab + int64(v))
	}
	for _, v := range needed {
		o.needed = append(o.needed, name(v))
	}
	if v, ok := o.dynamic[dtRPath]; ok {
		o.rpath = name(v)
	}
	if v, ok := o.dynamic[dtRunPath]; ok {
		o.runpath = name(v)
	}
}

// table reads n bytes at a virtual address, or nil.
func (o *object) table(addr, n, max uint64) []byte {
	n = min(n, max)
	off := o.offset(addr, n)
	if addr == 0 || n == 0 || off < 0 {
		return nil
	}
	b := make([]byte, n)
	if _, err := o.r.ReadAt(b, off); err != nil {
		return nil
	}
	return b
}

// readRelocations finds the pages that the dynamic linker writes to, and the functions that it runs.
func (o *object) readRelocations() {
	arr, arrEnd := o.dynamic[dtInitArr], o.dynamic[dtInitArr]+o.dynamic[dtInitArrSz]
	if init := o.dynamic[dtInit]; init != 0 {
		o.initFns = append(o.initFns, init)
	}
	for b := o.table(arr, o.dynamic[dtInitArrSz]/8*8, 1<<20); len(b) > 0; b = b[8:] {
		if fn := o.order.Uint64(b); fn != 0 {
			o.initFns = append(o.initFns, fn)
		}
	}
	page := func(addr uint64) {
		if addr &^= 4095; len(o.pages) == 0 || o.pages[len(o.pages)-1] != addr {
			o.pages = append(o.pages, addr)
		}
	}
	for _, t := range [][2]uint64{{dtRela, dtRelaSz}, {dtJmpRel, dtPltRelSz}} {
		b := o.table(o.dynamic[t[0]], o.dynamic[t[1]]/relaSize*relaSize, maxRelocs*relaSize)
		for ; len(b) > 0; b = b[relaSize:] {
			at, info, addend := o.order.Uint64(b), o.order.Uint64(b[8:]), o.order.Uint64(b[16:])
			page(at)
			if at >= arr && at < arrEnd || isIRelative(o.machine, uint32(info)) {
				o.initFns = append(o.initFns, addend)
			}
		}
	}
	var at uint64
	for b := o.table(o.dynamic[dtRelr], o.dynamic[dtRelrSz]/8*8, maxRelocs*8); len(b) > 0; b = b[8:] {
		e := o.order.Uint64(b)
		if e&1 == 0 {
			page(e)
			at = e + 8
			continue
		}
		if e != 1 {
			page(at)
			page(at + 62*8)
		}
		at += 63 * 8
	}
	slices.Sort(o.pages)
	o.pages = slices.Compact(o.pages)
}

// isIRelative: relocations whose value a function of the object returns.
func isIRelative(machine uint16, typ uint32) bool {
	return machine == 62 && typ == 37 || machine == 183 && typ == 1032
}

// linking returns the runs of the file that are read when the object is loaded and linked, with the functions that are run by that.
func (o *object) linking() (runs []span) {
	add := func(addr, size uint64) {
		if off := o.offset(addr, size); off >= 0 {
			runs = append(runs, span{off, int64(size)})
		}
	}
	runs = append(runs, span{0, int64(o.headers)})
	if d := o.segment(ptDynamic); d != nil {
		runs = append(runs, span{int64(d.off), int64(d.fileSize)})
	}
	// Hashes, symbols, their names and versions, and relocations lie together.
	lo, hi := uint64(math.MaxUint64), uint64(0)
	for _, tag := range []uint64{dtHash, dtGNUHash, dtSymTab, dtStrTab, dtVerSym, dtVerNeed, dtVerDef, dtRela, dtRelr, dtJmpRel} {
		if v := o.dynamic[tag]; v != 0 && o.offset(v, 1) >= 0 {
			lo, hi = min(lo, v), max(hi, v+1)
		}
	}
	for _, t := range [][2]uint64{{dtStrTab, dtStrSz}, {dtRela, dtRelaSz}, {dtRelr, dtRelrSz}, {dtJmpRel, dtPltRelSz}} {
		if v := o.dynamic[t[0]]; v != 0 && o.offset(v, o.dynamic[t[1]]) >= 0 {
			hi = max(hi, v+o.dynamic[t[1]])
		}
	}
	if lo < hi {
		add(lo, hi-lo)
	}
	for _, p := range o.pages {
		for _, s := range o.segments { // a page is read as far as the segment has bytes for it
			if s.typ == ptLoad && p+4096 > s.addr && p < s.addr+s.fileSize {
				from, to := max(p, s.addr), min(p+4096, s.addr+s.fileSize)
				runs = append(runs, span{int64(s.off + from - s.addr), int64(to - from)})
			}
		}
	}
	for _, s := range o.segments {
		if s.typ == ptLoad && s.memorySize > s.fileSize && s.fileSize > 0 && s.flags&flagWrite != 0 {
			add(s.addr+s.fileSize-1, 1) // the rest of the page is cleared
		}
	}
	for _, fn := range o.initFns {
		add(fn, 1)
	}
	return runs
}

// loaded returns the runs of the file that a program may read of the object: its segments without the tables for unwinding.
func (o *object) loaded() (runs []span) {
	var unwind uint64 = math.MaxUint64
	if s := o.segment(ptGNUEHFrame); s != nil {
		unwind = s.off
	}
	for _, s := range o.segments {
		if s.typ != ptLoad || s.fileSize == 0 {
			continue
		}
		end := s.off + s.fileSize
		if s.off <= unwind && unwind < end {
			end = unwind
		}
		runs = append(runs, span{int64(s.off), int64(end - s.off)})
	}
	return runs
}

// symbol is a function or object of the dynamic symbol table.
type symbol struct {
	name       string
	index      uint32
	addr, size uint64
	defined    bool
}

// symbols reads the dynamic symbol table, whose end is where its names begin, as linkers lay it out; at most so many entries of it. The names share
// the memory of their table: they may overlap.
func (o *object) symbols(most int) (list []symbol) {
	at, names := o.dynamic[dtSymTab], o.dynamic[dtStrTab]
	if at == 0 || names <= at {
		return nil
	}
	strs := string(o.table(names, o.dynamic[dtStrSz], 32<<20))
	b := o.table(at, (names-at)/symSize*symSize, uint64(min(most, maxSymbols))*symSize)
	list = make([]symbol, 0, len(b)/symSize)
	for index := uint32(0); len(b) > 0; index, b = index+1, b[symSize:] {
		name := uint64(o.order.Uint32(b))
		if name == 0 || name >= uint64(len(strs)) {
			continue
		}
		s := strs[name:min(uint64(len(strs)), name+maxStrings)]
		if i := strings.IndexByte(s, 0); i >= 0 {
			list = append(list, symbol{name: s[:i], index: index, addr: o.order.Uint64(b[8:]), size: o.order.Uint64(b[16:]), defined: o.order.Uint16(b[6:]) != 0})
		}
	}
	return list
}
