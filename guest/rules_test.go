package guest_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestImports: the guest shares nothing with the host's side but the wire, and
// its binary holds nothing that a boot would pay for in vain.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/wsl2/wsl2/cmd/init", "github.com/wsl2/wsl2/guest/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(out)) {
		for bad, why := range map[string]string{
			"github.com/wsl2/wsl2/vmm":      "the guest does not know what it runs on",
			"github.com/wsl2/wsl2/launcher": "they meet in internal/wire only",
			"github.com/wsl2/wsl2/images":   "they meet in internal/wire only",
			"encoding/json":                 "reflection and package-level state that every boot would set up",
			"os/exec":                       "it waits for children, as only the reaper may",
			"net/http":                      "megabytes that the kernel would unpack at every boot",
			"crypto/tls":                    "megabytes that the kernel would unpack at every boot",
		} {
			if p == bad || strings.HasPrefix(p, bad+"/") {
				t.Errorf("/init imports %s: %s", p, why)
			}
		}
	}
}
