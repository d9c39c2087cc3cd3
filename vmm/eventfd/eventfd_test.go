package eventfd

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func newFD(t *testing.T) *EventFD {
	t.Helper()
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// waits are the two ways to wait.
var waits = map[string]func(*EventFD) error{"Wait": (*EventFD).Wait, "Park": (*EventFD).Park}

func TestSignalEndsWait(t *testing.T) {
	for name, wait := range waits {
		t.Run(name, func(t *testing.T) {
			e := newFD(t)
			for range 3 {
				done := make(chan error)
				go func() { done <- wait(e) }()
				if err := e.Signal(); err != nil {
					t.Fatal(err)
				}
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestCloseEndsWaits(t *testing.T) {
	for name, wait := range waits {
		t.Run(name, func(t *testing.T) {
			e := newFD(t)
			const waiting = 4
			done := make(chan error)
			for range waiting {
				go func() { done <- wait(e) }()
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			for range waiting {
				if err := <-done; !errors.Is(err, os.ErrClosed) {
					t.Errorf("%v", err)
				}
			}
			if err := wait(e); !errors.Is(err, os.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
			if err := e.Signal(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Signal after Close: %v", err)
			}
			if err := e.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// Another process may have filled the counter: a signal must not wait for a reader.
func TestSignalOfFullCounter(t *testing.T) {
	e := newFD(t)
	if _, err := unix.Write(e.FD(), binary.NativeEndian.AppendUint64(nil, 1<<64-2)); err != nil {
		t.Fatal(err)
	}
	if err := e.Signal(); err != nil {
		t.Fatal(err)
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
}
