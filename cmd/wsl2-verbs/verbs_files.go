package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
	"github.com/wsl2/wsl2/launcher/filecopy"
)

// place is a file on one of the sides.
type place struct {
	distro string // "" for this machine
	path   string // absolute
}

// parsePlace reads DISTRO:PATH, or a path of this machine: one that is absolute, or has
// a slash before its first colon.
func parsePlace(arg string) (place, error) {
	distro, path, ok := strings.Cut(arg, ":")
	if !ok || distro == "" || strings.Contains(distro, "/") {
		abs, err := filepath.Abs(arg)
		if strings.HasSuffix(arg, "/") {
			abs += "/" // asks for a directory
		}
		return place{path: abs}, err
	}
	if !strings.HasPrefix(path, "/") {
		return place{}, cmdline.Usagef("%s: a path in a distro is absolute, as in %s:/etc/hosts; a file here whose name has a colon is ./%s", arg, distro, arg)
	}
	return place{distro, path}, nil
}

// fsPath is `wsl2 --fs-path`.
func fsPath(c *command) error {
	distro, path, below := strings.Cut(c.Args().First(), ":")
	if below && !strings.HasPrefix(path, "/") {
		return cmdline.Usagef("%s: a path in a distro is absolute, as in %s:/etc", c.Args().First(), distro)
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var m api.HostMount
	if err := cl.Call(api.Call{Verb: api.VerbHostMount, Name: distro, VM: c.vm}, &m, true); err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.app.out, filepath.Join(m.Dir, filepath.Clean("/"+path)))
	return err
}

// copyFiles is `wsl2 cp`.
func copyFiles(c *command) error {
	var places []place
	for _, arg := range c.Args().Slice() {
		p, err := parsePlace(arg)
		if err != nil {
			return err
		}
		places = append(places, p)
	}
	to, from := places[len(places)-1], places[:len(places)-1]
	if len(from) > 1 {
		to.path += "/" // a directory, or the second would replace the first
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	trees := map[string]*filecopy.Tree{}
	defer func() {
		for _, t := range trees {
			t.Close()
		}
	}()
	for _, p := range places {
		if trees[p.distro] != nil {
			continue
		}
		t, err := c.tree(cl, p.distro)
		if err != nil {
			return err
		}
		trees[p.distro] = t
	}
	b := newBar(c.app.err, "copying")
	defer b.finish()
	for _, p := range from {
		o := filecopy.Options{
			Owners:   c.Bool("archive"),
			Progress: func(bytes int64) { b.update(filepath.Base(p.path), bytes, 0) },
			Skipped: func(path, why string) {
				b.finish()
				fmt.Fprintf(c.app.err, "wsl2: %s is %s; not copied\n", path, why)
			},
		}
		if err := filecopy.Copy(c.app.ctx, trees[p.distro], p.path, trees[to.distro], to.path, o); err != nil {
			return err
		}
	}
	return nil
}

// tree connects to a distro's tree, or serves this machine's.
func (c *command) tree(cl *client.Client, distro string) (*filecopy.Tree, error) {
	if distro == "" {
		return filecopy.Local(c.app.ctx, "/")
	}
	files, err := cl.Files(api.Open{Distro: distro, VM: c.vm}, c.String("user"))
	if err != nil {
		return nil, err
	}
	t, err := filecopy.Connect(c.app.ctx, files)
	if err != nil {
		return nil, fmt.Errorf("files of %s: %w", distro, err)
	}
	return t, nil
}
