package startup

import (
	"encoding/binary"
	"slices"
	"sort"
	"strings"
)

// Machines whose calls are understood.
const (
	machineAMD64 = 62
	machineARM64 = 183
)

const (
	maxFunction  = 1 << 20 // bytes of code looked at in one
	maxFunctions = 1 << 20 // of one object
	maxNames     = 1 << 20 // symbols of the objects of one program: each takes some 200 bytes
)

// code is what is known of an object's code: where its functions begin, and which symbols its calls through the GOT lead to.
type code struct {
	o       *object
	starts  []uint64            // of the functions, sorted: from the table for unwinding
	got     map[uint64]string   // slot -> symbol
	reached map[uint64]struct{} // starts of functions that were added
}

func newCode(o *object, symbols []symbol) *code {
	c := &code{o: o, got: map[uint64]string{}, reached: map[uint64]struct{}{}}
	c.readStarts()
	names := make(map[uint32]string, len(symbols))
	for _, s := range symbols {
		names[s.index] = s.name
	}
	for _, t := range [][2]uint64{{dtJmpRel, dtPltRelSz}, {dtRela, dtRelaSz}} {
		b := o.table(o.dynamic[t[0]], o.dynamic[t[1]]/relaSize*relaSize, maxRelocs*relaSize)
		for ; len(b) > 0; b = b[relaSize:] {
			if i := o.order.Uint64(b[8:]) >> 32; i != 0 {
				if name := names[uint32(i)]; name != "" {
					c.got[o.order.Uint64(b)] = name
				}
			}
		}
	}
	return c
}

// readStarts reads .eh_frame_hdr: a table of (function, its unwinding), 32-bit numbers relative to the table, as all linkers write it.
func (c *code) readStarts() {
	s := c.o.segment(ptGNUEHFrame)
	if s == nil {
		return
	}
	b := c.o.table(s.addr, s.fileSize, 12+8*maxFunctions)
	if len(b) < 12 || b[0] != 1 || b[2] != 0x03 || b[3] != 0x3b {
		return
	}
	n := int(min(uint64(c.o.order.Uint32(b[8:])), uint64(len(b)-12)/8))
	c.starts = make([]uint64, 0, n)
	for i := range n {
		at := s.addr + uint64(int64(int32(c.o.order.Uint32(b[12+8*i:]))))
		if len(c.starts) == 0 || at > c.starts[len(c.starts)-1] {
			c.starts = append(c.starts, at)
		}
	}
}

// function returns the function that holds addr and where it ends at most; ok is false where there is none.
func (c *code) function(addr uint64) (start, end uint64, ok bool) {
	i := sort.Search(len(c.starts), func(i int) bool { return c.starts[i] > addr })
	if i == 0 {
		return 0, 0, false
	}
	start, end = c.starts[i-1], c.starts[i-1]+maxFunction
	if i < len(c.starts) {
		end = min(end, c.starts[i])
	}
	for _, s := range c.o.segments {
		if s.typ == ptLoad && s.flags&flagExec != 0 && start >= s.addr && start < s.addr+s.fileSize {
			return start, min(end, s.addr+s.fileSize), true
		}
	}
	return 0, 0, false
}

// calls returns what the code at addr calls, as far as that is written in it: functions of the object and symbols.
func (c *code) calls(addr uint64, b []byte) (functions []uint64, symbols []string) {
	to := func(target uint64) {
		if start, _, ok := c.function(target); ok && start == target {
			functions = append(functions, target)
		} else if name := c.stub(target); name != "" {
			symbols = append(symbols, name)
		}
	}
	switch c.o.machine {
	case machineAMD64:
		// Not decoded but looked for: a number that happens to be the distance to a function's first byte is rare.
		for i := 0; i+5 <= len(b); i++ {
			switch op := b[i]; {
			case op|4 == 0x4c && b[i+1] == 0x8d && b[i+2]&0xc7 == 0x05 && i+7 <= len(b): // lea: a function that something is told to call
				to(addr + uint64(i) + 7 + rel32(b[i+3:]))
			case op == 0xe8 || op == 0xe9: // call, jmp
				to(addr + uint64(i) + 5 + rel32(b[i+1:]))
			case op == 0xff && (b[i+1] == 0x15 || b[i+1] == 0x25) && i+6 <= len(b): // through a slot
				if name := c.got[addr+uint64(i)+6+rel32(b[i+2:])]; name != "" {
					symbols = append(symbols, name)
				}
			}
		}
	case machineARM64:
		for i := 0; i+4 <= len(b); i += 4 {
			if w := binary.LittleEndian.Uint32(b[i:]); w&0x7c000000 == 0x14000000 { // b, bl
				to(addr + uint64(i) + uint64(int64(int32(w<<6)>>6)*4))
			}
		}
	}
	return functions, symbols
}

