package virtio

import (
	"errors"
	"os"
)

// Serve pops chains and hands each to handle, which returns the number of bytes
// it wrote to the chain, until Close; then it returns nil. The driver is
// interrupted when the ring has become empty. Serve ends early with the error of
// a broken queue or of handle; the chain concerned is not returned to the driver.
// It is the whole loop of a device that serves one request after the other.
func (q *Queue) Serve(handle func(*Chain) (written uint32, err error)) error {
	var c Chain
	for {
		if err := q.Wait(); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return nil
			}
			return err
		}
		for {
			ok, err := q.Pop(&c)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			n, err := handle(&c)
			if err != nil {
				return err
			}
			q.Push(c.Head, n)
		}
		q.Notify()
	}
}
