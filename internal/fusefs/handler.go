package fusefs

import (
	"encoding/binary"
	"io"
	"log"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Offsets in the headers of FUSE's messages, and a request's numbers.
const (
	inHeader  = 40 // length[4] opcode[4] unique[8] ...
	outHeader = 16 // length[4] error[4] unique[8]
	opForget  = 2
	opInit    = 26
	opSyncfs  = 50
)

// maxComplaints is how many lines a guest can make us log.
const maxComplaints = 20

// Handler answers the requests of one mount: each request's bytes with an answer in room,
// whose length it returns. It is called by many goroutines at once.
func (fs *FS) Handler(logf func(format string, args ...any)) func(request, room []byte) int {
	o := Options()
	o.Logger = log.New(Complaints(logf), "", 0)
	server := fuse.NewProtocolServer(fs.Raw(), o)
	var mu sync.RWMutex // written while INIT changes what all others depend on
	begun := false      // guarded by mu
	return func(request, room []byte) int {
		if len(request) < inHeader {
			return 0
		}
		opcode := binary.LittleEndian.Uint32(request[4:])
		if opcode == opInit {
			mu.Lock()
			defer mu.Unlock()
			if begun { // a mount has one
				return refuse(request, room, unix.EBUSY)
			}
			begun = true
		} else {
			mu.RLock()
			ok := begun
			mu.RUnlock()
			if !ok {
				return refuse(request, room, unix.EIO)
			}
		}
		switch {
		case opcode == opForget && len(request) >= inHeader+8:
			// A kernel that drops what it knows sends one for each file. They have no answer.
			fs.Forget(binary.LittleEndian.Uint64(request[16:]), binary.LittleEndian.Uint64(request[inHeader:]))
			return 0
		case opcode == opSyncfs:
			// sync(2) of a guest: it is not to have this machine write back a whole file system, and go-fuse would log that.
			return refuse(request, room, unix.ENOSYS)
		}
		n, s := server.HandleRequest([][]byte{request}, [][]byte{room})
		if n == 0 && len(room) > 0 { // go-fuse found nothing to answer
			return refuse(request, room, unix.Errno(max(s, 1)))
		}
		return n
	}
}

// refuse makes an answer of an error.
func refuse(request, room []byte, errno unix.Errno) int {
	if len(room) < outHeader {
		return 0
	}
	code := -int32(errno)
	binary.LittleEndian.PutUint32(room, outHeader)
	binary.LittleEndian.PutUint32(room[4:], uint32(code))
	copy(room[8:outHeader], request[8:16])
	return outHeader
}

// Complaints logs the first lines of go-fuse's about requests, of which a hostile guest can cause
// as many as it likes.
func Complaints(logf func(format string, args ...any)) io.Writer { return &complaints{logf: logf} }

type complaints struct {
	logf func(format string, args ...any)
	n    atomic.Int32
}

func (c *complaints) Write(line []byte) (int, error) {
	if c.n.Add(1) <= maxComplaints {
		c.logf("%.200q", line)
	}
	return len(line), nil
}
