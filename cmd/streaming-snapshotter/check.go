package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streaming-snapshotter/traps"
	nodefs "github.com/streaming-snapshotter/streaming-snapshotter/fs"
)

// What `check` finds beside the traps of package traps.
const (
	nothingListed traps.Code = "NOTHING_LISTED" // every image is pulled in the normal way
	daemonDown    traps.Code = "DAEMON_DOWN"    // pulls fail
	safeMode      traps.Code = "SAFE_MODE"
	paused        traps.Code = "PAUSED"     // nothing new is streamed
	cacheTooLarge traps.Code = "CACHE_SIZE" // the disk is full before the cache is
	noHoles       traps.Code = "NO_HOLES"   // the cache gives nothing back
	noHTTPProxy   traps.Code = "NO_HTTP_PROXY"
	quarantined   traps.Code = "QUARANTINED" // containers get errors, and start no more
	unproven      traps.Code = "UNPROVEN"    // what runs may be anything

	otherHosts      traps.Code = "HOSTS_DIR"      // mirrors and certificates are others than containerd's
	otherContainerd traps.Code = "CRI_CONTAINERD" // the daemon asks where no containerd is
)

// checkReport is what `check -o json` prints.
type checkReport struct {
	Version    string           `json:"version"`
	Kernel     string           `json:"kernel"`
	MountMode  string           `json:"mount_mode"`
	NotTaken   string           `json:"not_taken,omitempty"` // the modes before it, and why
	Stream     patterns         `json:"stream"`
	Disk       diskReport       `json:"disk"`
	Daemon     string           `json:"daemon"` // its version; "" if it does not answer
	Containerd containerdReport `json:"containerd"`
	Traps      []traps.Trap     `json:"traps"`           // all of them
	Unknown    []string         `json:"unknown"`         // what could not be looked at, and why
	Image      *imageReport     `json:"image,omitempty"` // of REF
}

type checkOptions struct {
	ref        string // "" for none
	platform   string
	containerd string // its socket
	config     string // containerd's configuration; "" is that of the containerd that runs
	json       bool
}

// exitStatus is an error that says nothing more: all is printed.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// The exit status of check, for scripts.
const (
	checkFound   exitStatus = 1 // a trap, or REF would not be streamed
	checkUnknown exitStatus = 2 // wrong arguments, or something could not be looked at
)

func newCheckCommand(configFile *string) *cobra.Command {
	var o checkOptions
	var output string
	cmd := &cobra.Command{
		Use:   "check [REF]",
		Short: "Say how images would be mounted on this machine, what keeps them from being streamed, and whether REF would be",
		Long: `Looks at the kernel, the disk, the daemon and containerd's effective configuration, and names each trap with what to do about it.
With REF the registry's hosts are asked for the image, and its artifact is looked for as a pull does: by the daemon, with its configuration and
credentials, those too that came with pulls through its CRI proxy; or without them where no daemon answers. It changes nothing, and needs root.

Exit status: 0 if all is well and REF would be streamed, 1 if there is a trap or REF would not be streamed, 2 for wrong arguments, or if no trap was
found and something could not be looked at.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			c, err := loadConfig(*configFile)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				o.ref = args[0]
			}
			o.json, o.containerd = asJSON, cmp.Or(o.containerd, c.Containerd)
			return check(cmd.Context(), c, o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().StringVar(&o.platform, "platform", "", "os/arch[/variant] of an index (default: this machine's)")
	cmd.Flags().StringVar(&o.containerd, "containerd", "", "containerd's socket (default: the configuration's)")
	cmd.Flags().StringVar(&o.config, "containerd-config", "", "containerd's configuration file (default: that of the containerd that runs)")
	return cmd
}

// check prints what c makes of this machine, and of o.ref. It changes nothing. Its error is an exitStatus once something is printed.
func check(ctx context.Context, c config, o checkOptions, w io.Writer) (err error) {
	dir, remove, err := checkDir(c.Root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	r := checkReport{Version: version(), Kernel: kernel(), Stream: c.Stream, Traps: []traps.Trap{}, Unknown: []string{}}
	if err := r.checkMounts(c, dir); err != nil {
		return err
	}
	if len(c.Stream) == 0 {
		r.trap(nothingListed, "list repositories under `stream` in the configuration, and restart the daemon; where there is none, `install --stream` makes one", "no repository is listed in `stream`: every image is pulled in the normal way")
	}
	r.checkDisk(c, dir)
	r.checkDaemon(ctx, c)
	r.checkContainerd(ctx, c, o)
	r.checkProxies(peerOf(o.containerd), peerOf(adminSocket(c.Root)))
	if o.ref != "" {
		if r.Image, err = r.askImage(ctx, c, o, dir); err != nil {
			return err
		}
	}
	if err := r.print(w, o.json); err != nil {
		return err
	}
	switch {
	case len(r.Traps) > 0, r.Image != nil && r.Image.Reason != "":
		return checkFound
	case len(r.Unknown) > 0, r.Image != nil && r.Image.Unknown != "":
		return checkUnknown
	}
	return nil
}

// checkDir makes a directory for the files of a check, on the file system of root.
func checkDir(root string) (dir string, remove func() error, err error) {
	dir, err = os.MkdirTemp(existing(root), "streaming-snapshotter-check-")
	return dir, func() error { return os.RemoveAll(dir) }, err
}

func (r *checkReport) trap(c traps.Code, remedy, format string, a ...any) {
	r.Traps = append(r.Traps, traps.Trap{Code: c, Text: fmt.Sprintf(format, a...), Remedy: remedy})
}

func (r *checkReport) unknown(format string, a ...any) {
	r.Unknown = append(r.Unknown, fmt.Sprintf(format, a...))
}

// checkMounts tries the ways to mount in dir.
func (r *checkReport) checkMounts(c config, dir string) error {
	s, err := nodefs.New(nodefs.Options{Dir: filepath.Join(dir, "devices"), Mode: c.MountMode})
	if err != nil {
		return err
	}
	mode, why := s.Mode()
	r.MountMode, r.NotTaken = string(mode), why
	return s.Close()
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// existing returns path or the nearest directory above it that exists: what can be mounted depends on the file system there.
func existing(path string) string {
	for path != "/" {
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			break
		}
		path = filepath.Dir(path)
	}
	return path
}

func (r *checkReport) print(w io.Writer, asJSON bool) error {
	if asJSON {
		return sayJSON(w, r, true)
	}
	say(w, "mount mode: %s\n", r.MountMode)
	if r.NotTaken != "" {
		say(w, "not taken: %s\n", r.NotTaken)
	}
	say(w, "kernel: %s\nstream: %s\ndisk: %s\n", r.Kernel, r.Stream, r.Disk)
	if r.Daemon != "" {
		say(w, "daemon: %s\n", r.Daemon)
	}
	say(w, "containerd: %s\n", r.Containerd)
	for _, t := range r.Traps {
		say(w, "TRAP %s: %s\n  what to do: %s\n", t.Code, t.Text, t.Remedy)
	}
	for _, u := range r.Unknown {
		say(w, "UNKNOWN: %s\n", u)
	}
	if r.Image != nil {
		r.Image.print(w)
	}
	return nil
}