func rel32(b []byte) uint64 { return uint64(int64(int32(binary.LittleEndian.Uint32(b)))) }

// stub returns the symbol that an entry of the procedure linkage table jumps to.
func (c *code) stub(addr uint64) string {
	off := c.o.offset(addr, 16)
	if off < 0 {
		return ""
	}
	b := make([]byte, 16)
	if _, err := c.o.r.ReadAt(b, off); err != nil {
		return ""
	}
	switch c.o.machine {
	case machineAMD64:
		for i := 0; i+6 <= len(b); i++ {
			if b[i] == 0xff && b[i+1] == 0x25 {
				return c.got[addr+uint64(i)+6+rel32(b[i+2:])]
			}
		}
	case machineARM64:
		adrp, ldr := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		if adrp&0x9f00001f == 0x90000010 && ldr&0xffc003ff == 0xf9400211 { // adrp x16, page; ldr x17, [x16, #n]
			page := int64(int32((adrp>>5&0x7ffff)<<2|adrp>>29&3)<<11>>11) << 12
			return c.got[uint64(int64(addr&^4095)+page)+uint64(ldr>>10&0xfff)*8]
		}
	}
	return ""
}

// callGraph finds which functions of a program's libraries may run.
type callGraph struct {
	f       *finder
	libs    []*lib
	codes   []*code
	exports map[string]callee // the first library's that has the name
	todo    []callee          // each function once
}

// callee is an address in a library's code.
type callee struct {
	lib  int
	addr uint64
}

func (f *finder) newCallGraph(libs []*lib) *callGraph {
	g := &callGraph{f: f, libs: libs, exports: map[string]callee{}}
	left := maxNames
	for i, l := range libs {
		symbols := l.obj.symbols(left)
		left -= len(symbols)
		for _, s := range symbols {
			if e, ok := g.exports[s.name]; s.defined && (!ok || e.lib == i) {
				g.exports[s.name] = callee{i, s.addr}
			}
		}
		g.codes = append(g.codes, newCode(l.obj, symbols))
	}
	return g
}

// add adds the function that an address is in.
func (g *callGraph) add(at callee) {
	c := g.codes[at.lib]
	start, end, ok := c.function(at.addr)
	if _, done := c.reached[start]; !ok || done || !g.f.step(int64(end-start)/64+1) {
		return
	}
	c.reached[start] = struct{}{}
	g.todo = append(g.todo, callee{at.lib, start})
}

// symbol adds the function of the name.
func (g *callGraph) symbol(name string) {
	if at, ok := g.exports[name]; ok {
		g.add(at)
	}
}

// follow takes all functions that may be reached from those that were added.
func (g *callGraph) follow() {
	for len(g.todo) > 0 {
		at := g.todo[len(g.todo)-1]
		g.todo = g.todo[:len(g.todo)-1]
		l, c := g.libs[at.lib], g.codes[at.lib]
		start, end, _ := c.function(at.addr)
		off := c.o.offset(start, end-start)
		if off < 0 {
			continue
		}
		b := make([]byte, end-start)
		if !g.f.readAt(l.n, b, off) {
			continue
		}
		g.f.take(l.n, off, int64(len(b)))
		functions, symbols := c.calls(start, b)
		for _, fn := range functions {
			g.add(callee{at.lib, fn})
		}
		for _, name := range symbols {
			g.symbol(name)
		}
	}
}

// initializers adds what runs when library i is loaded: its constructors; and the functions whose names begin so.
func (g *callGraph) initializers(i int, prefix string) {
	for _, fn := range g.libs[i].obj.initFns {
		g.add(callee{i, fn})
	}
	if prefix == "" {
		return
	}
	var names []string
	for name, at := range g.exports {
		if at.lib == i && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	for slices.Sort(names); len(names) > 0; names = names[1:] {
		g.symbol(names[0])
	}
}

// slots returns the functions in tables of (number, function) that hold the number before them: Py_mod_exec is 2, and runs when a module is
// imported.
func (c *code) slots(number uint64) (functions []uint64) {
	for _, s := range c.o.segments {
		if s.typ != ptLoad || s.flags&flagWrite == 0 {
			continue
		}
		data := c.o.table(s.addr, s.fileSize, maxText)
		b := c.o.table(c.o.dynamic[dtRela], c.o.dynamic[dtRelaSz]/relaSize*relaSize, maxRelocs*relaSize)
		for ; len(b) > 0; b = b[relaSize:] {
			at, sym := c.o.order.Uint64(b)-s.addr, c.o.order.Uint64(b[8:])>>32
			if sym == 0 && at >= 8 && at < uint64(len(data)) && c.o.order.Uint64(data[at-8:]) == number {
				functions = append(functions, c.o.order.Uint64(b[16:]))
			}
		}
	}
	return functions
}
