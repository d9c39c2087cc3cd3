// Command init is everything of wsl2 that runs in the VM. The kernel starts it as
// PID 1; it starts itself again, under other names, as the init of each distro
// for work on disks, and as the tools that users call in a distro. See packages pid1, distro,
// diskjob and tools.
package main

import (
	"os"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/exporter"
	"github.com/wsl2/wsl2/guest/files"
	"github.com/wsl2/wsl2/guest/importer"
	"github.com/wsl2/wsl2/guest/maintain"
	"github.com/wsl2/wsl2/guest/native"
	"github.com/wsl2/wsl2/guest/pid1"
	"github.com/wsl2/wsl2/guest/remover"
	"github.com/wsl2/wsl2/guest/tools"
	"github.com/wsl2/wsl2/internal/nsinit"
)

func main() {
	switch os.Args[0] {
	case distro.Argv0:
		os.Exit(distro.Run(os.Args))
	case distro.BesideArgv0:
		os.Exit(distro.RunBeside(os.Args))
	case importer.Argv0:
		os.Exit(importer.Run(os.Args))
	case exporter.Argv0:
		os.Exit(exporter.Run(os.Args))
	case files.Argv0:
		os.Exit(files.Run())
	case maintain.Argv0:
		os.Exit(maintain.Run(os.Args))
	case remover.Argv0:
		os.Exit(remover.Run(os.Args))
	case nsinit.Argv0:
		os.Exit(native.Run(os.Args))
	}
	// PID 1 of a container in a distro may be one of the tools; it has their environment.
	if os.Getpid() != 1 || os.Getenv("WSL_DISTRO_NAME") != "" {
		os.Exit(tools.Main(os.Args))
	}
	pid1.Run()
}
