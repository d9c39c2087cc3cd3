// Command guest is what the benchmarks run in the VM, and on the host to compare
// with: programs that do one thing and nothing else.
//
//	guest hello              write one line, by one system call
//	guest echo PORT          send back what comes on vsock port PORT
//	guest sink|source PORT   take, or send, on vsock port PORT without end
//	guest block FILE OP ...  read and write FILE; see block.go
package main

import (
	"fmt"
	"os"
)

func main() {
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
