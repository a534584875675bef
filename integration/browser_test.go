package integration_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/streaming-snapshotter/streaming-snapshotter/integration/node"
)

// patience bounds the wait for what a page is to show, on a machine that has much else to do.
const patience = time.Minute

// browser is a tab of a real Chromium. What it complains of, as a script's error or something that a page's policy forbids, fails the test.
type browser struct {
	t    *testing.T
	ctx  context.Context
	base string
}

// startBrowser runs Debian's Chromium until the test ends, with what it has of its own in a directory of the test.
func startBrowser(t *testing.T, base string) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skipf("%v (.ci/packages chromium)", err)
	}
	home := tempDir(t)
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.UserDataDir(filepath.Join(home, "profile")), chromedp.Env("HOME="+home), // root has no sandbox
		chromedp.WindowSize(1280, 900), chromedp.Flag("lang", "en"))...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b := &browser{t, ctx, base}
	if err := chromedp.Do(ctx); err != nil { // starts it; a context that ended after this would end the browser
		t.Fatal(err)
	}
	err = chromedp.Listen(ctx, func(ev any) {
		switch ev := ev.(type) {
		case *runtime.EventExceptionThrown:
			t.Errorf("a script's error: %s %s", ev.ExceptionDetails.Text, ev.ExceptionDetails.URL)
		case *log.EventEntryAdded:
			if e := ev.Entry; e.Level == log.EntryLevelError && e.Source != log.EntrySourceNetwork {
				t.Errorf("the browser complains: %s %s", e.Text, e.URL)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		b.t.Fatalf("%v\n%s", err, b.state())
	}
}

// state is where the browser is, for a test that fails.
func (b *browser) state() string {
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
	defer cancel()
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string](`location.href + "\n" + document.title + "\n" + (document.querySelector("main")?.innerText ?? "")`))
	return fmt.Sprint(text, err)
}

func (b *browser) open(path string) {
	b.t.Helper()
	b.do(chromedp.Navigate(b.base + path))
}

func (b *browser) click(css string) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS(css)))
}

func (b *browser) enter(css, text string) {
	b.t.Helper()
	b.do(chromedp.SendKeys(chromedp.CSS(css), text))
}

// wait waits until an expression is true, on whatever page the browser is then.
func (b *browser) wait(expression string) {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ctx, cancel := context.WithTimeout(b.ctx, patience)
		ok, err := chromedp.Run(ctx, chromedp.Evaluate[bool]("!!("+expression+")"))
		cancel()
		if ok && err == nil {
			return
		}
		if time.Now().After(deadline) { // an error is a page that is being replaced
			b.t.Fatalf("%s is not so: %v\n%s", expression, err, b.state())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// shows waits until the page's content has a text.
func (b *browser) shows(text string) {
	b.t.Helper()
	b.wait(`document.readyState === "complete" && document.querySelector("main").innerText.includes(` + strconv.Quote(text) + `)`)
}

// at waits until the browser is at a path.
func (b *browser) at(path string) {
	b.t.Helper()
	b.wait(`document.readyState === "complete" && location.pathname + location.search === ` + strconv.Quote(path))
}

func (b *browser) text(expression string) string {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	s, err := chromedp.Run(ctx, chromedp.Evaluate[string](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%s: %v\n%s", expression, err, b.state())
	}
	return s
}

// press is keys as a keyboard sends them, to whatever has the focus.
func (b *browser) press(keys string) {
	b.t.Helper()
	b.do(chromedp.KeyEvent(keys))
}

// tabTo presses Tab until an element has the focus. Whatever has it on the way must show that.
func (b *browser) tabTo(css string) {
	b.t.Helper()
	for range 100 {
		b.press(kb.Tab)
		if b.focus() == "hidden" {
			b.t.Errorf("what has the focus does not show it: %s\n%s", b.text(`document.activeElement.outerHTML`), b.state())
		}
		if b.text(`String(document.activeElement.matches(`+strconv.Quote(css)+`))`) == "true" {
			return
		}
	}
	b.t.Fatalf("the keyboard does not reach %s\n%s", css, b.state())
}

// focus says whether what has the focus shows it: "shown", "hidden", or "none" on the page itself.
func (b *browser) focus() string {
	b.t.Helper()
	return b.text(`(() => {
		const e = document.activeElement;
		if (!e || e === document.body) return "none";
		const box = e.getBoundingClientRect(), style = getComputedStyle(e);
		const seen = box.width > 1 && box.height > 1 && box.bottom > 0 && box.right > 0 && box.top < innerHeight;
		return seen && e.matches(":focus-visible") && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 ? "shown" : "hidden";
	})()`)
}

// look sets how pages are shown: the colour scheme, and the size of the window in pixels.
func (b *browser) look(scheme string, width, height int64) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}})
		return err
	}))
}

