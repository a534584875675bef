package credentials

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient"
)

// slow is a source that takes its time.
type slow struct {
	fixed
	takes time.Duration
}

func (s slow) Lookup(ctx context.Context, p registryclient.Place) ([]Login, error) {
	select {
	case <-time.After(s.takes):
		return s.fixed.Lookup(ctx, p)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// broken is a source that fails.
type broken struct{ fixed }

func (b broken) Lookup(context.Context, registryclient.Place) ([]Login, error) {
	return nil, errors.Join(errors.New("one"), errors.New("two"))
}

// A source that says nothing does not hinder the others, nor what everybody may read; if they are of no use it is waited for.
func TestChain(t *testing.T) {
	a, b := fixed{"a", Login{"ua", "x"}}, fixed{"b", Login{"ub", "x"}}
	hour, long := slow{fixed{"hour", Login{"uh", "x"}}, time.Hour}, slow{fixed{"long", Login{"ul", "x"}}, 8 * time.Second}
	for name, tc := range map[string]struct {
		sources []Source
		last    string
		want    []string
		after   time.Duration
	}{
		"none":       {nil, "", nil, 0},
		"in order":   {[]Source{a, b}, "", []string{"a ua", "b ub"}, 0},
		"last first": {[]Source{a, hour, b}, "b", []string{"b ub", "a ua", "anonymous ", "hour uh"}, time.Hour},
		"slow":       {[]Source{hour, a, long, b}, "", []string{"a ua", "b ub", "anonymous ", "hour uh", "long ul"}, time.Hour},
		"slow one":   {[]Source{long, a}, "", []string{"a ua", "anonymous ", "long ul"}, 8 * time.Second},
		"broken":     {[]Source{broken{fixed{name: "bad"}}, a}, "", []string{"bad: one; two", "a ua"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				p := at("example.com/x")
				p.Last = tc.last
				var got []string
				for c, err := range Chain(tc.sources...)(t.Context(), p) {
					if err != nil {
						got = append(got, err.Error())
					} else {
						got = append(got, fmt.Sprint(c, " ", c.User))
					}
				}
				if !slices.Equal(got, tc.want) {
					t.Errorf("got %q, want %q", got, tc.want)
				}
				if d := time.Since(start); d != tc.after {
					t.Errorf("after %v, want %v", d, tc.after)
				}
			})
		})
	} //	//	//	// Nobody waits for what is not needed, and nothing goes on when the reader has left: synctest would say so.
	synctest.Test(t, func(t *testing.T) {
		for c := range Chain(hour, a)(t.Context(), at("example.com/x")) {
			if c.Source != "a" {
				t.Errorf("got %v", c)
			}
			break
		}
	})
}

// writeFile writes what may be a program: no process that another test starts meanwhile may have it open, for the kernel runs nothing that is open for writing (golang.org/issue/22315).
func writeFile(t *testing.T, name string, mode os.FileMode, text string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
