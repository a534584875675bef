package notary_test

import (
	"testing"

	"github.com/streaming-snapshotter/streaming-snapshotter/trust"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/notary"
	"github.com/streaming-snapshotter/streaming-snapshotter/trust/trusttest"
)

// FuzzEnvelope: of all bytes only the signature itself is good, and each failure has one class.
func FuzzEnvelope(f *testing.F) {
	ca := trusttest.NewCA(f, "authority", nil)
	v := verifier(f, notary.Options{Dir: trusttest.NewDir(f, ca, trusttest.Statement{Name: "all"})})
	other := trusttest.NewCA(f, "other", nil).Issue(f, "build", trusttest.Leaf{})
	id := ca.Issue(f, "build", trusttest.Leaf{})
	for format := range formats {
		f.Add(format == "cose", id.Sign(f, target("y"), format).Bytes)
		f.Add(format == "cose", other.Sign(f, target("x"), format).Bytes)
	}
	f.Fuzz(func(t *testing.T, isCOSE bool, b []byte) {
		e := trusttest.Envelope(formats["jws"], b)
		if isCOSE {
			e.MediaType = formats["cose"]
		}
		if d, err := v.Verify(t.Context(), target("x"), e); classes(err) != 1 || len(b) <= trust.MaxEnvelope && err == nil {
			t.Fatalf("%+v, %v", d, err)
		}
		notary.Describe(e)
	})
}
