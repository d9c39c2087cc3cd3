// Command wsl2 runs Linux distros in a lightweight VM: `wsl2 -d debian` is a
// shell in one. See wsl2 --help.
//
// The same executable is the client, the service (`wsl2 service`) and the VM's
// process (`wsl2 vm`). The client's way to a program is kept short: no flag library, no JSON.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/service"
)

// version is set by the linker (-X main.version=...).
var version = ""

// app is the process's surroundings.
type app struct {
	ctx      context.Context
	in       *os.File
	out, err io.Writer
	status   int // what a verb wants to exit with although it did not fail
}

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	if version != "" {
		api.Version = version
	}
	a := &app{ctx: context.Background(), in: os.Stdin, out: os.Stdout, err: os.Stderr}
	inv, err := parse(args)
	if err != nil {
		return a.fail(client.StatusFailed, err)
	}
	if inv.verb != nil {
		if err := runVerb(a, inv); err != nil {
			return a.fail(client.StatusFailed, err)
		}
		return a.status
	}
	if err := absKernel(&inv.run.Open.VM); err != nil {
		return a.fail(client.StatusFailed, err)
	}
	c, err := a.client()
	if err != nil {
		return a.fail(client.StatusFailed, err)
	}
	status, err := c.Run(*inv.run, client.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Environ: os.Environ()})
	if err != nil {
		return a.fail(status, err)
	}
	return status
}

// fail tells the user and returns the status.
func (a *app) fail(status int, err error) int {
	text := err.Error()
	var usage *usageError
	var told *api.Error
	switch {
	case errors.As(err, &usage):
		text += "\nTry `wsl2 --help`."
	case errors.As(err, &told) && told.Hint != "":
		text = told.Text + "\nNext: " + told.Hint
	}
	fmt.Fprintf(a.err, "wsl2: %s\n", text)
	return status
}

// client returns one that speaks with this user's service.
func (a *app) client() (*client.Client, error) {
	paths, err := config.FromEnv(os.Getenv, os.Getuid())
	if err != nil {
		return nil, err
	}
	return &client.Client{
		Paths: paths, Self: api.Self(),
		Service: client.Command{Path: "/proc/self/exe", Args: []string{"service"}, OpenLog: func() (*os.File, error) { return service.OpenLog(paths) }},
		Notice:  func(text string) { fmt.Fprintf(os.Stderr, "wsl2: %s\n", text) },
	}, nil
}

func runService(*command) error {
	paths, err := config.FromEnv(os.Getenv, os.Getuid())
	if err != nil {
		return err
	}
	return service.Main(paths)
}
