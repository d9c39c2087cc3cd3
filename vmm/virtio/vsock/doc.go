// Package vsock is the virtio-vsock device (virtio 1.2 §5.10), stream sockets
// only, in user space. The guest sees AF_VSOCK; the host sees unix sockets.
//
// # Host side
//
// To reach guest port P, a host program connects to the device's socket PATH,
// sends "CONNECT P\n" and may send data right behind it. The device answers
// "OK N\n", N being the host port that the guest sees, once the guest accepted,
// and carries bytes from then on; if the guest refuses, it closes the
// connection. A guest that connects to port P of CID 2 reaches the unix socket
// PATH_P; if none listens there it is refused at once.
//
// # Short primer on the vsock protocol
//
// Packets are a 44-byte header and, for RW, data. The driver sends them on the
// tx queue and offers buffers for the device's packets on the rx queue. A
// connection is known by its two ports (both CIDs are fixed here).
//
//  1. Connect. The one side sends REQUEST, the other RESPONSE or RST. Both
//     announce their buffer in these packets already.
//
//  2. Credit. Every packet carries buf_alloc, the size of its sender's receive
//     buffer, and fwd_cnt, how many bytes left that buffer so far. A sender may
//     have buf_alloc − (bytes sent − fwd_cnt) more bytes on the way, and no more.
//     CREDIT_UPDATE carries nothing but these two numbers; CREDIT_REQUEST asks
//     for one.
//
//  3. Shutdown. SHUTDOWN's flags say that its sender will not receive or will
//     not send any more; they add up. A side that has received both flags
//     answers RST; after that the ports may be used again. An RST at any
//     other time ends the connection abruptly, as does an answer to a packet
//     that belongs to no connection.
//
// # A connection's life
//
//	               accept on PATH
//	                     │
//	                connecting ── malformed line, end of file ──────► closed
//	                     │ "CONNECT P\n": REQUEST
//	                requested ── RST, answerTimeout (RST) ──────────► closed
//	REQUEST to an        │ RESPONSE: "OK N\n"
//	open PATH_P:         │
//	RESPONSE ───────► established ── RST ───────────────┐
//	                     │       └── SHUTDOWN of both: RST ──► lingering ──► closed
//	host closed:         │                                  (data for the host left)
//	SHUTDOWN of both     │
//	                  closing ── RST, answerTimeout (RST) ───────────► closed
//
// Half-close maps to the unix socket's: SHUTDOWN(send) to shutdown(SHUT_WR) once
// all data is written, SHUTDOWN(receive) to SHUT_RD; end of file from the host
// to SHUTDOWN(send), EPIPE to SHUTDOWN(receive).
//
// The two directions are not alike. Data for the host is written to the unix
// socket straight from the guest's memory; what does not fit is copied to the
// connection's buffer, which can be as large as the credit the guest was given,
// so one slow reader stops nobody. A guest that overruns its credit is reset.
// Data for the guest stays in the unix socket until the guest has both credit
// and rx buffers for it, and is then read straight into those; connections with
// something to send take turns.
//
// # Concurrency
//
// One goroutine per session, from Start to Stop, owns every connection, both
// queues and an epoll set of the unix sockets and the queues' eventfds (session.go).
// It never blocks but in wait. There are no locks on the data path.
package vsock
