package service

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
)

// Config of a Service. Zero fields have the default that their comment names.
type Config struct {
	Conn       *nats.Conn // to a NATS server 2.11 or later with JetStream: embedded, or an external one with nats.MaxReconnects(-1)
	Replicas   int        // of JetStream's streams and buckets, 1: 3 on a cluster
	Sole       bool       // this is the only process there is, as with a NATS server in it: what another one had when it ended is nobody's
	Name       string     // of this process, the host's with a random suffix
	Registries []Registry // that it looks after: all others are ErrNotFound
	Convert    converter.Options
	Static     bool          // attach static profiles
	Limits     Limits        // of this process
	Lease      time.Duration // how long a process that is not heard of keeps an operation, 30 s
	Retention  time.Duration // of ended operations, 30 days
	Reconcile  time.Duration // how often registries are asked what events missed, 10 min
	Log        *slog.Logger  // nil is silent
	Audit      func(Deed)    // is told what the service does without being asked, unless it is nil. It is called at any time, from any goroutine
}

// Registry is one that the service looks after.
type Registry struct {
	Name string                                           // its host, as in images' names: "registry.example.com:5000"
	Open func(repository string) (converter.Place, error) // without a request; an error is a name that no repository can have
	// Catalog lists the repositories, as converter.Catalog does; nil is a registry that does not say.
	Catalog  Catalog
	PullOnly bool // nothing can be attached to its images, so that none is converted because it was pushed
}

// NewRegistry returns the registry of a host, reached as o says, with at most that many requests per second of this process; 0 is any
// number.
func NewRegistry(host string, o converter.RegistryOptions, requests float64) Registry {
	if requests > 0 {
		o.Limiter = rate.NewLimiter(rate.Limit(requests), max(1, int(requests)))
	}
	o = o.Shared()
	var places memo[string, opened]
	return Registry{
		Name: host,
		Open: func(repository string) (converter.Place, error) {
			if p, ok := places.get(repository); ok && time.Since(p.at) < openTime {
				return p.Place, nil
			}
			p, _, err := converter.Open(host+"/"+repository, converter.OpenOptions{Registry: o})
			if err == nil {
				places.put(repository, opened{p, time.Now()})
			}
			return p, err
		},
		Catalog: func(ctx context.Context) ([]string, error) { return converter.Catalog(ctx, host, o) },
	}
}

// opened is a place with the tokens that it was given, and since when.
type opened struct {
	converter.Place
	at time.Time
}

// openTime is how long a place is used: then credentials are looked up anew, and whether the registry has the referrers API.
const openTime = 5 * time.Minute

// Limits bound what a process uses.
type Limits struct {
	Conversions int // at once, 2
	// Disk is how many bytes of converted layers may wait in the temporary directory for their push; 0 is any number. A layer is counted
	// with a quarter more than its source has, and begun when there is room; one that becomes larger is begun anew with more, and one that
	// is larger than all of it fails.
	Disk int64
	// Memory is how many bytes all conversions, and artifacts that are verified, may hold; 0 is any number. It bounds how many conversions
	// and layers there are at once, one each at least. What Go's garbage collector has not collected yet comes on top: debug.SetMemoryLimit
	// bounds that.
	Memory int64
}

const (
	defaultLease     = 30 * time.Second
	defaultRetention = 30 * 24 * time.Hour
	defaultReconcile = 10 * time.Minute
)

func (c Config) withDefaults() (Config, error) {
	if c.Conn == nil {
		return c, errors.New("a connection to NATS is needed")
	}
	if c.Lease < 0 || c.Retention < 0 || c.Reconcile < 0 || c.Limits.Conversions < 0 || c.Limits.Disk < 0 || c.Limits.Memory < 0 {
		return c, errors.New("a duration or limit is negative")
	}
	if c.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return c, err
		}
		c.Name = host + "-" + rand.Text()[:8]
	}
	c.Lease = cmp.Or(c.Lease, defaultLease)
	c.Retention = cmp.Or(c.Retention, defaultRetention)
	c.Reconcile = cmp.Or(c.Reconcile, defaultReconcile)
	c.Replicas = cmp.Or(c.Replicas, 1)
	c.Limits.Conversions = cmp.Or(c.Limits.Conversions, 2)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Service is a process of the conversion service. Its methods may be called at any time, from any goroutine; those that ask for
