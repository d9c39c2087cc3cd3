package hostpath

import (
	"reflect"
	"strings"
	"testing"
)

var table = Table{
	{Host: "/home/me", Guest: "/mnt/host"},
	{Host: "/home/me/code", Guest: "/code"},
	{Host: "/srv/a b\\c\td\ne", Guest: "/mnt/odd"},
	{Host: "/run/user/1000/wsl2/fs/debian", Guest: "/"},
}

func TestTranslate(t *testing.T) {
	for host, guest := range map[string]string{
		"/home/me":           "/mnt/host",
		"/home/me/":          "/mnt/host/",
		"/home/me/a/b":       "/mnt/host/a/b",
		"/home/me/a/../b":    "/mnt/host/b",
		"/home/me//x//":      "/mnt/host/x/",
		"/home/me/code":      "/code",
		"/home/me/code/x":    "/code/x",
		"/home/me/coders":    "/mnt/host/coders",
		"/home/me/code/../x": "/mnt/host/x",
		"/home/men":          "",
		"/home":              "",
		"/":                  "",
		"home/me":            "",
		"":                   "",
		"/home/me/\x00":      "",
		"/home/me/../you":    "",
		"/run/user/1000/wsl2/fs/debian/etc/passwd": "/etc/passwd",
		"/run/user/1000/wsl2/fs/debian":            "/",
		"/run/user/1000/wsl2/fs/debian/":           "/",
	} {
		if got, ok := table.ToGuest(host); got != guest || ok != (guest != "") {
			t.Errorf("ToGuest(%q) = %q, %v; want %q", host, got, ok, guest)
		}
	}
	for guest, host := range map[string]string{
		"/mnt/host/x":      "/home/me/x",
		"/mnt/host":        "/home/me",
		"/mnt/host/code":   "/home/me/code", // hidden there, but the same file on the host
		"/code/":           "/home/me/code/",
		"/etc":             "/run/user/1000/wsl2/fs/debian/etc",
		"/":                "/run/user/1000/wsl2/fs/debian/",
		"/mnt/host/../etc": "/run/user/1000/wsl2/fs/debian/mnt/etc",
		"etc":              "",
	} {
		if got, ok := table.ToHost(guest); got != host || ok != (host != "") {
			t.Errorf("ToHost(%q) = %q, %v; want %q", guest, got, ok, host)
		}
	}
	if got, ok := (Table{}).ToHost("/etc"); ok {
		t.Errorf("without shares: %q", got)
	}
}

func TestText(t *testing.T) {
	back, err := Parse(table.String())
	if err != nil || !reflect.DeepEqual(back, table) {
		t.Errorf("%v\n%v", back, err)
	}
	for _, bad := range []string{"/a\n", "/a /b\n", "a\t/b\n", "/a\tb\n", "/a/\t/b\n", "/a\t/b/..\n", "\n"} {
		if got, err := Parse(bad); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}

// FuzzTranslate: what goes over and comes back is the same path, and no path
// leads out of a share.
func FuzzTranslate(f *testing.F) {
	for _, p := range []string{"/home/me/x", "/home/me/../x", "/home/me/code//", "//", "x", "/home/me/."} {
		f.Add(p)
	}
	one := Table{{Host: "/home/me", Guest: "/mnt/host"}}
	f.Fuzz(func(t *testing.T, p string) {
		guest, ok := one.ToGuest(p)
		if !ok {
			return
		}
		if guest != "/mnt/host" && !strings.HasPrefix(guest, "/mnt/host/") || strings.Contains(guest+"/", "/../") {
			t.Fatalf("%q is %q", p, guest)
		}
		host, ok := one.ToHost(guest)
		if !ok || strings.TrimSuffix(host, "/") != strings.TrimSuffix(strings.TrimSuffix("/home/me"+strings.TrimPrefix(guest, "/mnt/host"), "/"), "/") {
			t.Fatalf("%q is %q and back %q, %v", p, guest, host, ok)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add(table.String())
	f.Add("/a\t/b\\040c\n")
	f.Fuzz(func(t *testing.T, text string) {
		shares, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(shares.String())
		if err != nil || !reflect.DeepEqual(again, shares) {
			t.Fatalf("%q: %v, then %v, %v", text, shares, again, err)
		}
	})
}
