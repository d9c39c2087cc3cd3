package native

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoController: each reason has its own next step.
func TestNoController(t *testing.T) {
	for err, next := range map[unix.Errno]string{unix.EBUSY: inDelegated, unix.ENOENT: controllers()} {
		if e := noController(fmt.Errorf("enable: %w", err)); e.Next != next || e.Reason != "enable: "+err.Error() {
			t.Errorf("%v: %+v", err, e)
		}
	}
}

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
