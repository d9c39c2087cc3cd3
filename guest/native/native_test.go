package native

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFailure: who may make no namespaces is told so, and nobody else.
func TestFailure(t *testing.T) {
	for errno, refused := range map[unix.Errno]bool{unix.EPERM: true, unix.ENOSPC: true, unix.EINVAL: true, unix.EAGAIN: false, unix.ENOMEM: false} {
		err := failure("role", errno)
		if errors.As(err, new(noNamespaces)) != refused || !strings.Contains(err.Error(), errno.Error()) || !strings.Contains(err.Error(), "role") {
			t.Errorf("%v: %v", errno, err)
		}
		if strings.Contains(err.Error(), "pids") != (errno == unix.EAGAIN) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}
