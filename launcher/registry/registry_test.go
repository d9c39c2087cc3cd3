package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func open(t *testing.T, path string) *Registry {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func distro(name string) Distro { return Distro{Name: name, ID: NewID(), Disk: "/disks/" + name} }

func TestLife(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "registry.json")
	r := open(t, path)
	if r.Default() != "" || len(r.List()) != 0 {
		t.Fatal("a new registry is not empty")
	}
	for _, n := range []string{"debian", "alpine", "Fedora"} {
		if err := r.Add(distro(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Add(distro("DEBIAN")); !errors.Is(err, ErrExists) {
		t.Errorf("second debian: %v", err)
	}
	if err := r.SetDefault("fedora"); err != nil || r.Default() != "Fedora" {
		t.Errorf("SetDefault: %v, %q", err, r.Default())
	}
	for _, err := range []error{r.SetDefault("x"), r.Remove("x")} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("unknown distro: %v", err)
		}
	}
	if err := r.Remove("FEDORA"); err != nil || r.Default() != "debian" {
		t.Errorf("Remove: %v, default %q", err, r.Default())
	}
	again := open(t, path)
	if d, err := again.Get("Debian"); err != nil || d.Disk != "/disks/debian" {
		t.Errorf("Get after reopening: %+v, %v", d, err)
	}
	if got := again.List(); len(got) != 2 || got[0].Name != "debian" || got[1].Name != "alpine" {
		t.Errorf("list %+v", got)
	}
	for _, n := range []string{"debian", "alpine"} {
		if err := again.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
	if again.Default() != "" {
		t.Errorf("default of nothing: %q", again.Default())
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("registry file: %v %v", st.Mode(), err)
	}
	left, _ := os.ReadDir(filepath.Dir(path))
	if len(left) != 1 {
		t.Errorf("files left over: %v", left)
	}
}

func TestNames(t *testing.T) {
	for _, n := range []string{"debian", "Ubuntu-24.04", "a", "x_1", ".hidden", strings.Repeat("a", maxName)} {
		if err := CheckName(n); err != nil {
			t.Error(err)
		}
	}
	for _, n := range []string{"", ".", "..", "-d", "a b", "a/b", "é", "legacy", "Legacy", "System", "debug-shell", "a\n", strings.Repeat("a", maxName+1)} {
		if err := CheckName(n); !errors.Is(err, ErrName) {
			t.Errorf("CheckName(%q) = %v", n, err)
		}
	}
}

func TestCorruptFileIsKept(t *testing.T) {
	for name, text := range map[string]string{
		"empty":      "",
		"truncated":  `{"version":1,"distros":[{"name":"a"`,
		"newer":      `{"version":2,"distros":[]}`,
		"no version": `{}`,
		"bad name":   `{"version":1,"distros":[{"name":"../a","disk":"/d"}]}`,
		"relative":   `{"version":1,"distros":[{"name":"a","disk":"d"}]}`,
		"twice":      `{"version":1,"distros":[{"name":"a","disk":"/d"},{"name":"A","disk":"/e"}]}`,
		"default":    `{"version":1,"default":"b","distros":[{"name":"a","disk":"/d"}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "registry.json")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(path)
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), path) {
				t.Errorf("err = %v", err)
			}
			if got, _ := os.ReadFile(path); string(got) != text {
				t.Errorf("file changed to %q", got)
			}
		})
	}
}

// A change that cannot be written is an error and is not taken over; the file
// and the list stay as they were.
func TestFailedWriteChangesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "registry.json")
	r := open(t, path)
	if err := r.Add(distro("a")); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(path)
	// The directory becomes a file: nothing can be written there, not even by root.
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Add(distro("b")); err == nil {
		t.Fatal("Add succeeded without a directory")
	}
	if err := r.Remove("a"); err == nil {
		t.Fatal("Remove succeeded without a directory")
	}
	if _, err := r.Get("b"); !errors.Is(err, ErrNotFound) {
		t.Error("b is listed though it was not written")
	}
	os.Remove(dir)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); string(after) != string(before) {
		t.Errorf("file changed:\n%s\n%s", before, after)
	}
	if err := r.Add(distro("b")); err != nil {
		t.Error(err)
	}
}

// Readers of the file see whole lists while it is being replaced.
func TestAtomicForReaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.json")
	r := open(t, path)
	if err := r.Add(distro("first")); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			other, err := Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			if len(other.List()) == 0 {
				t.Error("saw an empty list")
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := r.Add(distro(fmt.Sprint("d", i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	<-done
	if n := len(open(t, path).List()); n != 21 {
		t.Errorf("%d distros on disk, want 21", n)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(path), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestAddRefuses(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "r.json"))
	if err := r.Add(Distro{Name: "..", Disk: "/d"}); !errors.Is(err, ErrName) {
		t.Errorf("name: %v", err)
	}
	if err := r.Add(Distro{Name: "a", Disk: "d"}); err == nil {
		t.Error("relative disk path taken")
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte(`{"version":1,"default":"a","distros":[{"name":"a","disk":"/d"}]}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(dir, "registry.json")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Open(path)
		if err != nil {
			return
		}
		for _, d := range r.List() {
			if CheckName(d.Name) != nil || !filepath.IsAbs(d.Disk) {
				t.Fatalf("took %+v", d)
			}
		}
	})
}

// TestVersions: distros of before there were two versions are of version 2, and so are new ones
// unless something else was said.
func TestVersions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.json")
	write := func(version string) {
		t.Helper()
		text := `{"version":1,"default":"","distros":[{"name":"old","id":"x","disk":"/d"` + version + `}]}`
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := r.Get("old"); err != nil || d.Version != 2 || r.DefaultVersion() != 2 {
		t.Errorf("%+v, %v, default %d", d, err, r.DefaultVersion())
	}
	if err := r.SetDefaultVersion(1); err != nil {
		t.Fatal(err)
	}
	if err := r.Add(Distro{Name: "new", ID: "y", Disk: "/e"}); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(path); err != nil || r.DefaultVersion() != 1 || r.List()[1].Version != 2 {
		t.Errorf("%+v, %v, default %d", r.List(), err, r.DefaultVersion())
	}
	write(`,"version":3`)
	if _, err := Open(path); err == nil {
		t.Error("a distro of version 3 was read")
	}
}

// TestSweep: what a killed WriteFile has left goes, and nothing else.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "registry.json")
	for _, name := range []string{"registry.json", "registry.json.damaged", ".registry.json.123", ".ports.json.1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	Sweep(path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{".ports.json.1", "registry.json", "registry.json.damaged"}; !slices.Equal(left, want) {
		t.Errorf("%v, want %v", left, want)
	}
}
