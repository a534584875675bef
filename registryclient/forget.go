package registryclient

// Forget lets go of what the hosts of repo are shown: tokens and passwords. The next request has the sources of credentials asked anew.
func (c *Client) Forget(repo Repository) {
	registry, name, err := repo.split()
	if err != nil {
		return // nothing was asked there
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.registries[registry]; r != nil {
		for _, h := range r.hosts {
			h.auth.forget(name)
		}
	}
}

// forget drops the grant of a repository, unless somebody is getting it just now.
func (a *authorizer) forget(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.denials, name)
	g := a.grants[name]
	if g == nil {
		delete(a.served, name)
		return
	}
	select {
	case <-g.done:
		delete(a.grants, name)
		delete(a.served, name)
	default:
	}
}
