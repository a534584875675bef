package access

import (
	"fmt"
	"net/netip"
)

// CheckListen returns an error that says what to do when the service must not be reachable at addr, an address as net.Listener's Addr
// gives it: beyond loopback only with authentication, and only encrypted, by the service's own TLS or, as the operator says, by a
// proxy's in front.
func CheckListen(addr string, authenticated, encrypted bool) error {
	if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().Unmap().IsLoopback() {
		return nil
	}
	if !authenticated {
		return fmt.Errorf("refusing to listen on %s without authentication: who reaches it could convert and delete; configure tokens or OIDC, or listen on 127.0.0.1", addr)
	}
	if !encrypted {
		return fmt.Errorf("refusing to listen on %s without TLS: tokens would cross the network readable; configure a certificate, say that a proxy in front has one, or listen on 127.0.0.1", addr)
	}
	return nil
}
