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

func TestSignalEndsWait(t *testing.T) {
	e := newFD(t)
	for range 3 {
		done := make(chan error)
		go func() { done <- e.Wait() }()
		if err := e.Signal(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

func TestCloseEndsWait(t *testing.T) {
	e := newFD(t)
	done := make(chan error)
	go func() { done <- e.Wait() }()
	e.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	if err := e.Wait(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait after Close: %v", err)
	}
	if err := e.Signal(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Signal after Close: %v", err)
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
