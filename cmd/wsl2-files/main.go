// Command wsl2-files moves files between the host and distros over 9P. It is an executable
// of its own so that no command pays for the protocol.
//
//	wsl2-files share ...   serves a directory of the host to a distro (package share/server)
//	wsl2-files mount ...   mounts a distro's tree on the host (package hostmount/server)
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/wsl2/wsl2/internal/fusefs"
	"github.com/wsl2/wsl2/launcher/hostmount"
	mountserver "github.com/wsl2/wsl2/launcher/hostmount/server"
	"github.com/wsl2/wsl2/launcher/share"
	"github.com/wsl2/wsl2/launcher/share/server"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "wsl2-files: %v\n", err)
		os.Exit(125)
	}
}

func run(args []string) error {
	// ^C in the terminal whose command started the service is not for what it serves.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	logf := func(format string, args ...any) { fmt.Fprintf(os.Stderr, "wsl2-files: "+format+"\n", args...) }
	log.SetOutput(fusefs.Complaints(logf)) // go-fuse's, beside those of its servers' loggers
	log.SetFlags(0)
	switch {
	case len(args) > 0 && args[0] == "mount":
		spec, err := hostmount.Parse(args[1:])
		if err != nil {
			return err
		}
		return mountserver.Run(ctx, spec, os.NewFile(hostmount.ControlFD, "control"))
	case len(args) > 0 && args[0] == "share":
		spec, err := share.Parse(args[1:])
		if err != nil {
			return err
		}
		return server.Serve(ctx, spec, logf)
	}
	return errors.New("this is a part of wsl2; see `wsl2 --help`")
}
