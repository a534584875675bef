// Command gotest runs `go test` with its arguments and prints what matters: each package's closing line, the output of failed tests, which tests took long, and the names
// of skipped ones. With -no-skips a skipped test is a failure: in CI everything that a test could need is there.
//
// All of it runs in namespaces and with a $TMPDIR of its own (node.Isolate), so that nothing is left of tests that are killed, or when make is.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// event is a line of `go test -json`; `go doc test2json` describes it.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// slow is how many seconds a test takes that is worth a line.
const slow = 20

func main() {
	node.IsolateWithParent()
	args := os.Args[1:]
	noSkips := len(args) > 0 && args[0] == "-no-skips"
	if noSkips {
		args = args[1:]
	}
	skipped, err := run(args)
	if len(skipped) > 0 {
		fmt.Printf("skipped:\n%s\n", strings.Join(skipped, "\n"))
	}
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "go test:", err)
		os.Exit(1)
	case noSkips && len(skipped) > 0:
		fmt.Fprintln(os.Stderr, "gotest: skipped tests count as failed")
		os.Exit(1)
	}
}

// run runs go test and returns the skipped tests with what they have said.
func run(args []string) (skipped []string, err error) {
	c := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	c.Env = append(os.Environ(), "GOTMPDIR=") // in $TMPDIR
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	said := map[string]*strings.Builder{} // by package and test, while it runs
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text())
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			if e.Test == "" {
				fmt.Print(e.Output)
				continue
			}
			if said[key] == nil {
				said[key] = new(strings.Builder)
			}
			said[key].WriteString(e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" {
				continue
			}
			text := ""
			if b := said[key]; b != nil {
				text = b.String()
			}
			delete(said, key)
			if e.Elapsed >= slow && !strings.Contains(e.Test, "/") {
				fmt.Printf("%.0f s: %s\n", e.Elapsed, key)
			}
			switch e.Action {
			case "fail":
				fmt.Print(text)
			case "skip":
				skipped = append(skipped, key+"\n"+text)
			}
		}
	}
	for _, b := range said { // of tests that a panic cut short
		fmt.Print(b.String())
	}
	if err := lines.Err(); err != nil {
		c.Process.Kill()
		c.Wait()
		return skipped, err
	}
	return skipped, c.Wait()
}
