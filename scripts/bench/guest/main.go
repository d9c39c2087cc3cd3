// Command guest is what the benchmarks run in the VM, and on the host to compare
// with: programs that do one thing and nothing else.
//
//	guest                    as /init: write one line to the kernel's log, and stay
//	guest hello              write one line, by one system call
//	guest echo PORT          send back what comes on vsock port PORT, or TCP port tcp:PORT
//	guest sink|source PORT   take, or send after a byte has come, on such a port without end
//	guest block FILE OP ...  read and write FILE; see block.go
//	guest world ADDRESS      serve what network needs, on the host
//	guest network MODE ...   use it; see network.go
//	guest files DIR JOB N    use a file system; see files.go, so are mount and timed
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() == 1 && os.Args[0] == "/init" { // the only program there is: topic monitors
		if log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
			log.WriteString("<0>hi\n")
		}
		unix.Pause()
	}
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "hello":
		_, err = os.Stdout.WriteString("hi\n")
	case "echo", "sink", "source":
		err = serve(os.Args[1], os.Args[2])
	case "block":
		err = block(os.Args[2:])
	case "world":
		err = world(os.Args[2:])
	case "network":
		err = network(os.Args[2:])
	case "files":
		err = files(os.Args[2:])
	case "timed":
		err = timed(os.Args[2:])
	case "mount":
		err = mount(os.Args[2:])
	case "copy": // stdin to stdout, unbuffered
		err = copyStdin()
	default:
		err = fmt.Errorf("unknown program %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}
