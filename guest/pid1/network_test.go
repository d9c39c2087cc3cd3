package pid1

import (
	"strings"
	"testing"

	"github.com/wsl2/wsl2/guest/netns"
)

// TestNotOurs: a namespace that turns out to be the VM's own is no distro's.
func TestNotOurs(t *testing.T) {
	own, err := netns.Cookie()
	if err != nil {
		t.Fatal(err)
	}
	if err := notOurs(own); err == nil || !strings.Contains(err.Error(), "start it again") {
		t.Errorf("in our own: %v", err)
	}
	if err := notOurs(own + 1); err != nil {
		t.Errorf("in another one: %v", err)
	}
}
