// Command wsl2-verbs is all of wsl2 that does not run a program in a distro:
// import, list, doctor, help and so on. It is not for users: wsl2 becomes it, with
// the same command line, and with wsl2's own path as argv[0].
//
// It is an executable of its own for what it links: flag parsing, decompressors
// and formats take longer to initialise than a command in a warm VM.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// version is set by the linker (-X main.version=...).
var version = ""

// app is the process's surroundings.
type app struct {
	ctx      context.Context
	wsl2     string // its path
	in       *os.File
	out, err io.Writer
	status   int // what a verb wants to exit with although it did not fail
}

func main() {
	if version != "" {
		api.Version = version
	}
	a := &app{ctx: context.Background(), wsl2: os.Args[0], in: os.Stdin, out: os.Stdout, err: os.Stderr}
	if err := a.run(os.Args[1:]); err != nil {
		cmdline.Fail(os.Stderr, err)
		os.Exit(client.StatusFailed)
	}
	os.Exit(a.status)
}

func (a *app) run(args []string) error {
	inv, err := cmdline.Parse(args)
	if err != nil {
		return err
	}
	if inv.Verb == nil || actions[inv.Verb.Long] == nil || !filepath.IsAbs(a.wsl2) {
		return errors.New("`wsl2-verbs` is run by wsl2, not by hand")
	}
	return runVerb(a, inv)
}

// client returns one that speaks with this user's service.
func (a *app) client() (*client.Client, error) { return client.New(a.wsl2, os.Getenv) }
