package virtio

import (
	"errors"
	"os"
	"sync"
)

// A Handler serves one chain and returns the number of bytes it wrote to it.
type Handler = func(*Chain) (written uint32, err error)

// Serve pops chains and hands each to handle, which returns the number of bytes
// it wrote to the chain, until Close; then it returns nil. The driver is
// interrupted when the ring has become empty. Serve ends early with the error of
// a broken queue or of handle; the chain concerned is not returned to the driver.
// It is the whole loop of a device that serves one request after the other.
func (q *Queue) Serve(handle Handler) error {
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

// Server runs Queue.Serve on a goroutine of its own: all there is to starting and
// stopping a device with one such queue. The zero value is ready.
type Server struct {
	mu    sync.Mutex
	queue *Queue        // nil when stopped
	done  chan struct{} // closed when the goroutine has ended
}

// Start serves queue i of the session until Stop, and tells the session of an
// error that ends it before. A queue that the driver did not enable is left alone.
func (v *Server) Start(s Session, i int, handle Handler) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.queue != nil {
		return errors.New("started twice")
	}
	if len(s.Queues) <= i || s.Queues[i] == nil {
		return nil
	}
	q, done := s.Queues[i], make(chan struct{})
	v.queue, v.done = q, done
	go func() {
		defer close(done)
		if err := q.Serve(handle); err != nil {
			s.Failed(err)
		}
	}()
	return nil
}

// Stop ends what Start began, as Device.Stop does.
func (v *Server) Stop() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.queue == nil {
		return
	}
	v.queue.Close()
	<-v.done
	v.queue = nil
}