// operations wait until Run has loaded them.
type Service struct {
	*auto
	c          Config
	registries map[string]Registry
	js         jetstream.JetStream
	operations jetstream.KeyValue // see store.go
	queue      jetstream.Stream
	consumer   jetstream.Consumer
	bulk       jetstream.Consumer
	record     *converter.Record
	room       *room
	view       *view
	counters   counters
	converting atomic.Int64
	running    atomic.Bool
}

// New makes the buckets and the stream that the service needs, unless they are there. It starts nothing: Run does.
func New(ctx context.Context, c Config) (*Service, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Service{c: c, registries: map[string]Registry{}, view: newView(), room: newRoom(c.Limits, c.Static)}
	for _, r := range c.Registries {
		if _, dup := s.registries[r.Name]; dup || r.Name == "" || r.Open == nil {
			return nil, fmt.Errorf("registry %q is named twice, or not at all", r.Name)
		}
		s.registries[r.Name] = r
	}
	if s.js, err = jetstream.New(c.Conn); err != nil {
		return nil, err
	}
	if s.operations, err = s.bucket(ctx, "streaming-operations", 0); err != nil {
		return nil, err
	}
	layers, err := s.bucket(ctx, "streaming-layers", layerTTL)
	if err != nil {
		return nil, err
	}
	s.record = converter.RecordIn(layerStore{layers})
	if err := s.openQueue(ctx); err != nil {
		return nil, err
	}
	s.auto, err = newAuto(ctx, c, s, s.bucket)
	return s, err
}

// bucket makes or opens a bucket whose values go after ttl; 0 is never.
func (s *Service) bucket(ctx context.Context, name string, ttl time.Duration) (jetstream.KeyValue, error) {
	kv, err := s.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: name, Replicas: s.c.Replicas, TTL: ttl, LimitMarkerTTL: markerTTL,
	})
	if err != nil {
		return nil, unavailable("make bucket "+name, err)
	}
	return kv, nil
}

// Run works until ctx ends, and returns when what it worked on was handed back to the other processes, which go on with it.
func (s *Service) Run(ctx context.Context) error {
	if s.running.Swap(true) {
		return errors.New("the service runs already")
	}
	defer s.running.Store(false)
	// What watches outlives what works, so that answers are right until all was handed back.
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	watched := make(chan struct{})
	var watchErr error
	go func() {
		defer close(watched)
		watchErr = s.watch(watching)
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-watched:
			return watchErr
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error { return s.work(ctx) })
	g.Go(func() error { return s.maintain(ctx) })
	g.Go(func() error { return s.auto.run(ctx) })
	err := g.Wait()
	_ = s.c.Conn.FlushTimeout(handBackTime) // the messages that were given back: what is lost is found out when the lease is over
	stop()
	<-watched
	return err
}

// Ready says why the service cannot do its work: ErrUnavailable.
func (s *Service) Ready(ctx context.Context) error {
	if !s.running.Load() || !s.view.isLoaded() {
		return fmt.Errorf("%w: the operations are being loaded", ErrUnavailable)
	}
	_, err := s.queue.Info(ctx)
	return unavailable("ask NATS", err)
}

// open opens the repository of an image.
func (s *Service) open(registry, repository string) (converter.Place, error) {
	r, ok := s.registries[registry]
	if !ok {
		return nil, fmt.Errorf("%w: the service does not look after registry %q", ErrNotFound, registry)
	}
	p, err := r.Open(repository)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return p, nil
}

// unavailable wraps what NATS or a registry answers; nil is nil.
func unavailable(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
}

// now is the time as records have it.
func now() time.Time { return time.Now().UTC().Round(0) }

// sleep waits, and says whether it was to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
