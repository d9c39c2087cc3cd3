package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/wsl2/wsl2/launcher/api"
)

// process is one of a distro of version 1, under its numbers on both sides.
type process struct {
	Distro string `json:"distro"`
	Host   int    `json:"hostPid"`
	PID    int    `json:"pid"`
	// UID is who it runs as, on the host.
	UID     int    `json:"hostUid"`
	Command string `json:"command"`
}

// ps lists the processes of the distros whose kernel is the host's.
func ps(c *command) error {
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var l api.List
	if err := cl.Call(api.Call{Verb: api.VerbList}, &l, true); err != nil {
		return err
	}
	name := c.Args().First()
	list, found := []process{}, name == ""
	for _, d := range l.Distros {
		if name != "" && !strings.EqualFold(d.Name, name) {
			continue
		}
		found = true
		if d.Version == 2 && name != "" {
			return api.Errorf(api.CodeBadRequest, "wsl2 -d "+d.Name+" ps", "the processes of %s are its VM's and none of this host", d.Name)
		}
		if d.PID == 0 {
			continue
		}
		of, err := processesOf("/proc", d.PID)
		if err != nil {
			continue // it has ended meanwhile
		}
		for i := range of {
			of[i].Distro = d.Name
		}
		list = append(list, of...)
	}
	if !found {
		return api.Errorf(api.CodeNotFound, "`wsl2 --list` shows those that exist", "there is no distro %q", name)
	}
	if c.Bool("json") {
		return c.json(list)
	}
	width := len("DISTRO")
	for _, p := range list {
		width = max(width, len(p.Distro))
	}
	fmt.Fprintf(c.app.out, "%8s  %-*s  %7s  %s\n", "HOST PID", width, "DISTRO", "PID", "COMMAND")
	for _, p := range list {
		fmt.Fprintf(c.app.out, "%8d  %-*s  %7d  %s\n", p.Host, width, p.Distro, p.PID, p.Command)
	}
	return nil
}

// processesOf returns the processes in the pid namespace of a distro's init, by their numbers there.
func processesOf(proc string, init int) ([]process, error) {
	namespace := func(pid string) (string, error) { return os.Readlink(filepath.Join(proc, pid, "ns/pid")) }
	own, err := namespace(strconv.Itoa(init))
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var list []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if ns, err := namespace(e.Name()); err != nil || ns != own {
			continue
		}
		status, err := os.ReadFile(filepath.Join(proc, e.Name(), "status"))
		if err != nil {
			continue // it has ended
		}
		p := process{Host: pid}
		comm := ""
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(line, ":")
			f := strings.Fields(value)
			switch {
			case len(f) == 0:
			case key == "Name":
				comm = f[0]
			case key == "Uid":
				p.UID, _ = strconv.Atoi(f[0])
			case key == "NSpid": // of the innermost namespace last
				p.PID, _ = strconv.Atoi(f[len(f)-1])
			}
		}
		line, _ := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline")) // empty for one that ends
		line = bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte{' '})
		p.Command = printable(cmp.Or(string(line), "["+comm+"]"))
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b process) int { return a.PID - b.PID })
	return list, nil
}

// printable keeps what a distro's program calls itself from acting on the user's terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
