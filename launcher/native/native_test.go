package native

import (
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// TestAnswer: what /init says at the gate, and what it does not.
func TestAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		said       wire.Message
		text       string
		says, next string
	}{
		"a process":        {said: &wire.Reply{Text: "123"}, text: "123"},
		"no namespaces":    {said: &wire.Reply{Code: wire.CodeRefused, Text: "too many"}, says: "too many", next: "max_user_namespaces"},
		"another failure":  {said: &wire.Reply{Code: wire.CodeInternal, Text: "no root"}, says: "no root"},
		"something else":   {said: &wire.DistroIdle{Name: "x"}, says: "answers"},
		"nothing, it ends": {says: "ended in the namespaces"},
	} {
		gate, theirs, err := pair("gate")
		if err != nil {
			t.Fatal(err)
		}
		if c.said != nil {
			if err := wire.Write(theirs, c.said); err != nil {
				t.Fatal(err)
			}
		}
		theirs.Close()
		text, err := answer(gate)
		gate.Close()
		if text != c.text || (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || !strings.Contains(api.AsError(err).Hint, c.next)) {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}
