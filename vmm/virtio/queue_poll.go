package virtio

// Devices that wait for more than one thing at a time (a socket and two queues,
// say) put KickFD into an epoll set of their own and use Arm instead of Wait.

// KickFD returns the eventfd that the driver's notifications signal. It stays
// owned by the transport and is valid until Device.Stop returned. It may be
// signalled without need; registered edge-triggered, it need not be read.
func (q *Queue) KickFD() int { return q.cfg.Kick.FD() }

// Arm is Wait without the sleep: it enables the driver's notifications and
// looks at the ring once more. If it reports true there is something to Pop (or
// the queue is broken, which Pop reports) and notifications are off; otherwise
// the kick eventfd will be signalled, and Disarm should follow that. It is for
// the goroutine that pops.
func (q *Queue) Arm() (available bool) {
	if q.broken != nil || q.available() {
		return true
	}
	q.enableNotify()
	if q.available() {
		q.disableNotify()
		return true
	}
	return false
}

// Disarm turns the driver's notifications off until the next Arm or Wait.
func (q *Queue) Disarm() { q.disableNotify() }
