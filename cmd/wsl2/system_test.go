//go:build e2e || kvm

// What the two rings of system tests share. The e2e ring runs the built wsl2 on
// this host as it is; the kvm ring runs it where KVM can run a guest.

package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// seeds is where imported distros lie for the tests of this run.
var seeds string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "w2.seed.")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	seeds = dir
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

var small struct {
	once sync.Once
	seed testsys.Seed
	ok   bool
}

// newHost makes a host with the distro "small", a busybox with the users root,
// alice and broken. It is imported once per run of the tests.
func newHost(t *testing.T) *testsys.Host {
	t.Helper()
	small.once.Do(func() {
		h := testsys.New(t)
		h.Import("small", testsys.Busybox(t)...)
		small.seed = h.NewSeed(filepath.Join(seeds, "small"))
		small.ok = true
	})
	if !small.ok {
		t.Fatal("the import of the small distro failed in an earlier test")
	}
	h := testsys.New(t)
	h.Plant(small.seed)
	return h
}
