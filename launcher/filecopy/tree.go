// Package filecopy copies files between trees that are served over 9P: this machine's
// and those of distros. The local tree is served as well, inside this process, so that
// there is one way to read and to write, and nothing of what the other side says is
// ever put into a path.
package filecopy

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"path"
	"strings"
	"syscall"

	"github.com/wsl2/wsl2/internal/p9"
	"github.com/wsl2/wsl2/internal/p9/localfs"
)

// Tree is one side of a copy.
type Tree struct {
	root   *p9.File
	client *p9.Client
	served chan error  // the local tree's server; nil for others
	local  *localfs.FS // nil for others
}

// Local serves a directory of this machine, with this process's rights.
func Local(ctx context.Context, dir string) (*Tree, error) {
	local, err := localfs.New(dir, localfs.Config{})
	if err != nil {
		return nil, err
	}
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- p9.Serve(ctx, theirs, local, p9.Config{}) }()
	t, err := Connect(ctx, ours)
	if err != nil {
		<-served
		local.Close()
		return nil, err
	}
	t.served, t.local = served, local
	return t, nil
}

// Connect speaks with a server of files at the other end of conn, which the Tree owns,
// also if it fails.
func Connect(ctx context.Context, conn net.Conn) (*Tree, error) {
	client, err := p9.NewClient(ctx, conn, 0)
	if err != nil {
		return nil, err
	}
	root, err := client.Attach(ctx, "", "", 0)
	if err != nil {
		client.Close()
		return nil, err
	}
	return &Tree{root: root, client: client}, nil
}

// Close ends the connection.
func (t *Tree) Close() {
	t.client.Close()
	if t.served != nil {
		<-t.served
		t.local.Close()
	}
}

// maxLinks is how many symbolic links are followed, as by the kernel.
const maxLinks = 40

// find walks to a path as the kernel would: symbolic links are followed, within the tree.
func (t *Tree) find(ctx context.Context, name string) (*p9.File, error) {
	f, err := t.walk(ctx, name)
	if err != nil {
		return nil, &fs.PathError{Op: "find", Path: name, Err: err}
	}
	return f, nil
}

func (t *Tree) walk(ctx context.Context, name string) (*p9.File, error) {
	root, err := t.root.Walk(ctx)
	if err != nil {
		return nil, err
	}
	above := []*p9.File{root} // the directories that lead to where we are, which is the last
	defer func() { closeAll(above) }()
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		step := todo[0]
		todo = todo[1:]
		switch here := above[len(above)-1]; step {
		case "", ".":
		case "..":
			if len(above) > 1 {
				here.Close(ctx) //nolint:errcheck // it was not opened
				above = above[:len(above)-1]
			}
		default:
			next, err := here.Walk(ctx, step)
			if err != nil {
				return nil, err
			}
			if next.QID().Type&p9.QTSymlink == 0 {
				above = append(above, next)
				continue
			}
			target, err := next.Readlink(ctx)
			next.Close(ctx) //nolint:errcheck // it was not opened
			if err != nil {
				return nil, err
			}
			if links++; links > maxLinks {
				return nil, syscall.ELOOP
			}
			if path.IsAbs(target) {
				closeAll(above[1:])
				above = above[:1]
			}
			todo = append(strings.Split(target, "/"), todo...)
		}
	}
	last := above[len(above)-1]
	above = above[:len(above)-1]
	return last, nil
}

func closeAll(files []*p9.File) {
	for _, f := range files {
		f.Close(context.Background()) //nolint:errcheck // they were not opened
	}
}

// place finds where a copy goes: a directory, and the name there. base is the name if
// the path is a directory that is there.
func (t *Tree) place(ctx context.Context, name, base string) (dir *p9.File, in string, err error) {
	f, err := t.find(ctx, name)
	if err == nil && f.QID().Type&p9.QTDir != 0 {
		return f, base, nil
	}
	if err == nil {
		f.Close(ctx) //nolint:errcheck // it was not opened
		if strings.HasSuffix(name, "/") {
			return nil, "", &fs.PathError{Op: "copy to", Path: name, Err: syscall.ENOTDIR}
		}
	} else if !errors.Is(err, syscall.ENOENT) {
		return nil, "", err
	}
	clean := path.Clean(name)
	dir, err = t.find(ctx, path.Dir(clean))
	return dir, path.Base(clean), err
}
