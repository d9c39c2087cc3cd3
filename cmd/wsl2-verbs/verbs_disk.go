package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/term"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/images/archive"
	"github.com/wsl2/wsl2/images/tools"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
	"github.com/wsl2/wsl2/launcher/config"
)

// This file is the verbs that make, copy, change and delete distros' disks.

// begin returns a client whose progress is drawn on b.
func (c *command) begin(b *bar) (*client.Client, error) {
	cl, err := c.app.client()
	if err != nil {
		return nil, err
	}
	cl.Progress = func(p api.Progress) { b.update(p.What, p.Done, p.Total) }
	notice := cl.Notice
	cl.Notice = func(text string) { b.finish(); notice(text) }
	return cl, c.vm.Absolute()
}

func importDistro(c *command) error {
	args := c.Args().Slice()
	call := api.Call{Name: args[0]}
	if v := c.String("version"); v != "" {
		var err error
		if call.Version, err = parseVersion(v); err != nil {
			return err
		}
	}
	file := args[len(args)-1]
	if len(args) == 3 {
		dir, err := filepath.Abs(args[1])
		if err != nil {
			return err
		}
		call.Dir = dir
	}
	b := newBar(c.app.err, "importing "+call.Name)
	defer b.finish()
	cl, err := c.begin(b)
	if err != nil {
		return err
	}
	call.VM = c.vm
	if c.Bool("vhd") {
		if call.Image, err = filepath.Abs(file); err != nil {
			return err
		}
		return cl.ImportImage(call)
	}
	if file == archive.Stdin && term.IsTerminal(int(os.Stdin.Fd())) {
		return cmdline.Usagef("standard input is a terminal; give a file, or a pipe that a tar archive comes from")
	}
	a, err := archive.Open(file, c.app.in)
	if errors.Is(err, archive.ErrNotTar) {
		if _, derr := images.DetectDisk(file); derr == nil {
			return cmdline.Usagef("%s is a disk image: add --vhd", file)
		}
	}
	if err != nil {
		return err
	}
	_, err = cl.Import(call, a, func(done, total int64) { b.update("unpacking", done, total) })
	return err
}

func importInPlace(c *command) error {
	disk, err := filepath.Abs(c.Args().Get(1))
	if err != nil {
		return err
	}
	return c.call(api.Call{Verb: api.VerbInPlace, Name: c.Args().First(), Image: disk}, true)
}

func export(c *command) error {
	name, file := c.Args().Get(0), c.Args().Get(1)
	format := c.String("format")
	switch {
	case c.Bool("vhd") && format != "" && format != string(images.VHDX):
		return cmdline.Usagef("--vhd and --format %s exclude each other", format)
	case c.Bool("vhd"):
		format = string(images.VHDX)
	case format == "":
		format = archive.FormatOf(file)
	case !slices.Contains(archive.ExportFormats, format):
		return cmdline.Usagef("--format %s: want %s", format, strings.Join(archive.ExportFormats, ", "))
	}
	b := newBar(c.app.err, "exporting "+name)
	defer b.finish()
	cl, err := c.begin(b)
	if err != nil {
		return err
	}
	progress := func(done, total int64) { b.update("writing", done, total) }
	var compress client.Compressor
	if format != string(images.VHDX) && format != string(images.Raw) {
		compress = func(w io.Writer) (io.WriteCloser, error) { return archive.Compressor(w, archive.Format(format)) }
	}
	call := api.Call{Name: name, VM: c.vm}
	if file == archive.Stdin {
		out, ok := c.app.out.(*os.File)
		if !ok {
			return errors.New("standard output is no file")
		}
		if term.IsTerminal(int(out.Fd())) {
			return cmdline.Usagef("standard output is a terminal; give a file, or a pipe that takes the archive")
		}
		if st, err := out.Stat(); err == nil && format == string(images.VHDX) && !st.Mode().IsRegular() {
			return cmdline.Usagef("a vhdx image cannot be written to a pipe; give a file")
		}
		return cl.Export(c.app.ctx, call, images.DiskFormat(format), compress, out, progress)
	}
	out, err := archive.CreateOutput(file)
	if err != nil {
		return err
	}
	if err := cl.Export(c.app.ctx, call, images.DiskFormat(format), compress, out.File, progress); err != nil {
		return errors.Join(err, out.Abort())
	}
	return out.Commit()
}

func setVersion(c *command) error {
	call := api.Call{Verb: api.VerbSetVersion, Name: c.Args().Get(0)}
	var err error
	if call.Version, err = parseVersion(c.Args().Get(1)); err != nil {
		return err
	}
	b := newBar(c.app.err, "converting "+call.Name)
	defer b.finish()
	cl, err := c.begin(b)
	if err != nil {
		return err
	}
	call.VM = c.vm
	return cl.Call(call, nil, true)
}

// manageActions are the options of --manage of which exactly one is given.
var manageActions = map[string]func(c *command, call *api.Call, value string) error{
	"move": func(c *command, call *api.Call, dir string) (err error) {
		call.Verb = api.VerbMove
		call.Dir, err = filepath.Abs(dir)
		return err
	},
	"resize": func(c *command, call *api.Call, size string) (err error) {
		call.Verb = api.VerbResize
		if call.Size, err = config.ParseSize(size); err != nil {
			return cmdline.Usagef("--resize %s: want a size like 50GB", size)
		}
		return nil
	},
	"set-default-user": func(c *command, call *api.Call, user string) error {
		call.Verb, call.User = api.VerbSetUser, user
		return c.checkUser(call.Name, user)
	},
	"rename": func(c *command, call *api.Call, name string) error {
		call.Verb, call.New = api.VerbRename, name
		return nil
	},
	"clone": func(c *command, call *api.Call, name string) (err error) {
		call.Verb, call.New = api.VerbClone, name
		if dir := c.String("location"); dir != "" {
			call.Dir, err = filepath.Abs(dir)
		}
		return err
	},
	"compact": func(c *command, call *api.Call, _ string) error { call.Verb = api.VerbCompact; return nil },
	"repair":  func(c *command, call *api.Call, _ string) error { call.Verb = api.VerbRepair; return nil },
}

