package console

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// TestPaging: thousands of tags are a page at a time, and a filter finds those of other pages.
func TestPaging(t *testing.T) {
	s := example()
	s.tags = nil
	for i := range 2345 {
		s.tags = append(s.tags, service.TagInfo{Name: fmt.Sprintf("v%04d", i), Digest: dig("index")})
	}
	_, as := serve(t, s)
	b := as("rita")
	repository := repositoryPath(host, "team/app")
	for _, c := range []struct {
		query          string
		rows           int
		first, says    string
		previous, next string
	}{
		{"", 50, "v0000", "1 to 50 of 2,345 tags", "", repository + "?page=2"},
		{"?page=2", 50, "v0050", "51 to 100 of 2,345 tags", repository, repository + "?page=3"},
		{"?page=47", 45, "v2300", "2,301 to 2,345 of 2,345 tags", repository + "?page=46", ""},
		{"?page=999", 45, "v2300", "2,301 to 2,345", repository + "?page=46", ""},
		{"?page=-4", 50, "v0000", "1 to 50", "", repository + "?page=2"},
		{"?q=v23", 45, "v2300", "", "", ""},
		{"?q=v1", 50, "v1000", "1 to 50 of 1,000 tags", "", repository + "?page=2&q=v1"},
		{"?q=nothing", 0, "", "No tag contains “nothing”", "", ""},
	} {
		s.filled.Store(0)
		status, page := b.get(repository + c.query)
		if n := s.filled.Load(); n != int64(c.rows) {
			t.Errorf("%q: %d tags are looked at, want %d", c.query, n, c.rows)
		}
		if status != http.StatusOK {
			t.Fatalf("%s is %d", c.query, status)
		}
		root := parse(t, page)
		var names []string
		for _, th := range all(root, "th") {
			if scope, _ := attr(th, "scope"); scope == "row" && strings.HasPrefix(textOf(th), "v") && len(textOf(th)) == 5 {
				names = append(names, textOf(th))
			}
		}
		if len(names) != c.rows || c.rows > 0 && names[0] != c.first || !strings.Contains(textOf(root), c.says) {
			t.Errorf("%q: %d rows, want %d from %s", c.query, len(names), c.rows, c.first)
		}
		links := map[string]string{}
		for _, a := range all(root, "a") {
			if rel, ok := attr(a, "rel"); ok {
				links[rel], _ = attr(a, "href")
			}
		}
		if links["prev"] != c.previous || links["next"] != c.next {
			t.Errorf("%q: previous %q, next %q; want %q and %q", c.query, links["prev"], links["next"], c.previous, c.next)
		}
	}
}

// TestOperations: the filters of the list find what they say.
func TestOperations(t *testing.T) {
	s := example()
	s.operations[4].Repository = "lib/base"
	_, as := serve(t, s)
	for query, want := range map[string]string{
		"": "1 2 3 4 5", "?state=ongoing": "1 2", "?state=Failed": "4", "?repository=BASE": "", "?repository=base": "5", "?state=Canceled&repository=app": "", "?registry=other.example.com": "",
	} {
		_, page := as("olivia").get("/operations" + query)
		var got []string
		for _, a := range all(parse(t, page), "a") {
			if to, _ := attr(a, "href"); strings.HasPrefix(to, "/operations/") {
				got = append(got, to[len(to)-1:])
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q finds %v, want %s", query, got, want)
		}
	}
	for i := range 150 {
		o := s.operations[3]
		o.ID = id(100 + i)
		s.operations = append(s.operations, o)
	}
	_, page := as("olivia").get("/operations?state=Failed")
	if n := strings.Count(page, `scope="row"`); n != newest || !strings.Contains(page, "all=1&amp;state=Failed") {
		t.Errorf("%d of very many are shown", n)
	}
	if _, page := as("olivia").get("/operations?all=1&state=Failed"); strings.Count(page, `scope="row"`) != 151 {
		t.Error("older ones are not shown when asked for")
	}
}

// TestErrors: an error says what to do, and nothing of what went wrong inside.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err    error
		status int
		says   string
	}{
		{errors.New("open /var/lib/secret"), http.StatusInternalServerError, "Something went wrong"},
		{fmt.Errorf("nats at 10.0.0.1: %w", service.ErrUnavailable), http.StatusServiceUnavailable, "Try again in a minute"},
		{fmt.Errorf("secret: %w", service.ErrNotFound), http.StatusNotFound, "may have been deleted"},
	} {
		s := example()
		s.err = c.err
		_, as := serve(t, s)
		status, page := as("olivia").get(registryPath(host))
		text := textOf(parse(t, page))
		checkPage(t, page)
		if status != c.status || !strings.Contains(text, c.says) || strings.Contains(text, "secret") || strings.Contains(text, "10.0.0.1") {
			t.Errorf("%v: %d, want %d with %q:\n%s", c.err, status, c.status, c.says, text)
		}
	}
}