// scripts switches the scripts of pages on or off.
func (b *browser) scripts(on bool) {
	b.t.Helper()
	b.do(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: !on})
		return err
	}))
}

// moveAway puts the mouse where it changes nothing.
func (b *browser) moveAway() {
	b.t.Helper()
	b.do(chromedp.MouseEvent(input.DispatchMouseEventTypeMouseMoved, 0, 0))
}

// The accessibility checker, from npm: the package's version, and the digest of the file that is used of it.
const (
	axeVersion = "4.14.1"
	axeDigest  = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
)

// axeScript is axe-core, fetched once into .build.
func axeScript(t *testing.T) string {
	t.Helper()
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, ".build", "axe-core-"+axeVersion)
	file := filepath.Join(dir, "package", "axe.min.js")
	b, err := os.ReadFile(file)
	if err != nil {
		if b, err = fetchAxe(t, dir); err != nil {
			t.Skipf("axe-core %s cannot be fetched: %v", axeVersion, err)
		}
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != axeDigest {
		t.Fatalf("%s is not the axe-core that is pinned: remove it", file)
	}
	return string(b)
}

func fetchAxe(t *testing.T, dir string) ([]byte, error) {
	t.Helper()
	temp := tempDir(t)
	c := exec.CommandContext(t.Context(), "npm", "pack", "--silent", "--cache", filepath.Join(temp, "cache"), "axe-core@"+axeVersion)
	c.Dir = temp
	if out, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("npm pack: %w\n%s", err, out)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	c = exec.CommandContext(t.Context(), "tar", "-xzf", filepath.Join(temp, "axe-core-"+axeVersion+".tgz"), "-C", dir, "package/axe.min.js")
	if out, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("tar: %w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "package", "axe.min.js"))
}

// accessible checks the page that is shown: nothing but a table that can be scrolled is wider than the window, and axe-core finds nothing, by
// the rule that is named, or by all of them for "": those of WCAG 2.2 A and AA and of good practice; "none" asks it nothing.
func (b *browser) accessible(axe, rule, what string) {
	b.t.Helper()
	if wide := b.text(`String(document.documentElement.scrollWidth > innerWidth)`); wide != "false" {
		b.t.Errorf("%s: the page is wider than the window", what)
	}
	if rule == "none" {
		return
	}
	b.do(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, runtime.Evaluate, runtime.EvaluateParams{Expression: axe + "; undefined"})
		return err
	}))
	only := ""
	if rule != "" {
		only = `, runOnly: [` + strconv.Quote(rule) + `]`
	}
	out := b.text(`axe.run(document, {resultTypes: ["violations"]` + only + `}).then(r => JSON.stringify(r))`)
	var result struct {
		Passes     []struct{ ID string }
		Violations []struct {
			ID, Impact, Help string
			Nodes            []struct {
				HTML, FailureSummary string
			}
		}
	}
	if err := json.NewDecoder(bytes.NewReader([]byte(out))).Decode(&result); err != nil {
		b.t.Fatal(err)
	}
	if len(result.Passes) < 10 && rule == "" {
		b.t.Errorf("%s: axe-core looked at little: %d rules", what, len(result.Passes))
	}
	for _, v := range result.Violations {
		var nodes []string
		for _, n := range v.Nodes {
			nodes = append(nodes, n.HTML+"\n"+n.FailureSummary)
		}
		b.t.Errorf("%s: %s (%s): %s\n%s", what, v.ID, v.Impact, v.Help, strings.Join(nodes, "\n"))
	}
}
