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

// processesOf returns the processes of a distro, by their numbers in its pid namespace: those that are in
// there, and those in namespaces below it, such as a container's.
func processesOf(proc string, init int) ([]process, error) {
	namespace := func(pid int) (string, error) { return os.Readlink(filepath.Join(proc, strconv.Itoa(pid), "ns/pid")) }
	own, err := namespace(init)
	if err != nil {
		return nil, err
	}
	all, err := readProcesses(proc)
	if err != nil {
		return nil, err
	}
	depth := len(all[init].numbers) // how deep the distro's namespace is
	if depth == 0 {
		return nil, os.ErrNotExist
	}
	// Whom a process of a namespace is left to is in the same one or above it, so that the line of
	// parents of one that is below ours leads through ours.
	inside := func(pid int) bool {
		for len(all[pid].numbers) >= depth {
			if ns, err := namespace(pid); err == nil && ns == own {
				return true
			}
			pid = all[pid].parent
		}
		return false
	}
	var list []process
	for pid, p := range all {
		if !inside(pid) {
			continue
		}
		line, _ := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "cmdline")) // empty for one that ends
		line = bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte{' '})
		list = append(list, process{Host: pid, PID: p.numbers[depth-1], UID: p.uid, Command: printable(cmp.Or(string(line), "["+p.name+"]"))})
	}
	slices.SortFunc(list, func(a, b process) int { return a.PID - b.PID })
	return list, nil
}

// procStatus is what proc_pid_status(5) says of a process.
type procStatus struct {
	name        string
	parent, uid int
	numbers     []int // its own in each pid namespace, the host's first
}

// readProcesses reads the status of every process, by the host's number.
func readProcesses(proc string) (map[int]procStatus, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	all := map[int]procStatus{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, err := os.ReadFile(filepath.Join(proc, e.Name(), "status"))
		if err != nil {
			continue // it has ended
		}
		var p procStatus
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			f := strings.Fields(value)
			switch {
			case len(f) == 0:
			case key == "Name":
				p.name = f[0]
			case key == "PPid":
				p.parent, _ = strconv.Atoi(f[0])
			case key == "Uid":
				p.uid, _ = strconv.Atoi(f[0])
			case key == "NSpid":
				for _, n := range f {
					number, _ := strconv.Atoi(n)
					p.numbers = append(p.numbers, number)
				}
			}
		}
		all[pid] = p
	}
	return all, nil
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
