package serve

import (
	"io"
	"os"
	"sync"
)

// openAudit opens the audit log for lines at its end.
func openAudit(name string, stdout io.Writer) (io.WriteCloser, error) {
	switch name {
	case "":
		return nopCloser{io.Discard}, nil
	case "-":
		return nopCloser{stdout}, nil
	}
	a := &auditFile{name: name}
	return a, a.open()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// auditFile is a file that gets lines at its end; when it was moved away or removed, as logrotate does, the next line begins another one.
type auditFile struct {
	name string

	mu   sync.Mutex
	file *os.File
}

func (a *auditFile) open() (err error) {
	a.file, err = os.OpenFile(a.name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	return err
}

func (a *auditFile) Write(line []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	named, err := os.Stat(a.name)
	opened, err2 := a.file.Stat()
	if err != nil || err2 != nil || !os.SameFile(named, opened) {
		old := a.file
		if err := a.open(); err != nil {
			a.file = old // better there than nowhere
			n, _ := a.file.Write(line)
			return n, err
		}
		old.Close()
	}
	return a.file.Write(line)
}

func (a *auditFile) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file.Close()
}
