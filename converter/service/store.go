package service

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/opencontainers/go-digest"
)

// The bucket streaming-operations has two kinds of keys:
//
//	id.UUID              a record, JSON: the operation
//	image.SHA256(IMAGE)  a record, JSON: the image's last operation, as it was when it was asked for
//
// The image's key is written first, by compare-and-set: who wins has made the operation, all others find it. An operation whose maker
// died then is made from it by whoever finds it without a record; that is why a record's end takes the image's key first.
//
// The stream streaming-work has a message on streaming.work.UUID, or streaming.work.bulk.UUID, for each operation that has not ended, and none for others.
// Whoever finds that one lacks makes it, expecting that there is none, so that there are never two. Bulk is what somebody asks for who waits for many
// already: of four that a process takes one is bulk, if there are both.
const (
	idPrefix      = "id."
	imagePrefix   = "image."
	workStream    = "streaming-work"
	workPrefix    = "streaming.work."
	bulkPrefix    = workPrefix + "bulk."
	workConsumer  = "workers"
	bulkConsumer  = "bulk-workers"
	markerTTL     = time.Hour           // how long a bucket says of a key that it is gone
	layerTTL      = 90 * 24 * time.Hour // how long a converted layer is remembered
	contested     = 20                  // how often a compare-and-set is tried while others write
	storeDeadline = 10 * time.Second    // for a read or write of NATS whose caller set none
)

// record is an operation as it is kept: with what nobody needs to see.
type record struct {
	Operation
	Deaths int    `json:"deaths,omitempty"` // attempts whose process was not heard of any more
	Wanted bool   `json:"wanted,omitempty"` // somebody asked for it, whether it was pushed or not
	Bulk   bool   `json:"bulk,omitempty"`   // waits behind what others ask for
	Made   []made `json:"made,omitempty"`   // attached by it, or about to be, and not there before: what a cancellation takes away
}

// made is a referrer.
type made struct {
	Subject  digest.Digest `json:"subject"`
	Digest   digest.Digest `json:"digest"`
	Platform string        `json:"platform,omitempty"` // of an artifact; "" of what is none
}

// is says that it is the same referrer, whatever else a record has of it.
func (m made) is(other made) bool { return m.Subject == other.Subject && m.Digest == other.Digest }

func imageKey(i Image) string {
	sum := sha256.Sum256([]byte(i.String()))
	return imagePrefix + hex.EncodeToString(sum[:])
}

func (r record) encode() ([]byte, error) {
	r.Position = 0 // is the view's to say
	return json.Marshal(r)
}

func decodeRecord(key string, raw []byte) (r record, err error) {
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("operation in key %s: %w", key, err)
	}
	if r.ID == "" || strings.HasPrefix(key, idPrefix) && key != idPrefix+r.ID {
		return r, fmt.Errorf("operation in key %s has the id %q", key, r.ID)
	}
	return r, nil
}

// errContested: somebody else wrote first.
var errContested = errors.New("others write the same at the same time")

// get returns the record of a key with its revision; 0 without an error is none.
func (s *Service) get(ctx context.Context, key string) (record, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	e, err := s.operations.Get(ctx, key)
	if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
		return record{}, 0, unavailable("read operation", err)
	}
	// A replica of NATS may answer with less than this process has seen.
	if id, ok := strings.CutPrefix(key, idPrefix); ok {
		if known, rev, ok := s.view.record(id); ok && (err != nil || rev > e.Revision()) {
			return known, rev, nil
		}
	}
	if err != nil {
		return record{}, 0, nil
	}
	r, err := decodeRecord(key, e.Value())
	if err == nil && strings.HasPrefix(key, idPrefix) {
		s.view.put(r, e.Revision())
	}
	return r, e.Revision(), err
}

// put writes the record of a key if its revision is still rev; 0 is that there is none. errContested says that it is not.
func (s *Service) put(ctx context.Context, key string, r record, rev uint64) (uint64, error) {
	raw, err := r.encode()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	var written uint64
	if rev == 0 {
		written, err = s.operations.Create(ctx, key, raw)
	} else {
		written, err = s.operations.Update(ctx, key, raw, rev)
	}
	switch {
	case errors.Is(err, jetstream.ErrKeyExists), errors.Is(err, jetstream.ErrKeyRevisionMismatch):
		return 0, errContested
	case err != nil:
		return 0, unavailable("write operation", err)
	}
	if strings.HasPrefix(key, idPrefix) {
		s.view.put(r, written)
	} else {
		s.view.putLast(key, r.ID, written)
	}
	return written, nil
}

// drop takes a key away if its revision is still rev.
func (s *Service) drop(ctx context.Context, key string, rev uint64) error {
	err := s.operations.Purge(ctx, key, jetstream.LastRevision(rev), jetstream.PurgeTTL(markerTTL))
	if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return errContested
	}
	return unavailable("take away operation", err)
}

