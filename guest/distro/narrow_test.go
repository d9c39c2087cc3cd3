package distro

import (
	"reflect"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/internal/wslconf"
)

// TestNarrowed: a distro may have less than the host shares.
func TestNarrowed(t *testing.T) {
	given := []wire.Share{{Host: "/home/me", Guest: "/mnt/host"}, {Host: "/srv", Guest: "/mnt/srv", ReadOnly: true}}
	ro := wire.Share{Host: "/home/me", Guest: "/mnt/host", ReadOnly: true}
	for text, want := range map[string][]wire.Share{
		"":                                 given,
		"[shares]\nhost=ro\nsrv=none":      {ro},
		"[shares]\nHOST=ro\nsrv=rw\nx=ro":  {ro, given[1]},
		"[shares]\nsrv=rw":                 given,
		"[shares]\nhost=/etc":              {given[1]},
		"[automount]\nenabled=false":       nil,
		"[automount]\nenabled=true":        given,
		"[shares]\nhost=none\n[boot]\n":    {given[1]},
		"[shares]\nmnt=none\n/mnt/host=ro": given,
	} {
		c, _ := wslconf.Parse(text)
		if got := narrowed(given, &c); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
	}
}
