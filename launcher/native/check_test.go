package native

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestChecks: whatever a host lacks is said with the command, or the line, that mends it.
func TestChecks(t *testing.T) {
	dir := t.TempDir()
	write := func(path string, value int) {
		t.Helper()
		if err := os.WriteFile(path, fmt.Appendln(nil, value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range sysctls {
		path := filepath.Join(dir, s.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		refused := s.least - 1
		if refused < 0 {
			refused = s.most + 1
		}
		write(path, refused)
		if c := checkNamespaces(dir, false, "/bin/true"); !strings.Contains(c.Next, s.next) {
			t.Errorf("%s: %+v", s.path, c)
		}
		write(path, s.least)
	}
	write(filepath.Join(dir, sysctls[len(sysctls)-1].path), 1)
	if c := checkNamespaces(dir, true, "/bin/true"); strings.Contains(c.Detail, "apparmor") {
		t.Errorf("root is not held by %+v", c)
	}
	clone := sysctls[len(sysctls)-2]
	write(filepath.Join(dir, clone.path), 0)
	if c := checkNamespaces(dir, true, "/bin/true"); !strings.Contains(c.Next, clone.next) {
		t.Errorf("root is held by %s: %+v", clone.path, c)
	}
	if c := checkNamespaces(t.TempDir(), true, dir+"/none"); c.Next == "" {
		t.Errorf("without /init: %+v", c)
	}

	tools := t.TempDir()
	t.Setenv("PATH", tools)
	if c := checkTool("newuidmap"); !strings.Contains(c.Next, "uidmap") {
		t.Errorf("without the tool: %+v", c)
	}
	tool := filepath.Join(tools, "newuidmap")
	if err := os.WriteFile(tool, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if c := checkTool("newuidmap"); !strings.Contains(c.Next, "chmod u+s "+tool) {
		t.Errorf("not setuid: %+v", c)
	}
	if err := os.Chmod(tool, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if c := checkTool("newuidmap"); c.Next != "" || c.Detail != tool {
		t.Errorf("installed: %+v", c)
	}

	u := hostUser{name: "me", uids: ids{path: "/etc/subuid", self: 1234}, gids: ids{path: "/etc/subgid", self: 1234, own: []idRange{{300000, minIDs}}}}
	if c := u.check(); !strings.Contains(c.Detail, "/etc/subuid has none for me") || !strings.Contains(c.Next, "me:100000:65536") {
		t.Errorf("without IDs: %+v", c)
	}
	u.uids.own = u.gids.own
	if c := u.check(); c.Next != "" || !strings.Contains(c.Detail, "300000-300999, 1234, 301000-365535") {
		t.Errorf("with IDs: %+v", c)
	}
	u.gids.others = []line{{"him", idRange{365535, 1}}}
	if c := u.check(); !strings.Contains(c.Detail, "/etc/subgid gives IDs to him") || c.Next == "" {
		t.Errorf("with another's IDs: %+v", c)
	}
}
