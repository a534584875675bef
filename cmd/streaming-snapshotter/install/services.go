package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streaming-snapshotter/streaming-snapshotter/deploy"
)

// services is what runs the daemon on a host.
type services interface {
	// files are those that have it run.
	files() []file
	// there reports whether the host has the daemon, running or not.
	there(ctx context.Context) bool
	// running reports whether the daemon, or who runs it, does: one that crashes and is started again, too.
	running(ctx context.Context) bool
	// reload takes note of changed files.
	reload(ctx context.Context) error
	// start runs the daemon that is installed, in the place of the one that runs.
	start(ctx context.Context) error
	// stop ends it, and if all is true what keeps its mounts.
	stop(ctx context.Context, all bool) error
	// restartContainerd is the command that does.
	restartContainerd(unit string) []string
	// allowRestart has that command work however often containerd was started of late.
	allowRestart(ctx context.Context, command []string)
}

// Systemd reports whether systemd runs this host (sd_booted(3)).
func Systemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// findServices asks the host who runs its services.
func findServices(ctx context.Context, o Options) (services, error) {
	if !Systemd() {
		if len(o.Restart) == 0 {
			return nil, errors.New("this host has no systemd: say with --restart-containerd how containerd is restarted on it")
		}
		return &supervised{o}, nil
	}
	out, err := output(ctx, "systemctl", "--version")
	if err != nil {
		return nil, err
	}
	m := regexp.MustCompile(`^systemd (\d+)`).FindStringSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("systemctl --version says %q", out)
	}
	s := &systemd{o: o}
	s.version, err = strconv.Atoi(m[1])
	return s, err
}

// systemd is a host with systemd.
type systemd struct {
	o       Options
	version int
}

const (
	unitDir    = "/etc/systemd/system/"
	unit       = "streaming-snapshotter.service"
	keeperUnit = "streaming-snapshotter-keeper.service"
	dropIn254  = unitDir + unit + ".d/systemd-254.conf"
)

// keeper reports whether the keeper's unit keeps the descriptors: before 254 nobody else does, and a host that has it stays with it, for
// what it keeps cannot be handed over.
func (s *systemd) keeper() bool {
	if s.version < 254 {
		return true
	}
	_, err := os.Stat(unitDir + keeperUnit)
	return err == nil
}

func (s *systemd) files() []file {
	enabled := func(name string) file {
		return file{Path: unitDir + "multi-user.target.wants/" + name, Link: unitDir + name}
	}
	list := []file{regular(unitDir+unit, 0o644, deploy.Unit), enabled(unit)}
	if s.keeper() {
		return append(list, regular(unitDir+keeperUnit, 0o644, deploy.KeeperUnit), enabled(keeperUnit))
	}
	return append(list, regular(dropIn254, 0o644, deploy.Systemd254))
}

// show returns a property of a unit, "" if there is none.
func (s *systemd) show(ctx context.Context, unit, property string) string {
	out, err := output(ctx, "systemctl", "show", "--property", property, "--value", unit)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(out)
}

func (s *systemd) there(ctx context.Context) bool {
	return s.show(ctx, unit, "LoadState") == "loaded" || s.running(ctx)
}

func (s *systemd) running(ctx context.Context) bool {
	return slices.Contains([]string{"active", "activating", "reloading"}, s.show(ctx, unit, "ActiveState"))
}

func (s *systemd) reload(ctx context.Context) error {
	return run(ctx, "systemctl", "daemon-reload")
}

func (s *systemd) start(ctx context.Context) error {
	if err := s.reload(ctx); err != nil {
		return err
	}
	if _, err := os.Stat(unitDir + keeperUnit); err == nil {
		if err := run(ctx, "systemctl", "start", keeperUnit); err != nil {
			return err
		}
	}
	return run(ctx, "systemctl", "restart", unit)
}

func (s *systemd) stop(ctx context.Context, all bool) error {
	ended := func(u string) bool {
		return slices.Contains([]string{"inactive", "failed"}, s.show(ctx, u, "ActiveState"))
	}
	var errs []error
	for _, u := range []string{unit, keeperUnit} {
		if u != unit && !all {
			continue
		}
		if s.show(ctx, u, "LoadState") == "loaded" || !ended(u) { // systemd does not stop a unit that it does not know; one whose file is gone it knows for as long as that runs
			err := run(ctx, "systemctl", "stop", u)
			if err == nil && !ended(u) {
				err = fmt.Errorf("%s was stopped, and is %q", u, s.show(ctx, u, "ActiveState"))
			}
			errs = append(errs, err)
		}
		errs = append(errs, s.forgetFailed(ctx, u))
	}
	return errors.Join(errs...)
}

// forgetFailed says that a unit has not ended as it should. systemd would list it as failed until it is started again, which of one whose file is gone is never.
func (s *systemd) forgetFailed(ctx context.Context, unit string) error {
	if s.show(ctx, unit, "ActiveState") != "failed" {
		return nil
	}
	fmt.Fprintf(s.o.Out, "%s did not end as it should (%s): journalctl -u %s says why\n", unit, s.show(ctx, unit, "Result"), unit)
	return run(ctx, "systemctl", "reset-failed", unit)
}

func (s *systemd) restartContainerd(unit string) []string {
	if len(s.o.Restart) > 0 {
		return s.o.Restart
	}
	return []string{"systemctl", "restart", unit}
}

