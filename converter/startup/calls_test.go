package startup

import (
	"bytes"
	"encoding/binary"
	"math"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/fs/erofs"
)

const testCode = 0x1000 // where an object's code is, in the file and in memory

// testObject is an object of amd64 with functions of the sizes, which code fills, and symbols that are all functions of the name at an offset of names.
func testObject(t testing.TB, code []byte, starts []int, symbols []uint32, names string) *lib {
	t.Helper()
	le := binary.LittleEndian
	b := append(make([]byte, testCode), code...)
	align := func() uint64 {
		b = append(b, make([]byte, -len(b)&15)...)
		return uint64(len(b))
	}
	frames := align()
	b = append(b, 1, 0, 0x03, 0x3b, 0, 0, 0, 0)
	b = le.AppendUint32(b, uint32(len(starts)))
	for _, s := range starts {
		b = le.AppendUint32(b, uint32(int64(testCode+s)-int64(frames)))
		b = le.AppendUint32(b, 0)
	}
	framesEnd, symtab := uint64(len(b)), align()
	b = append(b, make([]byte, len(symbols)*symSize)...)
	for i, name := range symbols {
		s := b[int(symtab)+i*symSize:]
		le.PutUint32(s, name)
		le.PutUint16(s[6:], 1)
		le.PutUint64(s[8:], testCode)
	}
	strtab := uint64(len(b))
	b = append(b, names...)
	obj := &object{r: bytes.NewReader(b), order: le, machine: machineAMD64, dynamic: map[uint64]uint64{
		dtSymTab: symtab, dtStrTab: strtab, dtStrSz: uint64(len(names)),
	}}
	obj.segments = []segment{
		{typ: ptLoad, flags: flagExec, fileSize: uint64(len(b))},
		{typ: ptGNUEHFrame, addr: frames, off: frames, fileSize: framesEnd - frames},
	}
	return &lib{n: &erofs.Inode{Mode: unix.S_IFREG, Size: int64(len(b)), Data: b}, obj: obj}
}

// call appends a call at the end of b, which begins at testCode, to an offset.
func call(b []byte, to int) []byte {
	return binary.LittleEndian.AppendUint32(append(b, 0xe8), uint32(to-len(b)-5))
}

func testFinder() *finder { return &finder{bytes: maxRead, taken: maxTaken, steps: maxSteps} }

// TestCalls: a function is followed once, however often it is called, and what was not called is not.
func TestCalls(t *testing.T) {
	const size, functions = 100_000, 5 // of each
	var code []byte
	var starts []int
	for i := range functions {
		starts = append(starts, i*size)
		for len(code)+5 <= (i+1)*size {
			code = call(code, (i+1)%(functions-1)*size) // a ring of all but the last
		}
	}
	l := testObject(t, code, starts, nil, "")
	f := testFinder()
	g := f.newCallGraph([]*lib{l})
	g.add(callee{0, testCode})
	g.follow()
	if n := len(g.codes[0].reached); n != functions-1 {
		t.Errorf("%d functions were reached, want %d", n, functions-1)
	}
	if most := 16; cap(g.todo) > most {
		t.Errorf("%d calls waited to be followed, want at most %d", cap(g.todo), most)
	}
}

// TestManySymbols: neither names that overlap nor many objects take memory without bound.
func TestManySymbols(t *testing.T) {
	var offsets []uint32
	for i := range maxSymbols {
		offsets = append(offsets, uint32(1+i%100))
	}
	names := "\x00" + strings.Repeat("x", 500) + "\x00"
	l := testObject(t, nil, nil, offsets, names)
	got := uint64(math.MaxUint64)
	for range 5 { // of which the least is that of symbols alone: the runtime and other goroutines allocate, too
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		symbols := l.obj.symbols(maxSymbols)
		runtime.ReadMemStats(&after)
		if len(symbols) != maxSymbols {
			t.Fatalf("%d symbols, want %d", len(symbols), maxSymbols)
		}
		got = min(got, after.TotalAlloc-before.TotalAlloc)
	}
	if most := uint64(3*symSize*maxSymbols + 4*len(names)); got > most {
		t.Errorf("%d bytes were allocated for symbols, want at most %d", got, most)
	}

	var libs []*lib
	for i := range maxNames/maxSymbols + 1 {
		names := make([]byte, 0, 9*maxSymbols)
		for n := range maxSymbols {
			names = append(names, 0)
			offsets[n] = uint32(len(names))
			names = strconv.AppendInt(names, int64(1_000_000*i+n), 10)
		}
		libs = append(libs, testObject(t, nil, nil, offsets, string(append(names, 0))))
	}
	if g := testFinder().newCallGraph(libs); len(g.exports) != maxNames {
		t.Errorf("%d names, want %d", len(g.exports), maxNames)
	}
}