// TestEvents: a stream has the progress at each change, and ends with the operation.
func TestEvents(t *testing.T) {
	s := example()
	s.watching = make(chan service.Operation)
	base, as := serve(t, s)
	b := as("rita")
	answer, err := b.Get(base + operationPath(id(1), "events"))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if kind := answer.Header.Get("Content-Type"); kind != "text/event-stream" || answer.StatusCode != http.StatusOK {
		t.Fatalf("answer is %d, %s", answer.StatusCode, kind)
	}
	lines := bufio.NewScanner(answer.Body)
	event := func() (name, data string) {
		for lines.Scan() {
			text := lines.Text()
			if after, ok := strings.CutPrefix(text, "event: "); ok {
				name = after
			} else if after, ok := strings.CutPrefix(text, "data: "); ok {
				data += after + "\n"
			} else if text == "" && name != "" {
				return name, data
			}
		}
		return "", ""
	}
	o := s.operations[0]
	for _, percent := range []int{42, 43, 100} {
		if o.Progress.Percent = percent; percent == 100 {
			o.State = service.Succeeded
		}
		s.watching <- o
		name, data := event()
		want := strconv.Itoa(percent) + " %"
		if percent == 100 {
			want = "Succeeded"
		}
		if root := parse(t, data); name != "progress" || !strings.Contains(textOf(root), want) || len(all(root, "progress")) != map[bool]int{true: 0, false: 1}[percent == 100] {
			t.Errorf("event %q: %s", name, data)
		}
	}
	close(s.watching)
	if name, _ := event(); name != "end" {
		t.Errorf("the last event is %q", name)
	}
	if lines.Scan() && lines.Text() != "" || lines.Scan() {
		t.Errorf("after the end comes %q", lines.Text())
	}
}

// TestPlaces: each path that is written is read as what it was written for, whatever the names are.
func TestPlaces(t *testing.T) {
	for _, name := range []string{"app", "team/app", "a/b/c/image", "team/image/v1", "über/ein name", "a%2Fb", "a?b#c", `<b>"'`, "operations", "-x/y-"} {
		for path, want := range map[string]place{
			repositoryPath(host, name):                        {what: "repository", Registry: host, Repository: name},
			repositoryPath(host, name, "-", "storage"):        {what: "repository/storage", Registry: host, Repository: name},
			imagePath(host, name, "v1"):                       {what: "image", Registry: host, Repository: name, Ref: "v1"},
			imagePath(host, name, "create", "delete"):         {what: "image/delete", Registry: host, Repository: name, Ref: "create"},
			imagePath(host, name, dig("x").String(), "start"): {what: "image/start", Registry: host, Repository: name, Ref: dig("x").String()},
			imagePath(host, name, "a/b"):                      {what: "image", Registry: host, Repository: name, Ref: "a/b"},
		} {
			if strings.Contains(name, "%2F") && strings.Count(path, "%252F") != 1 {
				t.Errorf("%s does not escape %s", path, name)
			}
			if got, ok := placeOf(path); !ok || got != want {
				t.Errorf("%s is %+v, want %+v", path, got, want)
			}
		}
	}
	for path, want := range map[string]string{
		"/": "home", "/registries": "home", registryPath(host): "registry", registryPath(host, "-", "switch"): "registry/switch", "/operations": "operations",
		operationPath(id(1)): "operation", operationPath(id(1), "events"): "operation/events", "/static/console.css": "static",
	} {
		if got, ok := placeOf(path); !ok || got.what != want {
			t.Errorf("%s is %+v, want %s", path, got, want)
		}
	}
}