func manage(c *command) error {
	var given []string
	for option := range manageActions {
		if c.IsSet(option) {
			given = append(given, option)
		}
	}
	slices.Sort(given)
	switch {
	case len(given) == 0:
		return cmdline.Usagef("--manage needs one of its options: what is to be changed")
	case len(given) > 1:
		return cmdline.Usagef("--%s and --%s exclude each other", given[0], given[1])
	case c.String("location") != "" && given[0] != "clone":
		return cmdline.Usagef("--location goes with --clone; --move takes the directory itself")
	}
	action := given[0]
	b := newBar(c.app.err, action+" "+c.Args().First())
	defer b.finish()
	cl, err := c.begin(b)
	if err != nil {
		return err
	}
	call := api.Call{Name: c.Args().First(), VM: c.vm}
	if err := manageActions[action](c, &call, c.String(action)); err != nil {
		return err
	}
	var changed api.Changed
	if err := cl.Call(call, &changed, true); err != nil {
		return err
	}
	b.finish()
	if c.Bool("json") {
		return c.json(changed)
	}
	switch call.Verb {
	case api.VerbCompact:
		fmt.Fprintf(c.app.out, "%s took %s on the host and takes %s now.\n", call.Name, bytesText(changed.UsedBefore), bytesText(changed.UsedAfter))
	case api.VerbResize:
		fmt.Fprintf(c.app.out, "The disk of %s had %s and has %s now.\n", call.Name, bytesText(changed.SizeBefore), bytesText(changed.SizeAfter))
	case api.VerbRepair:
		fmt.Fprintln(c.app.out, strings.TrimSpace(changed.Report))
	}
	return nil
}

// checkUser makes sure that the distro has the user, by starting a program as him.
func (c *command) checkUser(name, user string) error {
	if user == "" {
		return nil
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	spec := client.RunSpec{Open: api.Open{Distro: name, VM: c.vm}, User: user, Cwd: "/", Shell: wire.ShellNone, Argv: []string{"/bin/sh", "-c", ":"}}
	_, err = cl.Run(spec, client.Stdio{In: null, Out: null, Err: null, Getenv: func(string) string { return "" }})
	return err
}

// confirm asks on a terminal for a word, and tells whether it was typed. Without a
// terminal there is nobody to ask.
func (c *command) confirm(question, word string) (bool, error) {
	if c.Bool("yes") || !term.IsTerminal(int(os.Stdin.Fd())) {
		return true, nil
	}
	fmt.Fprintf(c.app.err, "%s Type %s to go on: ", question, word)
	line, err := bufio.NewReader(c.app.in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return strings.EqualFold(strings.TrimSpace(line), word), nil
}

func unregister(c *command) error {
	name := c.Args().First()
	yes, err := c.confirm(fmt.Sprintf("This deletes the distro %s with all its files.", name), name)
	if err != nil {
		return err
	}
	if !yes {
		return errors.New("nothing was deleted")
	}
	return c.call(api.Call{Verb: api.VerbUnregister, Name: name}, true)
}

func update(c *command) error {
	exe := c.app.wsl2
	_, err := fmt.Fprintf(c.app.out, `This is wsl2 %s, %s.
It is brought up to date where it comes from: in its source directory, git pull && make build;
or by the package manager that installed it. Distros are kept.
What runs goes on with the old version until: wsl2 --shutdown
`, api.Version, exe)
	return err
}

// packTools writes e2fsprogs for the guest to stdout; the service asks for it.
func packTools(c *command) error {
	b, err := tools.Archive(c.app.ctx)
	if err != nil {
		return err
	}
	_, err = c.app.out.Write(b)
	return err
}

// uninstall deletes everything that wsl2 has made for this user.
func uninstall(c *command) error {
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var l api.List
	if err := cl.Call(api.Call{Verb: api.VerbList}, &l, true); err != nil {
		return err
	}
	if !c.Bool("yes") && !term.IsTerminal(int(os.Stdin.Fd())) {
		return cmdline.Usagef("--uninstall deletes all distros; without a terminal to ask on it needs --yes")
	}
	var used int64
	for _, d := range l.Distros {
		used += d.UsedBytes
	}
	yes, err := c.confirm(fmt.Sprintf("This deletes %d distros (%s) with all their files, logs and caches.", len(l.Distros), bytesText(used)), "uninstall")
	if err != nil {
		return err
	}
	if !yes {
		return errors.New("nothing was deleted")
	}
	for _, d := range l.Distros {
		if err := cl.Call(api.Call{Verb: api.VerbUnregister, Name: d.Name}, nil, true); err != nil {
			return err
		}
	}
	if err := cl.Call(api.Call{Verb: api.VerbShutdown}, nil, false); err != nil && !errors.Is(err, client.ErrNotRunning) {
		return err
	}
	if err := cl.Paths.RemoveAll(); err != nil {
		return err
	}
	if page, err := manPath(); err == nil {
		os.Remove(page) // few have it
	}
	exe := c.app.wsl2
	fmt.Fprintf(c.app.out, "All distros are deleted. What is left: your settings (%s), and the programs in %s, which you may delete.\n", cl.Paths.ConfigFile, filepath.Dir(exe))
	return nil
}

// bytesText is a size for people, in WSL's units (1024).
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, units[i])
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}
