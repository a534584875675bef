package service

import (
	"fmt"
	"testing"
	"time"
)

// TestNewest: a list has the newest of those that who asks may see, however many newer ones there are that they may not.
func TestNewest(t *testing.T) {
	s := &Service{view: newView()}
	s.view.load()
	const n = 1000
	begin := now()
	for i := range n {
		r := record{Operation: Operation{ID: fmt.Sprint(i), Image: Image{Registry: "a", Repository: "theirs"}, State: Succeeded, Asked: begin.Add(time.Duration(i) * time.Second)}}
		if i < n/2 && i%2 == 0 {
			r.Repository = "mine"
		}
		s.view.put(r, uint64(i+1))
	}
	for _, c := range []struct {
		f           Filter
		n           int
		first, last string
	}{
		{Filter{Limit: 10}, 10, "999", "990"},
		{Filter{}, 100, "999", "900"},
		{Filter{Limit: 2 * n}, n, "999", "0"},
		{Filter{Limit: 10, May: func(_, repository string) bool { return repository == "mine" }}, 10, "498", "480"},
		{Filter{Limit: n, May: func(_, repository string) bool { return repository == "mine" }}, n / 4, "498", "0"},
		{Filter{Limit: 10, May: func(string, string) bool { return false }}, 0, "", ""},
	} {
		list, err := s.Operations(t.Context(), c.f)
		if err != nil || len(list) != c.n || c.n > 0 && (list[0].ID != c.first || list[c.n-1].ID != c.last) {
			t.Errorf("%+v: %d operations, %v", c, len(list), err)
		}
	}
}
