package main

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
)

// This file is the verbs for disks that all distros share.

// diskPath is what the service knows a disk by. One that has gone away can
// still be unmounted.
func diskPath(disk string) (string, error) {
	path, err := filepath.Abs(disk)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real, nil
	}
	return path, nil
}

// maxMountName leaves room for a partition's number in a directory entry.
const maxMountName = 240

// mountName is WSL's name of a mount without --name: letters and digits of the path.
func mountName(path string, partition uint32) string {
	name := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
			return c
		}
		return -1
	}, path)
	if len(name) > maxMountName { // the end tells more
		name = name[len(name)-maxMountName:]
	}
	if partition != 0 {
		name += fmt.Sprint("p", partition)
	}
	return name
}

func mountDisk(c *command) error {
	how := api.Mount{FSType: c.String("type"), Options: c.String("options")}
	if n := c.String("partition"); c.IsSet("partition") {
		p, err := strconv.ParseUint(n, 10, 16)
		if err != nil || p == 0 {
			return cmdline.Usagef("--partition %s: want the number of one", n)
		}
		how.Partition = uint32(p)
	}
	path, err := diskPath(c.Args().First())
	if err != nil {
		return err
	}
	switch name := c.String("name"); {
	case c.Bool("bare"):
		for _, o := range []string{"name", "type", "options", "partition"} {
			if c.IsSet(o) {
				return cmdline.Usagef("--bare and --%s exclude each other", o)
			}
		}
	case !c.IsSet("name"):
		how.Name = mountName(path, how.Partition)
	case name == "" || name == "." || name == ".." || name == "dev" || strings.Contains(name, "/"):
		return cmdline.Usagef("--name %q cannot be a directory of /mnt/wsl", name)
	default:
		how.Name = name
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	if err := c.vm.Absolute(); err != nil {
		return err
	}
	var disk api.SharedDisk
	if err := cl.Call(api.Call{Verb: api.VerbMount, Image: path, Mount: &how, VM: c.vm}, &disk, true); err != nil {
		return err
	}
	if c.Bool("json") {
		return c.json(disk)
	}
	verb := "mounted"
	if c.Bool("bare") {
		verb = "attached"
	}
	_, err = fmt.Fprintf(c.app.out, "The disk was successfully %s as '%s'.\nTo detach it, run: wsl2 --unmount %s\n", verb, disk.Mounts[0].At, path)
	return err
}

func unmountDisk(c *command) error {
	call := api.Call{Verb: api.VerbUnmount}
	if c.NArg() > 0 {
		var err error
		if call.Image, err = diskPath(c.Args().First()); err != nil {
			return err
		}
	}
	return c.call(call, true)
}
