package serve

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestCluster: in a cluster, whose servers may start after the service, what must not be lost is on three of them unless the configuration says something else.
func TestCluster(t *testing.T) {
	var routes, urls []string
	for range 3 {
		routes, urls = append(routes, "nats://"+free(t)), append(urls, "nats://"+free(t))
	}
	c := external(t, strings.Join(urls, ","))
	p := begin(t, c)
	for i := range 3 {
		startNATS(t, server.Options{
			ServerName: fmt.Sprint("n", i), Port: port(t, strings.TrimPrefix(urls[i], "nats://")), JetStream: true, StoreDir: t.TempDir(),
			Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: port(t, strings.TrimPrefix(routes[i], "nats://"))}, Routes: server.RoutesFromStr(strings.Join(routes, ",")),
		})
	}
	if err := p.await(); err != nil {
		t.Fatal(err)
	}
	conn, err := nats.Connect(strings.Join(urls, ","))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "KV_streaming-operations")
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().Config.Replicas; n != 3 {
		t.Errorf("operations are on %d servers", n)
	}
}
