//go:build e2e

package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// inSoak are the programs that only `make soak` runs: go takes an emulated CPU a minute and a half, and a Debian with the
// others is three times as large.
var inSoak = []string{"go", "npm", "cargo"}

// TestSharePrograms: git, make, sqlite, rsync, apt and, in `make soak`, go build, npm and cargo find on a share what they find on
// a disk, by either transport.
func TestSharePrograms(t *testing.T) {
	soak := os.Getenv("WSL2_SOAK") != ""
	var h *testsys.Host
	if soak {
		h = testsys.New(t)
		h.Config("[wsl2]", "defaultVhdSize=8GB")
		h.Want(h.Run("--import", "one", bootstrap(t, h, "npm", "cargo")), 0)
		h.OK("--shutdown")
	} else {
		h = newDebian(t)
	}
	home, data := h.Path("home"), h.Path("data9p")
	testsys.Must(t, os.MkdirAll(data, 0o755))
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	testsys.Must(t, err)
	h.Config("[wsl2]", "vmIdleTimeout=-1", "safeMode=true", "[general]", "instanceIdleTimeout=-1", // nothing here needs its systemd
		"[shares]", "data = "+data+", transport=9p", "go = "+strings.TrimSpace(string(goroot))+", ro")
	goCache(t, filepath.Join(home, "go-cache"))
	goCache(t, filepath.Join(data, "go-cache"))
	inside(h, "one", "ln -s /mnt/go /usr/local/go")
	for _, share := range []string{"/mnt/host", "/mnt/data"} {
		for _, p := range testsys.Programs {
			if !soak && slices.Contains(inSoak, p.Name) {
				continue
			}
			t.Run(p.Name+" on "+share, func(t *testing.T) {
				r := h.Run("-d", "one", "-u", "root", "--cd", share, "-e", "sh", "-ec", fmt.Sprintf("mkdir %s && cd %[1]s\n%s", p.Name, p.Script), "sh", share+"/go-cache", "/usr/local/go")
				if r.Status != 0 {
					t.Error(r)
				}
			})
		}
	}
}

// goCache fills a build cache with what every program of Go's has, as the go in the distro would: on an emulated CPU that takes
// minutes.
func goCache(t *testing.T, dir string) {
	t.Helper()
	src := t.TempDir()
	testsys.Must(t, os.WriteFile(src+"/go.mod", []byte("module warm\n"), 0o644))
	testsys.Must(t, os.WriteFile(src+"/main.go", []byte("package main\n\nfunc main() {}\n"), 0o644))
	build := exec.Command("go", "build", "-o", "/dev/null", ".")
	build.Dir = src
	build.Env = append(os.Environ(), "GOROOT=/usr/local/go", "GOFLAGS=-trimpath", "GOCACHE="+dir, "CGO_ENABLED=0", "GOTOOLCHAIN=local")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
