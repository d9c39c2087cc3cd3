// Package wire defines the messages between the launcher (host) and /init
// (guest). See PROTOCOL.md for the frames; the constants here match it.
//
// # Roles and connections
//
// Everything runs over virtio-vsock stream connections. On the host side they
// are unix sockets of the VMM: to reach guest port P, connect to the VMM's
// socket PATH and send "CONNECT P\n"; the VMM answers "OK N\n" once the guest
// accepted (or closes the connection). Bytes sent right behind the CONNECT line
// are delivered, so no round trip needs to be waited for. A guest that connects
// to host port P (CID 2) reaches the unix socket PATH_P, if one listens.
//
// Control channel: PID 1 of the VM connects to host port PortControl and sends
// Ready; that is the readiness event. The launcher then sends Requests on it;
// PID 1 answers each with a Reply of the same ID, in any order, and sends
// Events unasked. One control channel per VM, for its whole life.
//
// Session: each distro's init listens on a vsock port of its own (Reply to
// StartDistro tells which). One session is one program started for one client,
// on 1 to 4 connections that begin with a Hello of the same SessionID:
// RoleControl always, RoleStdin, RoleStdout, RoleStderr for each standard
// stream that is carried on its own, RolePTY for the one that carries the
// terminal. After its Hello a data connection carries raw bytes only; half-close
// means end of file.
//
// # Session's steady state
//
// client: Hello(control) Start → guest: Started | Failed; then client: Resize,
// Signal; guest: Exited. Exited counts the bytes sent on each data
// connection, so the client knows when it has all output without waiting for
// background children that keep the pipe open. The control connection's end
// before Exited is the client's death: the guest sends SIGHUP to the session.
package wire

// Version of the protocol. Both sides send theirs first and refuse another.
const Version = 1

// PortControl is the host-side vsock port PID 1 connects to.
const PortControl = 1024
