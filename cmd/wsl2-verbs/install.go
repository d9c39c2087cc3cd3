package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/term"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/images/archive"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
	"github.com/wsl2/wsl2/launcher/config"
)

// This file is --install and --list --online. What comes from elsewhere comes by
// wsl2-fetch.

// listURL is that of the list of distros, "" for the default one.
func (c *command) listURL(paths config.Paths) string {
	settings, _ := config.Load(paths.ConfigFile, config.ThisHost())
	return settings.DistributionListURL
}

func listOnline(c *command) error {
	if c.Bool("running") || c.Bool("verbose") {
		return cmdline.Usagef("--online goes with --all, --quiet and --json only")
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	fetch, err := config.FindFetch()
	if err != nil {
		return err
	}
	which := "short"
	if c.Bool("all") {
		which = "all"
	}
	f, err := startFetch(c.app.ctx, fetch, []string{"list", c.listURL(cl.Paths), which}, cl.Notice, nil)
	if err != nil {
		return err
	}
	defer f.Close()
	list := []struct {
		Name         string `json:"name"`
		FriendlyName string `json:"friendlyName"`
	}{} // "[]" if there are none
	text, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("wsl2-fetch: %w", err)
	}
	switch {
	case c.Bool("json"):
		return c.json(list)
	case c.Bool("quiet"):
		for _, d := range list {
			fmt.Fprintln(c.app.out, d.Name)
		}
		return nil
	}
	width := len("NAME")
	for _, d := range list {
		width = max(width, len(d.Name))
	}
	fmt.Fprintf(c.app.out, "Install one with `wsl2 --install NAME`.\n\n%-*s  %s\n", width, "NAME", "FRIENDLY NAME")
	for _, d := range list {
		fmt.Fprintf(c.app.out, "%-*s  %s\n", width, d.Name, d.FriendlyName)
	}
	return nil
}

func install(c *command) error {
	name, file := c.Args().First(), c.String("from-file")
	if d := c.String("distribution"); d != "" {
		if name != "" {
			return cmdline.Usagef("%s and --distribution exclude each other", name)
		}
		name = d
	}
	if file != "" && name != "" {
		return cmdline.Usagef("%s and --from-file exclude each other; --name says how the distro is called", name)
	}
	call := api.Call{Name: c.String("name"), Install: true}
	if dir := c.String("location"); dir != "" {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		call.Dir = abs
	}
	if size := c.String("vhd-size"); size != "" {
		n, err := config.ParseSize(size)
		if err != nil {
			return cmdline.Usagef("--vhd-size %s: want a size like 50GB", size)
		}
		call.Size = n
	}
	b := newBar(c.app.err, "installing")
	defer b.finish()
	cl, err := c.begin(b)
	if err != nil {
		return err
	}
	call.VM = c.vm
	a, total, err := c.source(cl, b, &call, name, file)
	if err != nil {
		return err
	}
	call.ArchiveBytes = uint64(total)
	made, err := cl.Import(call, a, nil)
	b.finish()
	if err != nil {
		return err
	}
	if c.Bool("json") { // for a program, which wants no shell
		return c.json(made)
	}
	fmt.Fprintf(c.app.err, "%s is installed. Its shell: wsl2 -d %s\n", made.Name, made.Name)
	if c.Bool("no-launch") || !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return nil
	}
	c.app.status, err = cl.Run(client.RunSpec{Open: api.Open{Distro: made.Name, VM: c.vm}, Cwd: "~", Shell: wire.ShellLogin},
		client.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Environ: os.Environ()})
	return err
}

// source opens the archive that is to be installed, and names the distro if the user
// has not.
func (c *command) source(cl *client.Client, b *bar, call *api.Call, name, file string) (*archive.Archive, int64, error) {
	isURL := strings.HasPrefix(file, "https://") || strings.HasPrefix(file, "http://") || strings.HasPrefix(file, "file://")
	if file != "" && !isURL {
		if c.String("sha256") != "" {
			file, isURL = "file://"+file, true
			if abs, err := filepath.Abs(strings.TrimPrefix(file, "file://")); err == nil {
				file = "file://" + abs
			}
		} else {
			a, err := archive.Open(file, c.app.in)
			return a, 0, err
		}
	}
	fetch, err := config.FindFetch()
	if err != nil {
		return nil, 0, err
	}
	args := []string{"get", name, c.listURL(cl.Paths), cl.Paths.Cache}
	what := name
	if isURL {
		args = []string{"url", file, c.String("sha256"), cl.Paths.Cache}
		what = file
	}
	f, err := startFetch(c.app.ctx, fetch, args, cl.Notice, func(done, total int64) { b.update("fetching", done, total) })
	if err != nil {
		return nil, 0, err
	}
	if call.Name == "" {
		call.Name = f.Name
	}
	if what == "" {
		what = f.Name
	}
	a, err := archive.OpenReader(what, f)
	if err != nil {
		// That nothing came has a reason.
		if ferr := f.Close(); ferr != nil {
			err = ferr
		}
		return nil, 0, err
	}
	return a, f.Total, nil
}
