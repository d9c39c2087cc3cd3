// Package filelock waits for locks of files within a context.
package filelock

import (
	"context"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Lock opens the file at path with the flags access, made if need be, and takes its flock(2), waiting for who
// holds it until ctx ends; then the error is ctx's cause. Closing the file gives the lock back. Network file systems want
// os.O_RDWR for it; who gets a descriptor for reading can only hold the lock.
func Lock(ctx context.Context, path string, access int) (*os.File, error) {
	f, err := os.OpenFile(path, access|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return f, nil
	}
	// flock(2) cannot be waited for with a deadline: a goroutine waits, and
	// gives the lock back if it comes too late.
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err == unix.EINTR {
				continue
			}
			got <- err
			return
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, os.NewSyscallError("flock", err)
		}
		return f, nil
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, context.Cause(ctx)
	}
}