// lookFor takes out of the view what is not there: a bucket says for markerTTL only that it took something away.
func (s *Service) lookFor(ctx context.Context, key string) error {
	_, err := s.operations.Get(ctx, key)
	if !errors.Is(err, jetstream.ErrKeyNotFound) {
		return err
	}
	if id, ok := strings.CutPrefix(key, idPrefix); ok {
		s.view.drop(id, math.MaxUint64)
	} else {
		s.view.dropLast(key, math.MaxUint64)
	}
	return nil
}

// openQueue makes or opens the stream of work and its consumer.
func (s *Service) openQueue(ctx context.Context) (err error) {
	s.queue, err = s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: workStream, Subjects: []string{workPrefix + ">"}, Retention: jetstream.WorkQueuePolicy, Replicas: s.c.Replicas,
	})
	if err != nil {
		return unavailable("make stream "+workStream, err)
	}
	if s.consumer, err = s.openConsumer(ctx, workConsumer, workPrefix); err == nil {
		s.bulk, err = s.openConsumer(ctx, bulkConsumer, bulkPrefix)
	}
	return unavailable("make consumer of "+workStream, err)
}

func (s *Service) openConsumer(ctx context.Context, name, prefix string) (jetstream.Consumer, error) {
	if s.c.Sole { // it has messages that nobody works on
		if err := s.queue.DeleteConsumer(ctx, name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return nil, err
		}
	}
	return s.queue.CreateOrUpdateConsumer(ctx, jetstream.ConsumerConfig{
		Durable: name, FilterSubject: prefix + "*", AckPolicy: jetstream.AckExplicitPolicy, AckWait: s.c.Lease, MaxDeliver: -1, MaxAckPending: -1,
	})
}

// subject is that of the operation's message.
func (r *record) subject() string {
	if r.Bulk {
		return bulkPrefix + r.ID
	}
	return workPrefix + r.ID
}

// enqueue makes the message of an operation unless there is one.
func (s *Service) enqueue(ctx context.Context, r record) error {
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	_, err := s.js.Publish(ctx, r.subject(), nil, jetstream.WithExpectLastSequencePerSubject(0))
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
		return nil
	}
	return unavailable("queue operation", err)
}

// dequeue takes the message of an operation away.
func (s *Service) dequeue(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	return unavailable("take operation from the queue", errors.Join(
		s.queue.Purge(ctx, jetstream.WithPurgeSubject(workPrefix+id)), s.queue.Purge(ctx, jetstream.WithPurgeSubject(bulkPrefix+id))))
}

// watch keeps the view until ctx ends. A server that was started again does not know of who watched, and that is noticed after many seconds only: after each new
// connection all is read anew.
func (s *Service) watch(ctx context.Context) error {
	connected := s.c.Conn.StatusChanged(nats.CONNECTED)
	defer s.c.Conn.RemoveStatusListener(connected)
	for {
		w, err := s.operations.WatchAll(ctx)
		switch {
		case err == nil:
			if again, err := s.seeAll(ctx, w, connected); !again {
				return err
			}
		case !s.view.isLoaded() || s.c.Conn.IsClosed():
			return unavailable("watch operations", err)
		case !sleep(ctx, retryTime):
			return nil
		}
	}
}

// seeAll keeps the view by w until ctx ends, or there is a new connection: then it is true.
func (s *Service) seeAll(ctx context.Context, w jetstream.KeyWatcher, connected <-chan nats.Status) (again bool, err error) {
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return false, nil
		case <-connected:
			return true, nil
		case e, ok := <-w.Updates():
			switch {
			case !ok && ctx.Err() != nil:
				return false, nil
			case !ok:
				return false, fmt.Errorf("%w: the connection to NATS is closed", ErrUnavailable)
			case e == nil:
				s.view.load()
			default:
				s.see(e)
			}
		}
	}
}

func (s *Service) see(e jetstream.KeyValueEntry) {
	id, isRecord := strings.CutPrefix(e.Key(), idPrefix)
	if e.Operation() != jetstream.KeyValuePut {
		if isRecord {
			s.view.drop(id, e.Revision())
		} else {
			s.view.dropLast(e.Key(), e.Revision())
		}
		return
	}
	r, err := decodeRecord(e.Key(), e.Value())
	switch {
	case err != nil: // of another release, say: this one cannot do anything with it
		s.c.Log.Warn("an operation cannot be read", "error", err)
	case isRecord:
		s.view.put(r, e.Revision())
	default:
		s.view.putLast(e.Key(), r.ID, e.Revision())
	}
}

// layerStore keeps what was converted where all processes find it.
type layerStore struct{ kv jetstream.KeyValue }

func (l layerStore) Get(ctx context.Context, key string) ([]byte, bool) {
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	e, err := l.kv.Get(ctx, key)
	if err != nil {
		return nil, false
	}
	return e.Value(), true
}

func (l layerStore) Put(ctx context.Context, key string, entry []byte) {
	ctx, cancel := context.WithTimeout(ctx, storeDeadline)
	defer cancel()
	_, _ = l.kv.Put(ctx, key, entry)
}
