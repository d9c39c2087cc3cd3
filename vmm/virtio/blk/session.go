package blk

import (
	"sync"

	"github.com/wsl2/wsl2/vmm/virtio"
)

// One interrupt answers at most so many requests, or so many bytes and the
// request that completes them: the driver goes on with some while we serve others.
const (
	notifyRequests = 16
	notifyBytes    = 128 << 10
)

// session is the device between Start and Stop: one goroutine that pops the
// queue and, when needed, workers.
type session struct {
	dev    *Device
	queue  *virtio.Queue
	failed func(error)

	work     chan *request // holds every request the queue can have: sends never block
	stopping chan struct{} // closed by stop
	wg       sync.WaitGroup

	mu      sync.Mutex
	free    []*request
	idle    int // workers that wait for work, less the work that waits for them
	workers int
}

func startSession(d *Device, s virtio.Session) *session {
	q := s.Queues[0]
	n := &session{
		dev: d, queue: q, failed: s.Failed,
		work: make(chan *request, q.Size()), stopping: make(chan struct{}),
	}
	n.wg.Add(1)
	go n.serve()
	return n
}

// stop returns when the requests that are being carried out are completed. Those
// that wait for a worker are dropped: they can be hundreds of slow ones, and a
// machine that is killed must end.
func (s *session) stop() {
	close(s.stopping)
	s.queue.Close()
	s.wg.Wait()
}

// serve pops the queue until it is closed or broken.
func (s *session) serve() {
	defer s.wg.Done()
	defer close(s.work) // after the last send: only this goroutine sends
	for {
		if err := s.queue.Wait(); err != nil {
			return
		}
		if err := s.drain(); err != nil {
			s.failed(err)
			return
		}
	}
}

// drain serves all available requests: here what the page cache can answer,
// on workers what has to wait for the host's disk.
func (s *session) drain() error {
	defer s.queue.Notify()
	requests, bytes := 0, 0
	for {
		r, ok, err := s.next()
		if err != nil || !ok {
			return err
		}
		n := r.n
		if r.waits() || !s.finish(r, true) {
			s.hand(r)
			continue
		}
		if requests, bytes = requests+1, bytes+n; requests >= notifyRequests || bytes >= notifyBytes {
			s.queue.Notify()
			requests, bytes = 0, 0
		}
	}
}

// next pops and parses one request and takes its disk.
func (s *session) next() (*request, bool, error) {
	r := s.get()
	ok, err := s.queue.Pop(&r.chain)
	if ok {
		err = r.parse()
	}
	if err != nil || !ok {
		s.put(r)
		return nil, false, err
	}
	if r.needsDisk() {
		r.att, r.writeThrough = s.dev.acquire()
	}
	return r, true, nil
}

// finish carries r out and returns its chain to the driver; the caller notifies.
// With nowait it returns false, and r is untouched, if r is a read for which
// the host has to wait.
func (s *session) finish(r *request, nowait bool) bool {
	status, written, err := s.dev.serve(r, nowait)
	if err != nil { // errWouldBlock, nothing else
		return false
	}
	r.status[0] = status
	head := r.chain.Head
	s.forget(r)
	s.queue.Push(head, written)
	return true
}

// forget lets go of r and its disk.
func (s *session) forget(r *request) {
	if r.att != nil {
		s.dev.release(r.att)
		r.att = nil
	}
	s.put(r)
}

// hand gives r to an idle worker or to a new one, or leaves it for the first
// that becomes idle.
func (s *session) hand(r *request) {
	s.mu.Lock()
	spawn := s.idle <= 0 && s.workers < s.dev.cfg.Workers
	if spawn {
		s.workers++
		s.wg.Add(1)
	} else {
		s.idle--
	}
	s.mu.Unlock()
	if spawn {
		go s.worker(r)
		return
	}
	s.work <- r
}

func (s *session) worker(r *request) {
	defer s.wg.Done()
	for ok := true; ok; r, ok = <-s.work {
		select {
		case <-s.stopping:
			s.forget(r)
			continue
		default:
		}
		s.finish(r, false)
		s.queue.Notify()
		s.mu.Lock()
		s.idle++
		s.mu.Unlock()
	}
}

// get and put keep requests, with the arrays their chains have grown.
func (s *session) get() *request {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.free); n > 0 {
		r := s.free[n-1]
		s.free = s.free[:n-1]
		return r
	}
	return new(request)
}

func (s *session) put(r *request) {
	r.data, r.status = nil, nil
	s.mu.Lock()
	s.free = append(s.free, r)
	s.mu.Unlock()
}
