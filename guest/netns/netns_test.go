package netns

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// TestRecovered: what goes wrong in a namespace is the caller's to know, and does not end the process.
func TestRecovered(t *testing.T) {
	if err := recovered(func() error { panic("boom") }); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("a panic: %v", err)
	}
	if err := recovered(func() error { return os.ErrClosed }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("an error: %v", err)
	}
}
