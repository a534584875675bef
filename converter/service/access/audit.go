package access

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"
	"unicode"
)

// Entry is what somebody did, or tried. It never holds a secret: no token, no cookie, no body of a request.
type Entry struct {
	Action     string // "convert", "cancel", "settings", "delete", "login", ...
	Registry   string
	Repository string
	Target     string // a digest, an operation's id
	Outcome    string
	Detail     string // for people: the settings that were made, why it failed
}

// Outcomes of an Entry.
const (
	OutcomeOK     = "ok"
	OutcomeDenied = "denied" // they may not
	OutcomeFailed = "failed" // they may, but it did not work
)

// record is a line of the audit log.
type record struct {
	Time       time.Time `json:"time"`
	Who        string    `json:"who"`
	Kind       string    `json:"kind"`
	Subject    string    `json:"subject,omitempty"`
	Action     string    `json:"action"`
	Registry   string    `json:"registry,omitempty"`
	Repository string    `json:"repository,omitempty"`
	Target     string    `json:"target,omitempty"`
	Outcome    string    `json:"outcome"`
	Detail     string    `json:"detail,omitempty"`
	Remote     string    `json:"remote,omitempty"`
	Request    string    `json:"request,omitempty"`
}

// maxField is how many bytes of a string are logged: names of repositories have at most 255, digests 71.
const maxField = 512

// Audit writes one line of JSON. The context says who asks, from where, and in which request. What cannot be written is logged: an
// action that was taken already is not undone for it.
func (g *Gate) Audit(ctx context.Context, e Entry) {
	if g.audit == nil {
		return
	}
	id, req := From(ctx), requestOf(ctx)
	kind := id.Kind
	if kind == "" {
		kind = "nobody"
	}
	line, err := json.Marshal(record{
		Time: g.now().UTC(), Who: Printable(id.Name, maxField), Kind: kind, Subject: Printable(id.Subject, maxField),
		Action: Printable(e.Action, maxField), Registry: Printable(e.Registry, maxField), Repository: Printable(e.Repository, maxField),
		Target: Printable(e.Target, maxField), Outcome: Printable(e.Outcome, maxField), Detail: Printable(e.Detail, maxField),
		Remote: req.from(), Request: req.id,
	})
	if err == nil {
		g.auditMu.Lock()
		_, err = g.audit.Write(append(line, '\n'))
		g.auditMu.Unlock()
	}
	if err != nil {
		g.log.ErrorContext(ctx, "audit log", "action", e.Action, "error", err)
	}
}

// denied notes that a request was refused, and says whether refusals of requests from its address are within bounds: they cost little,
// and those beyond are not noted, so that nobody can fill the audit log.
func (g *Gate) denied(r *http.Request, action, why string) bool {
	if !g.failures.allow(requestOf(r.Context()).remote, g.now()) {
		return false
	}
	g.Audit(r.Context(), Entry{Action: action, Target: r.URL.Path, Outcome: OutcomeDenied, Detail: why})
	return true
}

// Printable returns the first n bytes of s, with a replacement character for each that a terminal might obey.
func Printable(s string, n int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s[:min(n, len(s))])
}
