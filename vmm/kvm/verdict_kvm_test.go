//go:build kvm

package kvm

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// The verdict is written once, is good as long as it is of this KVM, and a wrong
// or damaged one is replaced.
func TestProbeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "verdict")
	probe := func() string {
		t.Helper()
		if err := ProbeOnce(context.Background(), path); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := probe()
	// A remembered verdict is not even looked for by a guest: a context that has
	// ended does not matter.
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := ProbeOnce(ended, path); err != nil {
		t.Error(err)
	}
	for _, other := range []string{"", first[:len(first)/2], "0" + first} {
		if err := os.WriteFile(path, []byte(other), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := probe(); got != first {
			t.Errorf("%q was replaced by %q, want %q", other, got, first)
		}
	}
	Forget(path)
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error(err)
	}
}
