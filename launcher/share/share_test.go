package share

import (
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestParse: what the service says is what the process understands.
func TestParse(t *testing.T) {
	want := Spec{VsockPath: "/run/v", Port: 1025, Session: wire.SessionID{1, 15: 2}, Dir: "/home/a b", ReadOnly: true, UID: 1000, GID: 1 << 31,
		Tag: "t", Socket: "/run/v_fs0", FileMask: 0o177, DirMask: 0o77, Metadata: true}
	got, err := Parse(want.args())
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for _, i := range []int{1, 2, 3, 4, 5, 9, 10, 11} { // what is no text
		args := want.args()
		args[i] = "x"
		if got, err := Parse(args); err == nil {
			t.Errorf("%q: %+v", args, got)
		}
	}
	if got, err := Parse(want.args()[:11]); err == nil {
		t.Errorf("without the last: %+v", got)
	}
}
