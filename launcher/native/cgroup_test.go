package native

import "testing"

func TestOwnCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/user.slice/a b\n":             "/user.slice/a b",
		"9:name=systemd:/x\n1:cpu:/\n0::/": "/",
		"1:cpu:/\n":                        "",
		"0::/../other\n":                   "", // above the root of our namespace
		"0::/..":                           "",
	} {
		path, ok := ownCgroup(text)
		if ok != (want != "") || ok && path != want {
			t.Errorf("%q: %q, %v, want %q", text, path, ok, want)
		}
	}
}
