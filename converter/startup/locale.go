package startup

import (
	"bytes"
	"encoding/binary"
	"path"
	"strings"
)

const localeArchive = "/usr/lib/locale/locale-archive"

// locale takes what setlocale(LC_ALL, "") of glibc reads for the locale that the environment names.
func (f *finder) locale() {
	name := ""
	for _, k := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if name == "" {
			name = f.env[k]
		}
	}
	if name == "" || name == "C" || name == "POSIX" {
		return
	}
	f.takeAll("/usr/lib/*/gconv/gconv-modules.cache", "/usr/lib/gconv/gconv-modules.cache", "/usr/lib64/gconv/gconv-modules.cache")
	lang, charset, _ := strings.Cut(name, ".")
	name = lang + "." + strings.ReplaceAll(strings.ToLower(charset), "-", "")
	if n := f.regular(localeArchive); n != nil {
		head := make([]byte, min(n.Size, 256<<10))
		if f.readAt(n, head, 0) {
			for _, s := range archived(head, name) {
				f.take(n, s.off, s.size)
			}
		}
	}
	f.takeAll(path.Join("/usr/lib/locale", name, "*"), path.Join("/usr/lib/locale", name, "LC_MESSAGES/*"))
}

// timeZone takes what tzset(3) reads: who writes a log asks for the time.
func (f *finder) timeZone() {
	at := "/etc/localtime"
	if name := strings.TrimPrefix(f.env["TZ"], ":"); path.IsAbs(name) {
		at = name
	} else if name != "" {
		at = path.Join("/usr/share/zoneinfo", name)
	}
	f.takeWhole(f.regular(at))
}

// archived returns what is read of a locale archive for a locale: its head, and the data of each category, of which only the
// beginning is read where they are large. (The format is glibc's locale/locarchive.h.)
func archived(b []byte, name string) (runs []span) {
	const (
		header     = 14 * 4 // magic, serial, then (offset, used, size) of name hashes, strings and records, ...
		recordSize = 4 + 13*8
		begin      = 64 << 10
	)
	order := binary.LittleEndian
	if len(b) < header || order.Uint32(b) != 0xde020109 {
		return nil
	}
	table, size := uint64(order.Uint32(b[8:])), uint64(order.Uint32(b[16:]))
	if table > uint64(len(b)) || size > (uint64(len(b))-table)/12 {
		return nil
	}
	for e := b[table : table+size*12]; len(e) > 0; e = e[12:] { // hash, name, record
		at, record := uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:]))
		if at == 0 || at >= uint64(len(b)) || record+recordSize > uint64(len(b)) {
			continue
		}
		if s, _, _ := bytes.Cut(b[at:min(uint64(len(b)), at+256)], []byte{0}); string(s) != name {
			continue
		}
		runs = append(runs, span{0, int64(min(len(b), begin))}, span{int64(record), recordSize})
		for r := b[record+4 : record+recordSize]; len(r) > 0; r = r[8:] {
			runs = append(runs, span{int64(order.Uint32(r)), int64(min(order.Uint32(r[4:]), begin))})
		}
	}
	return runs
}
