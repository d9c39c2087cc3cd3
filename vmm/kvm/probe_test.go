package kvm

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

// The machine under this test may have a KVM that works, one that does not, or
// none. Whichever it is, Probe must say so, soon and each time the same.
func TestProbeVerdict(t *testing.T) {
	verdict := func() error {
		t.Helper()
		start := time.Now()
		err := Probe(context.Background())
		if d := time.Since(start); d > probeTimeout+time.Second {
			t.Errorf("Probe took %v", d)
		}
		return err
	}
	first, second := verdict(), verdict()
	t.Logf("%v", first)
	if (first == nil) != (second == nil) || first != nil && first.Error() != second.Error() {
		t.Errorf("two runs, two verdicts:\n%v\n%v", first, second)
	}
	for _, kind := range []error{nil, ErrAbsent, ErrPermission, ErrVersion, ErrCapability, ErrUnusable} {
		if errors.Is(first, kind) {
			return
		}
	}
	t.Errorf("no verdict: %v", first)
}

func TestProbeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// Either the probe was quicker or it gave up; it never hangs.
	if err := Probe(ctx); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, ErrUnusable) &&
		!errors.Is(err, ErrAbsent) && !errors.Is(err, ErrPermission) {
		t.Error(err)
	}
}

func TestOpenErrors(t *testing.T) {
	if _, err := open(t.TempDir() + "/kvm"); !errors.Is(err, ErrAbsent) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing device: %v", err)
	}
	// A file that is no KVM at all answers no ioctl.
	if _, err := open(os.DevNull); !errors.Is(err, ErrVersion) {
		t.Errorf("/dev/null as KVM: %v", err)
	}
}