// allowRestart: systemd starts a unit five times in ten seconds, and then leaves it stopped. Here that may be the one that puts everything back.
func (s *systemd) allowRestart(ctx context.Context, command []string) {
	if len(s.o.Restart) == 0 {
		_ = run(ctx, "systemctl", "reset-failed", command[len(command)-1]) // or the restart says what is wrong
	}
}

// supervised is a host without systemd. The daemon runs below `supervise`, in a session of its own.
type supervised struct{ o Options }

// Where it is recorded, and what it says.
const (
	runDir  = "/run/streaming-snapshotter"
	pidFile = runDir + "/supervise.pid"
	logFile = "/var/log/streaming-snapshotter.log"
)

// Supervise is the command that runs the daemon where there is no systemd.
const Supervise = Path + " supervise --socket " + runDir + "/keeper.sock --log " + logFile + " -- serve"

// Start is Supervise for a shell: in the environment that a unit of systemd has, as install itself starts it.
const Start = "env -i " + hostPath + " setsid " + Supervise + " &"

// OpenLog opens a log at its end, and makes it if there is none. What is no file is an error, and a link is one, too: others than root may be able to write to a directory of logs.
func OpenLog(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no file", name), err, f.Close())
	}
	return f, nil
}

func (*supervised) files() []file { return nil }

// pid is the supervisor's, 0 if none runs. Who starts the host may have started it, and written nothing down.
func (*supervised) pid() int {
	b, _ := os.ReadFile(pidFile)
	written, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	for _, p := range append([]process{{pid: written, args: argumentsOf(written)}}, processes()...) {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.pid))
		if err == nil && hosts(p.pid) && strings.TrimSuffix(exe, " (deleted)") == Path && len(p.args) > 1 && p.args[1] == "supervise" && slices.Contains(p.args, "serve") {
			return p.pid
		}
	}
	return 0
}

func (s *supervised) there(ctx context.Context) bool { return s.running(ctx) }

func (s *supervised) running(context.Context) bool { return s.pid() != 0 }

func (*supervised) reload(context.Context) error { return nil }

// start has a supervisor that runs run the new daemon. It keeps the mounts, so it stays as it is. It would try a daemon that does not start again and again: here one that has ended
// twice before it was ready is an error. (One that was started a moment before may end because the supervisor was asked for a new one.)
func (s *supervised) start(ctx context.Context) error {
	asked, last := 0, ""
	if pid := s.pid(); pid != 0 {
		if childOf(pid) != "" {
			asked = 1
		}
		last = reaped(pid)
		if err := errors.Join(writePID(pid), unix.Kill(pid, unix.SIGHUP)); err != nil {
			return err
		}
	} else if err := s.launch(); err != nil {
		return err
	}
	ends := 0
	var failed error
	err := until(ctx, "the daemon below "+Path+" supervise", func(ctx context.Context) error {
		pid := s.pid()
		if pid == 0 {
			failed = fmt.Errorf("%s supervise has ended: %s says why", Path, logFile)
			return nil
		}
		is := reaped(pid)
		if last == "" {
			last = is
		}
		if is != last {
			last, ends = is, ends+1
		}
		switch {
		case ends < asked:
			return errors.New("the old one has not ended")
		case ends > asked+1:
			failed = fmt.Errorf("the daemon has ended before it was ready: %s says why", logFile)
			return nil
		}
		return s.o.Ready(ctx)
	})
	return errors.Join(err, failed)
}

// launch starts a supervisor, in an environment like that of a unit of systemd: what a pod was given, or who has called, is not the daemon's.
func (s *supervised) launch() error {
	if err := os.MkdirAll(runDir, 0o700); err != nil { // before its socket
		return err
	}
	log, err := OpenLog(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	args := strings.Fields(Supervise)
	c := exec.Command(args[0], args[1:]...)
	c.Stdout, c.Stderr, c.Dir = log, log, "/" // until it has opened it itself
	c.Env = []string{hostPath}
	c.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := amongHostsOwn(c.Start); err != nil {
		return err
	}
	return errors.Join(writePID(c.Process.Pid), c.Process.Release())
}

func writePID(pid int) error {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n", pid), 0o644)
}

// reaped changes whenever a child of the process has ended: the page faults of all that have (proc(5), cminflt).
func reaped(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) > 8 {
		return f[8]
	}
	return ""
}

func childOf(pid int) string {
	children := ""
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(t)
		children += string(b)
	}
	return strings.TrimSpace(children)
}

func (s *supervised) stop(ctx context.Context, _ bool) error {
	pid := s.pid()
	if pid == 0 {
		return nil
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		return err
	}
	if err := until(ctx, "the end of "+Path+" supervise", func(context.Context) error {
		if s.pid() != 0 {
			return errors.New("it still runs")
		}
		return nil
	}); err != nil {
		return err
	}
	if err := os.Remove(pidFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *supervised) restartContainerd(string) []string { return s.o.Restart }

func (*supervised) allowRestart(context.Context, []string) {}

func run(ctx context.Context, args ...string) error {
	_, err := output(ctx, args...)
	return err
}

func output(ctx context.Context, args ...string) (string, error) {
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = time.Minute
	out, err := c.CombinedOutput()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err() // that it was ended for this
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), err
}

// patience is how long what was started may take to answer.
const patience = time.Minute

// until waits until what is there, for as long as patience.
func until(ctx context.Context, what string, is func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := is(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
