package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// checkProxies compares the HTTP proxies that containerd and the daemon have been started with, both named by their process ID; 0 is one that does not run.
func (r *checkReport) checkProxies(containerd, daemon int) {
	if containerd <= 0 || daemon <= 0 {
		return // which is told elsewhere
	}
	theirs, err := proxiesOf(containerd)
	ours := map[string]bool{}
	if err == nil {
		ours, err = proxiesOf(daemon)
	}
	if err != nil {
		r.unknown("the HTTP proxies of containerd and the daemon: %v", err)
		return
	}
	for _, name := range []string{"HTTPS_PROXY", "HTTP_PROXY"} {
		if theirs[name] && !ours[name] {
			r.trap(noHTTPProxy, "give the daemon what containerd has: `systemctl edit streaming-snapshotter`, lines [Service] and Environment="+name+"=..., NO_PROXY as well, and restart it",
				"containerd has %s in its environment, and the daemon has not: it asks registries without the proxy", name)
			return
		}
	}
}

// proxiesOf returns which variables a process has that name a proxy, in capital letters: their values may hold passwords.
func proxiesOf(pid int) (has map[string]bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return nil, err
	}
	has = map[string]bool{}
	for e := range bytes.SplitSeq(b, []byte{0}) {
		if name, value, _ := strings.Cut(string(e), "="); value != "" {
			has[strings.ToUpper(name)] = true
		}
	}
	return has, nil
}
