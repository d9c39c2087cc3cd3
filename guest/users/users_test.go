package users

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func root(t testing.TB, passwd, group string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(dir+"/etc/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const passwd = `root:x:0:0:root:/root:/bin/bash
# a comment
broken line
bad:x:notanumber:0::/:/bin/sh
huge:x:4294967295:0::/:/bin/sh
ann:x:1000:1001:Ann,,,:/home/ann:
bob:x:1001:1001::relative:/bin/zsh
2000:x:3000:3000::/two:/bin/sh
twin:x:1000:5::/twin:/bin/sh
+nis::::::
`

const group = `root:x:0:
adm:x:4:ann,bob
sudo:x:27:bob,ann
own:x:1001:ann
broken
bad:x:x:ann
again:x:27:ann
anna:x:99:anna,annx
`

func TestLookup(t *testing.T) {
	dir := root(t, passwd, group)
	ann := &User{"ann", 1000, 1001, []uint32{4, 27}, "/home/ann", DefaultShell}
	for who, want := range map[string]*User{
		"":      {"root", 0, 0, nil, "/root", "/bin/bash"},
		"root":  {"root", 0, 0, nil, "/root", "/bin/bash"},
		"0":     {"root", 0, 0, nil, "/root", "/bin/bash"},
		"ann":   ann,
		"1000":  ann, // the first of two
		"bob":   {"bob", 1001, 1001, []uint32{4, 27}, "/", "/bin/zsh"},
		"2000":  {"2000", 3000, 3000, nil, "/two", "/bin/sh"}, // a name before a number
		"12345": {"12345", 12345, 12345, nil, "/", DefaultShell},
	} {
		if got, err := Lookup(dir, who); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v, want %+v", who, got, err, want)
		}
	}
	for _, who := range []string{"nobody", "bad", "huge", "4294967295", "-1", "ann:x", "+nis", "broken line"} {
		if got, err := Lookup(dir, who); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: %+v, %v", who, got, err)
		}
	}
}

func TestDefault(t *testing.T) {
	dir := root(t, passwd, group)
	for _, c := range []struct{ configured, registered, want string }{
		{"", "", ""}, {"", "ann", "ann"}, {"bob", "", "bob"}, {"bob", "ann", "bob"},
		{"nobody", "ann", "ann"}, {"nobody", "", ""}, {"", "nobody", "nobody"}, // whoever looks that one up tells
	} {
		who, reason := Default(dir, c.configured, c.registered)
		if who != c.want || errors.Is(reason, ErrUnknown) != (c.configured == "nobody") {
			t.Errorf("%+v: %q, %v", c, who, reason)
		}
	}
}

func TestLookupWithoutFiles(t *testing.T) {
	dir := t.TempDir()
	if u, err := Lookup(dir, ""); err != nil || u.Name != "root" || u.Home != "/root" || u.Shell != DefaultShell {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := Lookup(dir, "ann"); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
}

// TestLookupHostileFiles: whatever the distro put there, Lookup returns.
func TestLookupHostileFiles(t *testing.T) {
	dir := root(t, strings.Repeat("x", maxLine+1)+"\nann:x:1:1::/:\n", "")
	if _, err := Lookup(dir, "ann"); err == nil {
		t.Error("a line without end was accepted")
	}
	fifo := t.TempDir()
	if err := os.Mkdir(fifo+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo+"/etc/passwd", 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Lookup(fifo, "ann"); !errors.Is(err, ErrUnknown) {
		t.Errorf("FIFO: %v", err)
	}
}

// FuzzLookup: a user that is found was asked for and can be run as.
func FuzzLookup(f *testing.F) {
	f.Add(passwd, group, "ann")
	f.Add(passwd, group, "1000")
	dir := root(f, "", "")
	f.Fuzz(func(t *testing.T, p, g, who string) {
		for name, text := range map[string]string{"passwd": p, "group": g} {
			if err := os.WriteFile(dir+"/etc/"+name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		u, err := Lookup(dir, who)
		if err != nil {
			return
		}
		if u.UID == 1<<32-1 || u.GID == 1<<32-1 || u.Shell == "" || u.Home == "" || u.Home[0] != '/' {
			t.Errorf("%q: %+v", who, u)
		}
	})
}
