// Package p9 speaks 9P2000.L, the file protocol of Linux' v9fs: codec, server
// and client. Documentation/filesystems/9p.rst and diod's protocol.md name the
// messages; the constants here match include/net/9p/9p.h.
//
// # Primer
//
// A frame is size[4] type[1] tag[2] and a body, little-endian. The client sends
// T-messages, the server answers each with the R-message of the same tag, in any
// order; Rlerror carries a Linux errno. A fid is a number of the client's choice
// that stands for a file: Tattach makes the first, for the root of the tree, Twalk
// makes others from it, Tclunk ends one. A fid keeps standing for its file when
// the file is renamed or removed. Tlopen and Tlcreate open it for reading and
// writing. Tversion opens a session, and ends the one before it with all its fids.
//
// # Flush
//
// A client that no longer wants an answer sends Tflush, and may use the tag again
// when Rflush has come. The server drops a request that has not begun, and
// otherwise answers it first: so a client that waits for Rflush knows which of its requests
// have been carried out. Ours does not: a server that is silent must not hold who has gone.
//
// # Limits
//
// The peer is hostile on either side. A frame is at most as large as was agreed
// with Tversion; a server serves a limited number of fids and of requests at once
// and stops reading while there are more. Names are checked here, once: a Node is
// never given one that is empty, ".", "..", longer than 255 bytes, or holds "/" or NUL.
package p9
