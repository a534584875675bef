package tomlfile

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

type file struct {
	Name  string
	Level Level    `toml:"level"`
	Limit limit    `toml:"limit"`
	List  []string `toml:"list"`
	Items []item   `toml:"item"`
}

type limit struct {
	Size Size     `toml:"size"`
	Time Duration `toml:"time"`
}

type item struct {
	Flag bool `toml:"flag"`
}

func TestDecode(t *testing.T) {
	example := file{Limit: limit{Size: 20 << 30}, List: []string{"a"}, Items: []item{{true}}}
	got := file{Name: "default", Limit: limit{Time: Duration{time.Minute}}}
	text := "level = 'warn'\nlist = ['x']\n[limit]\nsize = '3MiB'\n[[item]]\nflag = true\n"
	if err := Decode("f", []byte(text), &got, "p", example); err != nil {
		t.Fatal(err)
	}
	if got.Name != "default" || slog.Level(got.Level) != slog.LevelWarn || got.Limit.Size != 3<<20 || got.Limit.Time.D != time.Minute || len(got.Items) != 1 {
		t.Errorf("decoded %+v", got)
	}
	var b strings.Builder
	if err := Write(&b, got); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"level = 'warn'\n", "size = '3MiB'\n", "time = '1m0s'\n"} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("written without %q:\n%s", line, b.String())
		}
	}
	for text, want := range map[string]string{
		"[limit]\nsiz = 1\n":           "f: line 2: unknown key \"limit.siz\" (`p` prints those there are)",
		"[limit]\nsize = true\n":       `"true" is no size`,
		"list = 1\n":                   "the value of list is of another type than expected, as in: list = ['a']",
		"[[item]]\nflag = 'x'\n":       "the value of item.flag is of another type than expected, as in: flag = true",
		"[limit]\nsize = '1 potato'":   `"1 potato" is no size`,
		"[limit]\ntime = '1 potato'":   `"1 potato" is no duration`,
		"level = 'loud'":               `"loud" is no level`,
		"list = \n":                    "f: line 1, column",
		"[limit]\nsize = '8EiB'":       "is no size",
		"[limit]\nsize = '-1'":         "is no size",
		"[limit]\nsize = '9999999TiB'": "is no size",
	} {
		if err := Decode("f", []byte(text), &file{}, "p", example); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "7": 7, "512B": 512, "1KiB": 1024, "1500": 1500, "3MiB": 3 << 20, "20GiB": 20 << 30, "5TiB": 5 << 40, "8388607TiB": 8388607 << 40} {
		got, err := ParseSize(s)
		if err != nil || got != want {
			t.Errorf("%s is %d, %v; want %d", s, got, err, want)
		}
		b, err := Size(got).MarshalText()
		var again Size
		if err != nil || again.UnmarshalText(b) != nil || int64(again) != want {
			t.Errorf("%s is written %s, %v, which is %d", s, b, err, again)
		}
	}
}
