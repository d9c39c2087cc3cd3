// Package rules holds the tree to what ARCHITECTURE.md and the house rules say.
package rules

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const (
	root   = "../.."
	module = "github.com/wsl2/wsl2/"
)

// source is a Go file: its path from the root, package comment and imports of
// the module's own packages.
type source struct {
	path, doc string
	imports   []string
	test      bool
}

func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		if d.IsDir() && (rel == "out" || rel == ".git") {
			return filepath.SkipDir
		}
		if d.IsDir() || filepath.Ext(rel) != ".go" {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		s := source{path: filepath.ToSlash(rel), doc: f.Doc.Text(), test: strings.HasSuffix(rel, "_test.go")}
		for _, i := range f.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if own, ok := strings.CutPrefix(p, module); ok {
				s.imports = append(s.imports, own)
			}
		}
		all = append(all, s)
		return nil
	})
	if err != nil || len(all) == 0 {
		t.Fatalf("%d files, %v", len(all), err)
	}
	return all
}

func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// banned says which imports may not be, and why.
var banned = []struct{ from, to, why string }{
	{"vmm", "launcher", "the monitor is a library of its own"},
	{"vmm", "guest", "the monitor knows nothing of what runs in the machine"},
	{"vmm", "images", "the monitor knows nothing of distros"},
	{"vmm", "internal/wire", "the monitor knows nothing of distros"},
	{"guest", "vmm", "what runs in the machine shares only the wire with the host"},
	{"guest", "launcher", "host and guest share only the wire"},
	{"guest", "images", "host and guest share only the wire"},
	{"cmd/init", "vmm", "what runs in the machine shares only the wire with the host"},
	{"cmd/init", "launcher", "host and guest share only the wire"},
	{"launcher", "guest", "host and guest share only the wire"},
	{"launcher", "cmd", "imports run one way"},
	{"cmd/wsl2-verbs", "images/oci", "what needs HTTP is wsl2-fetch"},
	{"cmd/wsl2-verbs", "images/catalog", "what needs HTTP is wsl2-fetch"},
	{"images", "launcher", "imports run one way"},
	{"images", "vmm", "imports run one way"},
	{"internal/wire", "vmm", "the messages belong to neither side"},
	{"internal/wire", "guest", "the messages belong to neither side"},
	{"internal/wire", "launcher", "the messages belong to neither side"},
	{"vmm/virtio", "vmm/mmio", "a device never knows its transport"},
	{"vmm/virtio", "vmm/vhostuser", "a device never knows its transport"},
	{"vmm/virtio", "vmm/kvm", "a device never knows the accelerator"},
	{"vmm/mmio", "vmm/kvm", "a transport never knows its accelerator"},
	{"vmm/mmio", "vmm/microvm", "a transport never knows its accelerator"},
	{"vmm/vhostuser", "vmm/qemu", "a transport never knows its accelerator"},
}

func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		if s.test { // tests may stand on both sides of a seam
			continue
		}
		for _, b := range banned {
			for _, i := range s.imports {
				if under(s.path, b.from) && under(i, b.to) {
					t.Errorf("%s imports %s: %s", s.path, i, b.why)
				}
			}
		}
	}
}

func TestPackageDocs(t *testing.T) {
	docs := map[string]string{}
	for _, s := range sources(t) {
		if dir := path.Dir(s.path); !s.test {
			docs[dir] += s.doc
		}
	}
	for dir, doc := range docs {
		if doc == "" {
			t.Errorf("%s has no package comment", dir)
		}
	}
}

// TestMap: every path that ARCHITECTURE.md names is there, and every package of
// the monitor has its row.
func TestMap(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	table := text[strings.Index(text, "## Code"):]
	table = table[:strings.Index(table, "\nImports")]
	named := map[string]bool{}
	for _, row := range strings.Split(table, "\n") {
		cells := strings.SplitN(row, "|", 3)
		if len(cells) < 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([a-z0-9/_-]+)`").FindAllStringSubmatch(cells[1], -1) {
			named[m[1]] = true
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("the map names %s: %v", m[1], err)
			}
		}
	}
	if len(named) < 10 {
		t.Fatalf("the map names only %v", named)
	}
	for _, s := range sources(t) {
		dir := path.Dir(s.path)
		if under(dir, "vmm") && !s.test && !strings.Contains(dir, "/internal/") && path.Base(dir) != "guest" && !named[dir] {
			t.Errorf("the map does not name %s", dir)
			named[dir] = true
		}
	}
}

// slow are packages whose initialisation, or whose weight, every start of a
// program would pay for.
var slow = map[string]string{
	"github.com/klauspost/compress":          "1.5 ms of tables at each start",
	"github.com/ulikunitz/xz":                "tables at each start",
	"github.com/urfave/cli/v2":               "it uses text/template, with which the linker keeps every method",
	"text/template":                          "with it the linker keeps every method",
	"regexp":                                 "expressions are compiled at each start",
	"golang.org/x/crypto":                    "tables and self-tests at each start; it belongs into cmd/wsl2-ssh",
	"github.com/google/go-containerregistry": "1 ms of tables at each start",
	"github.com/hanwen/go-fuse/v2":           "tables at each start; it belongs into cmd/wsl2-files",
	"net/http":                               "tables at each start",
	"archive/tar":                            "tables at each start",
	"debug/elf":                              "tables at each start",
}

// TestStart: wsl2 links nothing that slows its start down; wsl2-verbs may.
func TestStart(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", module+"cmd/wsl2").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for bad, why := range slow {
			if under(dep, bad) {
				t.Errorf("cmd/wsl2 links %s: %s; that belongs into cmd/wsl2-verbs", dep, why)
			}
		}
	}
}

// TestChecklist: the tests that docs/wsl-tests.md names are there.
func TestChecklist(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs/wsl-tests.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\bTest[A-Z]\w*`).FindAllString(string(page), -1)
	if len(named) < 20 {
		t.Fatalf("names %d tests", len(named))
	}
	var all strings.Builder
	for _, s := range sources(t) {
		if s.test {
			text, err := os.ReadFile(filepath.Join(root, s.path))
			if err != nil {
				t.Fatal(err)
			}
			all.Write(text)
		}
	}
	for _, name := range named {
		if !strings.Contains(all.String(), "\nfunc "+name+"(t *testing.T)") {
			t.Errorf("docs/wsl-tests.md names %s, which is no test", name)
		}
	}
}
