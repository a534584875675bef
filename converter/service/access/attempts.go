package access

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of attempts that fail, for each address.
const (
	attemptBurst    = 10
	attemptInterval = 6 * time.Second
	maxAddresses    = 4096 // that are remembered at once, at least
)

// attempts counts for each address, or network of an IPv6 host, in two generations: when the young one is full, the old one is
// forgotten.
type attempts struct {
	mu         sync.Mutex
	young, old map[netip.Prefix]*rate.Limiter
}

// allow says whether one more attempt from addr is within bounds, and counts it.
func (a *attempts) allow(addr netip.Addr, now time.Time) bool {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	from, _ := addr.Prefix(bits) // the zero Prefix for what has no address
	a.mu.Lock()
	defer a.mu.Unlock()
	limit := a.young[from]
	if limit == nil {
		if limit = a.old[from]; limit == nil {
			limit = rate.NewLimiter(rate.Every(attemptInterval), attemptBurst)
		}
		if a.young == nil || len(a.young) >= maxAddresses {
			a.young, a.old = map[netip.Prefix]*rate.Limiter{}, a.young
		}
		a.young[from] = limit
	}
	return limit.AllowN(now, 1)
}
