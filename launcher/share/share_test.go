package share

import (
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestParse: what the service says is what the process understands.
func TestParse(t *testing.T) {
	want := Spec{VsockPath: "/run/v", Port: 1025, Session: wire.SessionID{1, 15: 2}, Dir: "/home/a b", ReadOnly: true, UID: 1000, GID: 1 << 31}
	got, err := Parse(want.args())
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range 6 {
		args := want.args()
		args[i+1-i/6] = "x"
		if i == 5 {
			args = args[:6]
		}
		if got, err := Parse(args); err == nil {
			t.Errorf("%q: %+v", args, got)
		}
	}
}
