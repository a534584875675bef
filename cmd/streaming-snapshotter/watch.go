package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/kubeapi"
)

// readyLabel is what a node in Kubernetes has while its daemon is ready: "true".
const readyLabel = "streaming-snapshotter.io/ready"

const (
	lookEvery = 2 * time.Second
	goneAfter = 10 * time.Second // a restart of the daemon is no reason to take the label away
	sayAgain  = 5 * time.Minute  // a node's object may have been made anew
	maxPause  = time.Minute      // between two attempts that fail
)

// nodeWatch keeps watch over the daemon of a node, from a pod there.
type nodeWatch struct {
	node, label string
	url         string // of the daemon's /readyz
	api         *kubeapi.Client
	client      http.Client
	why         atomic.Pointer[string] // /readyz is not ready; nil if it is

	// Of run:
	readyAt time.Time // when the daemon was ready last
	told    bool      // the API server has been told that it is
	err     error     // or could not be
	next    time.Time // when to tell it again, whatever has changed
	pause   time.Duration
}

func newWatchCommand(configFile *string) *cobra.Command {
	var node, label, listen string
	var remove bool
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Keep watch over this node's daemon, in a pod: label the node while the daemon is ready",
		Long: `Asks the daemon of this node, at the TCP address that the configuration has as ` + "`metrics`" + `, whether it is ready, and has the node's label in Kubernetes
say so: ` + readyLabel + `=true, or no such label after ten seconds without. /readyz, at --listen, is 200 while both are well. It ends with the pod, and leaves
the label as it is. With --remove it asks nobody: it takes the label away, and ends.

It uses the pod's service account, which needs nothing but the right to patch nodes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if node == "" {
				return errors.New("--node: want the node's name in Kubernetes")
			}
			w := &nodeWatch{node: node, label: label, api: kubeapi.New(""), client: http.Client{Timeout: 5 * time.Second}}
			defer w.api.Close()
			if remove {
				return w.remove(cmd.Context())
			}
			c, err := loadConfig(*configFile)
			if err == nil {
				w.url, err = readyURL(c.Metrics)
			}
			if err != nil {
				return err
			}
			return w.run(cmd.Context(), listen)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "the node's name in Kubernetes")
	cmd.Flags().StringVar(&label, "label", readyLabel, "the label")
	cmd.Flags().BoolVar(&remove, "remove", false, "take the label away, and end")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:9466", "TCP address for /readyz; empty for none")
	return cmd
}

// readyURL is where the daemon with this `metrics` says whether it is ready.
func readyURL(metrics string) (string, error) {
	if metrics == "" {
		return "", errors.New("the configuration has no `metrics`, where the daemon says whether it is ready: metrics = \"127.0.0.1:9465\"")
	}
	host, port, err := net.SplitHostPort(metrics)
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return (&url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/readyz"}).String(), nil
}

// run keeps watch until ctx ends.
func (w *nodeWatch) run(ctx context.Context, listen string) error {
	w.say("the daemon was not asked yet")
	if listen != "" {
		l, err := listenPublic(listen)
		if err != nil {
			return err
		}
		s := publicServer(w)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.Serve(l) // until Close
		}()
		defer func() {
			s.Close()
			<-done
		}()
	}
	w.readyAt = time.Now() // a label that is there is not taken away at once
	for {
		w.look(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookEvery):
		}
	}
}

// ServeHTTP answers /readyz.
func (w *nodeWatch) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	switch why := w.why.Load(); {
	case r.URL.Path != "/readyz":
		http.NotFound(rw, r)
	case why != nil:
		http.Error(rw, *why, http.StatusServiceUnavailable)
	default:
		io.WriteString(rw, "ok\n")
	}
}

// look asks the daemon, and has the label say what it says.
func (w *nodeWatch) look(ctx context.Context, now time.Time) {
	daemon := w.ask(ctx)
	ready := daemon == nil
	if ready {
		w.readyAt = now
	}
	if (ready || now.Sub(w.readyAt) >= goneAfter) && (ready != w.told || !now.Before(w.next)) {
		w.told, w.err = ready, w.tell(ctx, ready)
		w.pause = min(max(2*w.pause, lookEvery), maxPause)
		w.next = now.Add(w.pause)
		if w.err == nil {
			w.pause, w.next = 0, now.Add(sayAgain)
		}
	}
	if ctx.Err() != nil {
		return
	}
	var why []string
	if daemon != nil {
		why = append(why, fmt.Sprintf("the daemon is not ready: %v", daemon))
	}
	if w.err != nil {
		why = append(why, fmt.Sprintf("the node's label %s could not be set: %v", w.label, w.err))
	}
	w.say(strings.Join(why, "; "))
}

// say takes down why /readyz is not ready; "" if it is.
func (w *nodeWatch) say(why string) {
	was := w.why.Load()
	if why == "" {
		if was != nil {
			slog.Info("ready", "node", w.node)
		}
		w.why.Store(nil)
		return
	}
	if was == nil || *was != why {
		slog.Warn("not ready", "node", w.node, "error", why)
	}
	w.why.Store(&why)
}

// tell has the API server know whether the daemon is ready.
func (w *nodeWatch) tell(ctx context.Context, ready bool) error {
	var value any // null: no label
	if ready {
		value = "true"
	}
	return w.api.Patch(ctx, "nodes/"+w.node, map[string]any{"metadata": map[string]any{"labels": map[string]any{w.label: value}}})
}

// remove takes the label away.
func (w *nodeWatch) remove(ctx context.Context) error {
	if err := w.tell(ctx, false); err != nil {
		return fmt.Errorf("take away label %s of node %s: %w", w.label, w.node, err)
	}
	slog.Info("the node has no label", "node", w.node, "label", w.label)
	return nil
}

// ask asks the daemon whether it is ready.
func (w *nodeWatch) ask(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url, nil)
	if err != nil {
		return err
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // an error in an error adds nothing
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", w.url, strings.TrimSpace(string(b)))
	}
	return nil
}
