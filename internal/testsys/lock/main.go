// Command lock is what tests lock a file with in a distro, whose busybox has no flock(1):
// it takes the lock without waiting, says "locked", and holds it until its stdin ends.
package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	f, err := os.OpenFile(os.Args[2], os.O_RDWR, 0)
	if err == nil {
		switch os.Args[1] {
		case "flock":
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		case "fcntl":
			err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10})
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("locked")
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is all that is expected
}
