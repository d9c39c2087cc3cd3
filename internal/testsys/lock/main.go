// Command lock is what tests lock a file with in a distro, whose busybox has no flock(1): it takes
// the lock, says "locked", and holds it until its stdin ends.
//
//	lock flock|fcntl FILE            without waiting
//	lock flock-wait|fcntl-wait FILE  says "waiting", and waits
package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	kind, wait := strings.CutSuffix(os.Args[1], "-wait")
	f, err := os.OpenFile(os.Args[2], os.O_RDWR, 0)
	if err == nil {
		if wait {
			fmt.Println("waiting")
		}
		err = lock(f, kind, wait)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("locked")
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is all that is expected
}

// lock asks again after EINTR: the runtime's own signals, with which it preempts, are the reason at times. v9fs calls
// a wait that a signal has ended EAGAIN.
func lock(f *os.File, kind string, wait bool) error {
	flock, fcntl := unix.LOCK_EX|unix.LOCK_NB, unix.F_SETLK
	if wait {
		flock, fcntl = unix.LOCK_EX, unix.F_SETLKW
	}
	for {
		var err error
		switch kind {
		case "flock":
			err = unix.Flock(int(f.Fd()), flock)
		case "fcntl":
			err = unix.FcntlFlock(f.Fd(), fcntl, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10})
		default:
			err = fmt.Errorf("no lock is called %q", kind)
		}
		if err != unix.EINTR && !(wait && err == unix.EAGAIN) {
			return err
		}
	}
}
