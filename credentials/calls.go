package credentials

import (
	"context"
	"sync"

	"golang.org/x/sync/singleflight"
)

// calls are what sources ask of others: helpers, plugins, an API server. One with the same key is under way once, for all who want its answer, and goes on when they
// have left: it may be what the next ones find.
type calls struct {
	group  singleflight.Group
	ctx    context.Context // of all
	cancel context.CancelFunc

	mu      sync.Mutex
	running sync.WaitGroup // grows under mu, as long as ctx lives
}

func newCalls() *calls {
	c := &calls{}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// close ends them.
func (c *calls) close() {
	c.mu.Lock()
	c.cancel()
	c.mu.Unlock()
	c.running.Wait()
}

// once calls f once for all who ask with the same key while it runs.
func (c *calls) once(ctx context.Context, key string, f func(context.Context) (any, error)) (any, error) {
	answer := c.group.DoChan(key, func() (any, error) {
		c.mu.Lock()
		if err := c.ctx.Err(); err != nil {
			c.mu.Unlock()
			return nil, err
		}
		c.running.Add(1)
		c.mu.Unlock()
		defer c.running.Done()
		return f(c.ctx)
	})
	select {
	case r := <-answer:
		return r.Val, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