// TestCells: the cells of a bar cover what is read, no more than a cell's width beside it, and are few.
func TestCells(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		l := service.LayerMap{TarSize: 1 + random.Int64N(1<<random.IntN(40))}
		for off := int64(0); off < l.TarSize && len(l.Hot) < 300; {
			gap, n := random.Int64N(l.TarSize/20+2), 1+random.Int64N(l.TarSize/50+2)
			if off += gap; off+n > l.TarSize {
				break
			}
			l.Hot = append(l.Hot, service.Span{Off: off, Len: n})
			off += n + 1
		}
		units := leastUnits + random.IntN(mapUnits-leastUnits)
		list := cells(l, units)
		if len(list) > units/cellUnits {
			t.Fatalf("%d cells in %d units", len(list), units)
		}
		per := float64(l.TarSize) / float64(units) // bytes of a unit
		in := func(at float64) bool {
			for _, c := range list {
				x, _ := strconv.ParseFloat(c.X, 64)
				w, _ := strconv.ParseFloat(c.Width, 64)
				if c.Heat < 1 || c.Heat > 4 || x < 0 || x+w > float64(units)+0.02 {
					t.Fatalf("cell %+v of %d units", c, units)
				}
				if at >= x-0.02 && at <= x+w+0.02 {
					return true
				}
			}
			return false
		}
		for _, s := range l.Hot {
			if middle := (float64(s.Off) + float64(s.Len)/2) / per; !in(middle) {
				t.Fatalf("span %+v of %d bytes is not drawn at %.2f of %d units: %+v", s, l.TarSize, middle, units, list)
			}
		}
		if len(l.Hot) == 0 && len(list) > 0 {
			t.Fatalf("cells %+v of nothing", list)
		}
	}
	if got := cells(service.LayerMap{TarSize: 100, Hot: []service.Span{{Off: 0, Len: 100}}}, 1000); len(got) != 1 || got[0] != (cell{"0", "1000", 4}) {
		t.Errorf("what is read whole is %+v", got)
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 79049999: "79.0 MB", 999_999_999: "1.0 GB", 1 << 62: "4.6 EB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) is %q, want %q", n, got, want)
		}
	}
	for text, want := range map[string]int64{"": 0, " 12 ": 12, "100 MB": 100e6, "1.5GiB": 3 << 29, "7k": 7000, "-1": -1, "x": -1, "1e9": -1, "99999999 TB": -1, "1.2.3": -1} {
		if got, err := parseSize(text); err == nil && got != want || (err != nil) != (want < 0) {
			t.Errorf("parseSize(%q) is %d, %v; want %d", text, got, err, want)
		}
	}
	for n, want := range map[int64]string{50e6: "50.0 MB", 123456789: "123456789 B", 7: "7 B"} {
		if got := exactSize(n); got != want {
			t.Errorf("exactSize(%d) is %q, want %q", n, got, want)
		}
	}
	for ago, want := range map[time.Duration]string{0: "just now", time.Minute: "1 minute ago", 3 * time.Hour: "3 hours ago", 49 * time.Hour: "2 days ago", 100 * 24 * time.Hour: "22 Aug 2026"} {
		if got := momentAt(now.Add(-ago), now).Text; got != want {
			t.Errorf("%v ago is %q, want %q", ago, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "0 s", 1500 * time.Millisecond: "1.5 s", 42 * time.Second: "42 s", 185 * time.Second: "3 min 5 s", 130 * time.Minute: "2 h 10 min"} {
		if got := took(d); got != want {
			t.Errorf("took(%v) is %q, want %q", d, got, want)
		}
	}
	if got := plural(2, "repository") + ", " + plural(1, "tag") + ", " + plural(1234, "tag"); got != "2 repositories, 1 tag, 1,234 tags" {
		t.Error(got)
	}
	if got := share(1, 3000) + ", " + share(5, 100) + ", " + share(50, 100) + ", " + share(1, 0); got != "< 0.1 %, 5.0 %, 50 %, 0 %" {
		t.Error(got)
	}
}

// TestTimes: how long starts take is there in words and numbers beside the bars, with how it was before.
func TestTimes(t *testing.T) {
	s := example()
	_, as := serve(t, s)
	b := as("rita")
	image := imagePath(host, "team/app", "v1")
	_, page := b.get(image + "/start")
	root := parse(t, page)
	text := strings.Join(strings.Fields(textOf(root)), " ")
	for _, want := range []string{
		"Half of the starts take 0.80 s or less now, with a static profile, and nine of ten 2.0 s.", "Before, with no profile, half of them took 3.2 s or less: that is 75 % less now.",
		"until nothing more of it was read for the start, as about 41 nodes have reported", "0 to 8.0 s", "not known", "9.0 MB",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	bars := map[string]string{}
	for _, svg := range all(root, "svg") {
		if label, _ := attr(svg, "aria-label"); strings.HasPrefix(label, "With ") {
			for _, rect := range all(svg, "rect") {
				class, _ := attr(rect, "class")
				width, _ := attr(rect, "width")
				bars[label] += class + " " + width + ";"
			}
		}
	}
	if len(bars) != 2 || bars["With a static profile, now: half of the starts within 0.80 s, nine of ten within 2.0 s"] != "all 1000;heat-2 250;heat-4 100;" {
		t.Errorf("bars are %v", bars)
	}
	if _, page := b.get(image); !strings.Contains(strings.Join(strings.Fields(textOf(parse(t, page))), " "), "Half of the starts take 0.80 s or less, of 40 starts") {
		t.Error("the overview does not say how long a start takes")
	}

	// With a probe's word for all of them, that counts; without any report the page says how there would be one.
	starts := s.image.Platforms[0].Starts
	for i := range starts.Variants {
		starts.Variants[i].Ready = service.StartTimes{Count: 3, Median: 5, P90: 6}
	}
	starts.Variants[0].Current = false
	if _, page := b.get(image + "/start"); !strings.Contains(page, "Kubernetes had the pod ready by its probe") || !strings.Contains(page, "No node has reported a start that reads the image as it is now") {
		t.Error("the page does not say whose word the times are")
	}
	s.image.Platforms[0].Starts = nil
	if _, page := b.get(image + "/start"); !strings.Contains(page, "No node has reported a start of this image") {
		t.Error("the page does not say that nothing was reported")
	}
}
