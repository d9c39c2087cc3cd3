package wslenv

import (
	"slices"
	"strings"
	"testing"
)

func translate(p string) (string, bool) {
	rest, ok := strings.CutPrefix(p, "/home/me/")
	return "/mnt/host/" + rest, ok
}

var environ = []string{"A=1", "B=two words", "P=/home/me/x", "Q=/etc", "L=/home/me/a:/etc:/home/me/b", "E=", "AA=no", "EQ=a=b", "U=\xff"}

func TestSelect(t *testing.T) {
	for _, c := range []struct {
		list string
		to   Direction
		want []string // without WSLENV
	}{
		{"A", ToGuest, []string{"A=1"}},
		{"A:B", ToHost, []string{"A=1", "B=two words"}},
		{"A/u:B/w", ToGuest, []string{"A=1"}},
		{"A/u:B/w", ToHost, []string{"B=two words"}},
		{"A/uw", ToHost, []string{"A=1"}},
		{"P/p", ToGuest, []string{"P=/mnt/host/x"}},
		{"P/up", ToGuest, []string{"P=/mnt/host/x"}},
		{"P/wp", ToGuest, nil},
		{"P", ToGuest, []string{"P=/home/me/x"}},
		{"Q/p", ToGuest, nil},
		{"L/l", ToGuest, []string{"L=/mnt/host/a:/mnt/host/b"}},
		{"L/pl", ToGuest, []string{"L=/mnt/host/a:/mnt/host/b"}},
		{"Q/l", ToGuest, []string{"Q="}},
		{"E", ToGuest, []string{"E="}},
		{"E/p", ToGuest, []string{"E="}},
		{"UNSET", ToGuest, []string{"UNSET="}},
		{"a", ToGuest, []string{"a="}}, // names are case-sensitive
		{"EQ", ToGuest, []string{"EQ=a=b"}},
		{"U", ToGuest, []string{"U=\xff"}},
		{"A/x", ToGuest, nil},
		{"A/ux", ToGuest, nil},
		{"A/P", ToGuest, nil},
		{"::A:", ToGuest, []string{"A=1"}},
		{"/p:A/", ToGuest, []string{"A=1"}},
		{"WSLENV", ToGuest, nil},
		{"A=1", ToGuest, nil},
	} {
		want := append([]string{"WSLENV=" + c.list}, c.want...)
		if got := Select(c.list, environ, c.to, translate); !slices.Equal(got, want) {
			t.Errorf("%q to %s: %q, want %q", c.list, c.to, got, want)
		}
	}
	if got := Select("", environ, ToGuest, translate); got != nil {
		t.Errorf("no list: %q", got)
	}
}

// FuzzSelect: only what the list names comes, with a value of the environment's
// or a translated one.
func FuzzSelect(f *testing.F) {
	f.Add("A/u:B:P/p:L/l", "A=1\nP=/home/me/x", true)
	f.Fuzz(func(t *testing.T, list, vars string, guest bool) {
		to := ToHost
		if guest {
			to = ToGuest
		}
		for i, kv := range Select(list, strings.Split(vars, "\n"), to, translate) {
			name, _, ok := strings.Cut(kv, "=")
			if !ok || name == "" || i > 0 && !slices.ContainsFunc(strings.Split(list, ":"), func(e string) bool {
				return e == name || strings.HasPrefix(e, name+"/")
			}) {
				t.Fatalf("list %q: %q", list, kv)
			}
		}
	})
}
