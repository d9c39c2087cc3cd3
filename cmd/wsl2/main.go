// Command wsl2 runs Linux distros in a lightweight VM: `wsl2 -d debian` is a
// shell in one. See wsl2 --help.
//
// The same executable is the client, the service (`wsl2 service`), the VM's
// process (`wsl2 vm`) and the one that forwards its ports (`wsl2 port-forwarder`). Its start is on the way of every command, three times at a
// cold one, so it links nothing that they can do without: what is not running a
// program in a distro is wsl2-verbs, which it becomes.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/ports"
	"github.com/wsl2/wsl2/launcher/service"
	"github.com/wsl2/wsl2/launcher/vmproc"
)

// version is set by the linker (-X main.version=...).
var version = ""

func main() {
	if version != "" {
		api.Version = version
	}
	status, err := run(os.Args[1:])
	if err != nil {
		cmdline.Fail(os.Stderr, err)
	}
	os.Exit(status)
}

func run(args []string) (status int, err error) {
	inv, err := cmdline.Parse(args)
	if err != nil {
		return client.StatusFailed, err
	}
	if inv.Verb != nil {
		switch inv.Verb.Long {
		case cmdline.Service:
			err = runService()
		case cmdline.VM:
			err = vmproc.Main(newMachine)
		case cmdline.Forward:
			err = ports.Main()
		default:
			err = becomeVerbs()
		}
		if err != nil {
			return client.StatusFailed, err
		}
		return 0, nil
	}
	if err := inv.Run.Open.VM.Absolute(); err != nil {
		return client.StatusFailed, err
	}
	c, err := client.New("/proc/self/exe", os.Getenv)
	if err != nil {
		return client.StatusFailed, err
	}
	return c.Run(*inv.Run, client.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Environ: os.Environ()})
}

// becomeVerbs runs wsl2-verbs in place of this process. It learns where wsl2 is,
// whose service it may have to start, from its argv[0].
func becomeVerbs() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	path, err := config.FindVerbs()
	if err != nil {
		return fmt.Errorf("%w; `make build` makes it beside wsl2", err)
	}
	err = unix.Exec(path, append([]string{self}, os.Args[1:]...), os.Environ())
	return &os.PathError{Op: "run", Path: path, Err: err}
}

func runService() error {
	paths, err := config.FromEnv(os.Getenv, os.Getuid())
	if err != nil {
		return err
	}
	return service.Main(paths)
}
