package registryclient

import (
	"bytes"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/registryclient/registrytest"
)

// Reads outlast an outage that all else has given up in.
func TestReadsWait(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]registrytest.Fault{
		"reset": registrytest.Reset(-1),
		"503":   registrytest.Status(http.StatusServiceUnavailable),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.Start(t, registrytest.Options{})
			data := noise(1000)
			blob := r.PutBlob("team/app", data)
			back := r.Inject(registrytest.Any, -1, outage)
			c := newClient(t, Options{Budget: 300 * time.Millisecond, Wait: time.Minute})
			got := make(chan []byte, 1)
			go func() {
				b, err := readRange(t.Context(), c, repoOf(r), blob, 10, 500, 0)
				if err != nil {
					t.Error(err)
				}
				got <- b
			}()
			for range 2 {
				if _, err := c.Blob(t.Context(), repoOf(r), blob, 1000); err == nil || errors.Is(err, ErrNotFound) {
					t.Errorf("a lookup during the outage: %v", err)
				}
			}
			select {
			case <-got:
				t.Error("the read ended before the outage")
			default:
				back()
				if !bytes.Equal(<-got, data[10:510]) {
					t.Error("wrong bytes")
				}
			}
		})
	}
}
