package notary

import (
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/revocation/purpose"
	"github.com/notaryproject/notation-core-go/revocation/result"
)

// TestWhoseAnswer: an answer is kept if the server that gave it has made a status known, and not because one whose name begins so has.
func TestWhoseAnswer(t *testing.T) {
	a, c := newAnswers("", nil), &call{}
	until := time.Now().Add(time.Hour)
	urls := map[string]bool{
		"http://ca.example": true, "http://ca.example/": true, "http://ca.example/MEow": true, "http://ca.example:80/MEow": false,
		"http://ca.example.evil": false, "http://ca.example.evil/MEow": false, "http://ca.example@evil/": false, "http://ca": false,
	}
	for url := range urls {
		c.use(url, answer{URL: url, Until: until})
	}
	a.settle(c, purpose.CodeSigning, []*result.CertRevocationResult{{Result: result.ResultOK, ServerResults: []*result.ServerResult{{Server: "http://ca.example/", Result: result.ResultOK}}}})
	for url, want := range urls {
		if _, kept := a.kept(url); kept != want {
			t.Errorf("%s: kept %v", url, kept)
		}
	}
}
