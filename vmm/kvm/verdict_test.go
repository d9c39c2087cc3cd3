package kvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Only a KVM that has passed is remembered.
func TestProbeOnceFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "verdict")
	err := ProbeOnce(context.Background(), path)
	if again := Probe(context.Background()); (again == nil) != (err == nil) {
		t.Fatalf("ProbeOnce: %v; Probe: %v", err, again)
	}
	if _, serr := os.Stat(path); (serr == nil) != (err == nil) {
		t.Errorf("the verdict is %v, its file: %v", err, serr)
	}
	if err == nil {
		return
	}
	// A file of another host's KVM does not make this one usable.
	if werr := os.WriteFile(path, []byte("00000000-0000-0000-0000-000000000000 0.0.0.0 0\n"), 0o600); werr != nil {
		t.Fatal(werr)
	}
	if again := ProbeOnce(context.Background(), path); again == nil || !errors.Is(again, ErrUnusable) && !errors.Is(again, ErrAbsent) &&
		!errors.Is(again, ErrPermission) && !errors.Is(again, ErrCapability) && !errors.Is(again, ErrVersion) {
		t.Errorf("with another host's verdict: %v", again)
	}
}
