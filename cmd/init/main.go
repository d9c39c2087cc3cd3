// Command init is everything of wsl2 that runs in the VM. The kernel starts it as
// PID 1; it starts itself again, under other names, as the init of each distro
// and for work on disks. See packages pid1, distro and diskjob.
package main

import (
	"os"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/guest/exporter"
	"github.com/wsl2/wsl2/guest/importer"
	"github.com/wsl2/wsl2/guest/maintain"
	"github.com/wsl2/wsl2/guest/pid1"
)

func main() {
	switch os.Args[0] {
	case distro.Argv0:
		os.Exit(distro.Run(os.Args))
	case importer.Argv0:
		os.Exit(importer.Run(os.Args))
	case exporter.Argv0:
		os.Exit(exporter.Run(os.Args))
	case maintain.Argv0:
		os.Exit(maintain.Run(os.Args))
	}
	if os.Getpid() != 1 {
		os.Stderr.WriteString("this is the init of wsl2's VM; it runs as PID 1 only\n")
		os.Exit(125)
	}
	pid1.Run()
}
