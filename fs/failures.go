package fs

import (
	"log/slog"
	"sync"
	"time"
)

// maxFailures is how many failed reads of a session are logged in a minute. The first ones say what is wrong; a container that goes on
// reading would fill the log with the rest.
const maxFailures = 10

// failures logs failed reads. The zero value is ready.
type failures struct {
	mu     sync.Mutex
	begin  time.Time // of the minute
	lines  int       // in it
	hidden int       // not logged since the last line
}

// log logs a failed read, or counts it for the next line.
func (f *failures) log(l *slog.Logger, now time.Time, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now.Sub(f.begin) >= time.Minute {
		f.begin, f.lines = now, 0
	}
	if f.lines == maxFailures {
		f.hidden++
		return
	}
	f.lines++
	if f.hidden > 0 {
		args = append(args, "failed_before_and_not_logged", f.hidden)
		f.hidden = 0
	}
	l.Error("read", args...)
}
