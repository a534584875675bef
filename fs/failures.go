package fs

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// maxLines is how many failed reads of a session are logged in a minute. The first ones say what is wrong; a container that goes on
// reading would fill the log with the rest.
const maxLines = 10

// LogLimit logs at most ten lines a minute, and in the next one how many there were besides. The zero value is ready, for many goroutines.
type LogLimit struct {
	mu     sync.Mutex
	begin  time.Time // of the minute
	lines  int       // in it
	hidden int       // not logged since the last line
}

// Log logs, or counts for the next line.
func (f *LogLimit) Log(l *slog.Logger, now time.Time, level slog.Level, msg string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now.Sub(f.begin) >= time.Minute {
		f.begin, f.lines = now, 0
	}
	if f.lines == maxLines {
		f.hidden++
		return
	}
	f.lines++
	if f.hidden > 0 {
		args = append(args, "before_and_not_logged", f.hidden)
		f.hidden = 0
	}
	l.Log(context.Background(), level, msg, args...)
}
