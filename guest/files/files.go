// Package files serves a distro's tree over 9P, as a user of the distro: whoever is at
// the other end may do what that user may. The distro's init starts a process for each connection.
package files

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
)

// Argv0 is the name under which /init serves files.
const Argv0 = "wsl2-files"

// ConnFD is the descriptor of the connection.
const ConnFD = 3

// Run serves the connection to its end and returns the exit status.
func Run() int {
	unix.CloseOnExec(ConnFD)
	unix.Umask(0) // modes are the client's
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Argv0, err)
		return 1
	}
	return 0
}

func run() error {
	conn := os.NewFile(ConnFD, "connection")
	fs, err := localfs.New("/", localfs.Config{})
	if err != nil {
		return err
	}
	defer fs.Close()
	return p9.Serve(context.Background(), conn, fs, p9.Config{Logf: func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, Argv0+": "+format+"\n", args...)
	}})
}
