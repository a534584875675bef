package fs

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// watchInterval is how often the caller of an interrupted READ is looked at. It bounds how long a killed process stays.
const watchInterval = 20 * time.Millisecond

// interrupted marks a READ's slot, in a field that the kernel does not use, for a successor: the kernel does not tell it again.
const interrupted = 1

// interrupt handles INTERRUPT: the caller of request unique has got a signal.
//
// Any signal makes the kernel send it, once, be it the tick of a profiler. An answer EINTR fails the system call, or the page fault
// with SIGBUS, and hardly a program expects that of a file. So a READ is cancelled only when its caller is being killed, as on a
// local disk. Because the kernel does not tell when a second signal kills, the caller is watched until the READ is answered.
//
// By the protocol, INTERRUPT is answered only if its request is not known, with EAGAIN: the kernel then sends it again if the request
// is still waiting. That happens when one reader overtakes another.
func (s *session) interrupt(self, unique uint64) {
	s.mu.Lock()
	r := s.reads[unique&^resent]
	watched := false
	if r != nil {
		watched, r.watched = r.watched, true
		r.slot.readIn().Padding = interrupted
	}
	s.mu.Unlock()
	switch {
	case r == nil:
		s.reply(self, fuse.EAGAIN, nil)
	case !watched:
		s.work.Go(func() { watch(r) })
	}
}

// watch cancels r when its caller is being killed, and returns when r is done.
func watch(r *reading) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		if dying(r.in.Pid) {
			r.cancel()
			return
		}
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// dying reports whether thread tid is gone or has SIGKILL pending, which the kernel gives to all threads of a process on
// any fatal signal. It does not know of threads outside of its PID namespace (tid is 0): their reads end by themselves.
func dying(tid uint32) bool {
	if tid == 0 {
		return false
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return os.IsNotExist(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		pending, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && pending&(1<<(syscall.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}
