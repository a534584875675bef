package service

import (
	"cmp"
	"context"
	"slices"
	"sync"
)

// view has all operations in memory, as NATS tells of them and as this process has written them, whichever is newer. Records are not
// changed any more once they are in it.
type view struct {
	loaded chan struct{} // closed when all that was there at the start is in it

	mu        sync.Mutex
	ops       map[string]entry // by id
	last      map[string]last  // operation of an image, by its key
	positions map[string]int   // in the queue, from 1, by id; nil: to be counted
	watchers  map[string]map[*watcher]struct{}
}

type entry struct {
	rec record
	rev uint64
}

type last struct {
	id  string
	rev uint64
}

// watcher is told of changes of an operation while the view is locked: it notes and returns.
type watcher struct {
	changed func(entry, Operation)
	ended   func() // the operation, or it is gone: nothing follows
}

func newView() *view {
	return &view{
		loaded: make(chan struct{}), ops: map[string]entry{}, last: map[string]last{}, watchers: map[string]map[*watcher]struct{}{},
	}
}

func (v *view) load() {
	if !v.isLoaded() { // only watch does it
		close(v.loaded)
	}
}

func (v *view) isLoaded() bool {
	select {
	case <-v.loaded:
		return true
	default:
		return false
	}
}

// wait waits until all operations are in the view.
func (v *view) wait(ctx context.Context) error {
	select {
	case <-v.loaded:
		return nil
	case <-ctx.Done():
		return unavailable("load operations", ctx.Err())
	}
}

func (v *view) put(r record, rev uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	before, known := v.ops[r.ID]
	if known && before.rev >= rev {
		return
	}
	v.ops[r.ID] = entry{r, rev}
	if waited := known && before.rec.State == NotStarted; waited != (r.State == NotStarted) {
		v.moved(r.ID)
	}
	v.tell(r.ID)
}

func (v *view) drop(id string, rev uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, known := v.ops[id]
	if !known || e.rev > rev {
		return
	}
	delete(v.ops, id)
	if e.rec.State == NotStarted {
		v.moved(id)
	}
	v.end(id)
}

func (v *view) putLast(key, id string, rev uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.last[key].rev < rev {
		v.last[key] = last{id, rev}
	}
}

func (v *view) dropLast(key string, rev uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.last[key].rev <= rev {
		delete(v.last, key)
	}
}

// moved tells those who wait that the queue is another one: all but id, which is told of anyway.
func (v *view) moved(id string) {
	v.positions = nil
	for other := range v.watchers {
		if other != id && v.ops[other].rec.State == NotStarted {
			v.tell(other)
		}
	}
}

func (v *view) tell(id string) {
	e := v.ops[id]
	for w := range v.watchers[id] {
		w.changed(e, v.operation(e))
	}
	if e.rec.State.Ended() {
		v.end(id)
	}
}

func (v *view) end(id string) {
	for w := range v.watchers[id] {
		w.ended()
	}
	delete(v.watchers, id)
}

// follow tells w of the operation as it is and as it changes; false if there is none. remove ends it.
func (v *view) follow(id string, w *watcher) (remove func(), ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.ops[id]
	if !ok {
		return nil, false
	}
	w.changed(e, v.operation(e))
	if e.rec.State.Ended() {
		w.ended()
		return func() {}, true
	}
	if v.watchers[id] == nil {
		v.watchers[id] = map[*watcher]struct{}{}
	}
	v.watchers[id][w] = struct{}{}
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if _, follows := v.watchers[id][w]; follows {
			delete(v.watchers[id], w)
			if len(v.watchers[id]) == 0 {
				delete(v.watchers, id)
			}
			w.ended()
		}
	}, true
}

// operation is what everybody may see of e.
func (v *view) operation(e entry) Operation {
	op := e.rec.Operation
	if op.State == NotStarted {
		if v.positions == nil {
			v.positions = v.count()
		}
		op.Position = v.positions[op.ID]
	}
	return op
}

// count orders the queue: by time, as its messages are, with bulk in its turns.
func (v *view) count() map[string]int {
	var list, bulk []Operation
	for _, e := range v.ops {
		switch {
		case e.rec.State != NotStarted:
		case e.rec.Bulk:
			bulk = append(bulk, e.rec.Operation)
		default:
			list = append(list, e.rec.Operation)
		}
	}
	slices.SortFunc(list, oldestFirst)
	slices.SortFunc(bulk, oldestFirst)
	positions := make(map[string]int, len(list)+len(bulk))
	for n := 1; len(list)+len(bulk) > 0; n++ {
		from := &list
		if len(bulk) > 0 && (n%bulkTurns == 0 || len(list) == 0) {
			from = &bulk
		}
		positions[(*from)[0].ID] = n
		*from = (*from)[1:]
	}
	return positions
}

// waiting is how many operations of r's repository wait, or of who asks for r, whichever is more.
func (v *view) waiting(r record) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	same, own := 0, 0
	for _, e := range v.ops {
		if e.rec.State != NotStarted {
			continue
		}
		if e.rec.Registry == r.Registry && e.rec.Repository == r.Repository {
			same++
		}
		if r.Wanted && e.rec.By == r.By {
			own++
		}
	}
	return max(same, own)
}

func oldestFirst(a, b Operation) int {
	return cmp.Or(a.Asked.Compare(b.Asked), cmp.Compare(a.ID, b.ID))
}

func (v *view) record(id string) (record, uint64, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.ops[id]
	return e.rec, e.rev, ok
}

func (v *view) get(id string) (Operation, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.ops[id]
	return v.operation(e), ok
}

// lastOf returns the last operation of an image by its key.
func (v *view) lastOf(key string) (Operation, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.ops[v.last[key].id]
	return v.operation(e), ok
}

// list returns the operations that keep is true of, the newest first, at most limit.
func (v *view) list(limit int, keep func(Operation) bool) []Operation {
	newestFirst := func(a, b Operation) int { return oldestFirst(b, a) }
	v.mu.Lock()
	defer v.mu.Unlock()
	var found []Operation
	for _, e := range v.ops {
		if !keep(e.rec.Operation) {
			continue
		}
		// Twice as many as are wanted are sorted at most.
		if found = append(found, v.operation(e)); len(found) == 2*limit {
			slices.SortFunc(found, newestFirst)
			found = found[:limit]
		}
	}
	slices.SortFunc(found, newestFirst)
	return slices.Clip(found[:min(limit, len(found))])
}

// orphans returns the keys of images whose last operation has no record, with their revisions.
func (v *view) orphans() map[string]uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := map[string]uint64{}
	for key, l := range v.last {
		if _, ok := v.ops[l.id]; !ok {
			list[key] = l.rev
		}
	}
	return list
}

// entries returns the records that keep is true of.
func (v *view) entries(keep func(record) bool) (list []entry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, e := range v.ops {
		if keep(e.rec) {
			list = append(list, e)
		}
	}
	return list
}

// lastRevision returns the revision of an image's key if it names id; 0 if not.
func (v *view) lastRevision(key, id string) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.last[key]; l.id == id {
		return l.rev
	}
	return 0
}

// states counts the operations by state.
func (v *view) states() map[State]int {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := map[State]int{}
	for _, e := range v.ops {
		n[e.rec.State]++
	}
	return n
}

// offer puts x into a channel of one element in place of what nobody took. Only one goroutine at a time may do it.
func offer[T any](c chan T, x T) {
	select {
	case <-c:
	default:
	}
	c <- x
}
