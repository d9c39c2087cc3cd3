package fusefs

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// interruptWait is how long the answer is waited for of what the kernel has interrupted. Any signal does that, and most are not their
// program's end: who has a timer would be told EINTR by calls that tell nobody else so.
const interruptWait = 5 * time.Second

// until returns v, a node or a handle, such that its requests end, a while after the kernel interrupts them, with EINTR: where
// they go to another machine, which may be silent. A program that is killed waits for them. end is called when they are done.
func until[T any](cancel <-chan struct{}, v T) (with T, end func()) {
	i, ok := any(v).(interface{ With(context.Context) T })
	if !ok || cancel == nil {
		return v, func() {}
	}
	ctx, stop := context.WithCancelCause(context.Background())
	go func() { // until end
		select {
		case <-cancel:
		case <-ctx.Done():
			return
		}
		timer := time.NewTimer(interruptWait)
		defer timer.Stop()
		select {
		case <-timer.C:
			stop(unix.EINTR)
		case <-ctx.Done():
		}
	}()
	return i.With(ctx), func() { stop(nil) }
}
