package testsys

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// The table of docs/files.md, of what a mount does otherwise than the kernel's own file systems: a row for each, with a pattern of
// names of package posixtest's tests, and a column for each mount.
var (
	differenceRow = regexp.MustCompile("(?m)^\\| `([^`]+)` \\|([^|]*)\\|([^|]*)\\|([^|]*)\\|")
	testBegun     = regexp.MustCompile(`(?m)^\s*=== RUN +(\S+)$`)
	testFailed    = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+) `)
)

// Differences holds what package posixtest's suite says of a mount ("virtio-fs", "9P", "host mount"; of any other nothing is
// listed) to the table of docs/files.md: what fails is listed, and what is listed fails. At least so many cases are to have run.
func Differences(tb testing.TB, mount string, least int, output string) {
	tb.Helper()
	doc, err := os.ReadFile(Root() + "/docs/files.md")
	Must(tb, err)
	column, some := map[string]int{"virtio-fs": 2, "9P": 3, "host mount": 4}[mount]
	var listed []*regexp.Regexp
	for _, row := range differenceRow.FindAllStringSubmatch(string(doc), -1) {
		if some && strings.TrimSpace(row[column]) != "" {
			listed = append(listed, regexp.MustCompile("^("+row[1]+")$"))
		}
	}
	failed := leaves(testFailed.FindAllStringSubmatch(output, -1))
	begun := leaves(testBegun.FindAllStringSubmatch(output, -1))
	if len(begun) < least {
		tb.Errorf("%s: only %d tests of the suite ran, want %d:\n%s", mount, len(begun), least, output)
	}
	bad := false
	for name := range failed {
		known := false
		for _, row := range listed {
			known = known || row.MatchString(name)
		}
		if !known {
			bad = true
			tb.Errorf("%s: %s fails, which docs/files.md does not list", mount, name)
		}
	}
	for _, row := range listed {
		some, differs := false, false
		for name := range begun {
			if row.MatchString(name) {
				some, differs = true, differs || failed[name]
			}
		}
		if some && !differs {
			tb.Errorf("%s: docs/files.md lists %v, and nothing of that fails", mount, row)
		}
	}
	if bad {
		tb.Log(output)
	}
}

// leaves are the names of tests that are not above others of the list.
func leaves(matches [][]string) map[string]bool {
	names := map[string]bool{}
	for _, m := range matches {
		names[m[1]] = true
	}
	for _, m := range matches {
		for above := m[1]; ; {
			i := strings.LastIndexByte(above, '/')
			if i < 0 {
				break
			}
			above = above[:i]
			delete(names, above)
		}
	}
	return names
}
