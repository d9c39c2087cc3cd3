package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// actions are what the verbs of package cmdline do, but for those that are
// processes of wsl2 itself.
var actions = map[string]func(*command) error{
	"--list":        list,
	"--import":      importDistro,
	"--set-default": setDefault,
	"--set-version": setVersion,
	"--terminate":   terminate,

	"--set-default-version": setDefaultVersion,

	"--unregister":      unregister,
	"--shutdown":        shutdown,
	"--status":          status,
	"--mount":           mountDisk,
	"--unmount":         unmountDisk,
	"ps":                ps,
	"cp":                copyFiles,
	"--fs-path":         fsPath,
	"doctor":            doctor,
	"ssh-config":        sshConfig,
	"ssh-proxy":         sshProxy,
	"completion":        completion,
	"man":               man,
	"--version":         printVersion,
	"--help":            printHelp,
	"--install":         install,
	"--import-in-place": importInPlace,
	"--export":          export,
	"--manage":          manage,
	"--update":          update,
	"--uninstall":       uninstall,
	"ports":             listPorts,
	"tools":             packTools,
}

// command is a verb under way.
type command struct {
	*cli.Context
	app *app
	vm  api.VMOptions
}

// runVerb parses the verb's options and runs it.
func runVerb(a *app, inv *cmdline.Invocation) error {
	v := inv.Verb
	name := strings.TrimLeft(v.Long, "-") // the flag parser takes no command with dashes
	c := &cli.Command{Name: name, HelpName: v.Long, ArgsUsage: v.Args, Usage: strings.ReplaceAll(v.Help, "\n", " "),
		HideHelpCommand: true,
		Action: func(ctx *cli.Context) error {
			return actions[v.Long](&command{Context: ctx, app: a, vm: inv.VM})
		},
		OnUsageError: func(_ *cli.Context, err error, _ bool) error { return cmdline.Usagef("%v", err) },
	}
	for _, o := range v.Options {
		var aliases []string
		if o.Short != "" {
			aliases = []string{o.Short}
		}
		if o.Value == "" {
			c.Flags = append(c.Flags, &cli.BoolFlag{Name: o.Long, Aliases: aliases, Usage: o.Help})
		} else {
			c.Flags = append(c.Flags, &cli.StringFlag{Name: o.Long, Aliases: aliases, Usage: "`" + o.Value + "`: " + o.Help})
		}
	}
	// Switches have no default worth naming.
	for _, f := range c.Flags {
		if b, ok := f.(*cli.BoolFlag); ok {
			b.DisableDefaultText = true
		}
	}
	x := &cli.App{Name: "wsl2", HelpName: "wsl2", Commands: []*cli.Command{c}, Writer: a.out, ErrWriter: a.err, HideHelp: true, HideVersion: true,
		ExitErrHandler: func(*cli.Context, error) {}, // statuses are ours
	}
	return x.Run(append([]string{"wsl2", name}, inv.Args...))
}

func (c *command) json(v any) error {
	e := json.NewEncoder(c.app.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func list(c *command) error {
	if c.Bool("quiet") && c.Bool("verbose") {
		return cmdline.Usagef("--quiet and --verbose exclude each other")
	}
	if c.Bool("all") && c.Bool("running") {
		return cmdline.Usagef("--all and --running exclude each other")
	}
	if c.Bool("json") && (c.Bool("quiet") || c.Bool("verbose")) {
		return cmdline.Usagef("--json excludes --quiet and --verbose")
	}
	if c.Bool("online") {
		return listOnline(c)
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var l api.List
	if err := cl.Call(api.Call{Verb: api.VerbList}, &l, true); err != nil {
		return err
	}
	rows := l.Distros[:0]
	for _, d := range l.Distros {
		shown := d.State != api.StateInstalling || c.Bool("all")
		if c.Bool("running") {
			shown = d.State == api.StateRunning
		}
		if shown {
			rows = append(rows, d)
		}
	}
	w := c.app.out
	switch {
	case c.Bool("json"):
		return c.json(api.List{Distros: rows})
	case c.Bool("quiet"):
		for _, d := range rows {
			fmt.Fprintln(w, d.Name)
		}
	case len(rows) == 0 && c.Bool("running"):
		fmt.Fprintln(w, "No distro is running.")
	case len(rows) == 0:
		fmt.Fprintln(w, "No distro is installed. Import one: wsl2 --import NAME FILE.tar (`wsl2 --system` needs none)")
	case c.Bool("verbose"):
		width := len("NAME")
		for _, d := range rows {
			width = max(width, len(d.Name))
		}
		fmt.Fprintf(w, "  %-*s  %-12s  %s\n", width, "NAME", "STATE", "VERSION")
		for _, d := range rows {
			mark := " "
			if d.Default {
				mark = "*"
			}
			fmt.Fprintf(w, "%s %-*s  %-12s  %d\n", mark, width, d.Name, d.State, d.Version)
		}
	default:
		for _, d := range rows {
			if d.Default {
				fmt.Fprintf(w, "%s (Default)\n", d.Name)
			} else {
				fmt.Fprintln(w, d.Name)
			}
		}
	}
	return nil
}

func setDefault(c *command) error {
	return c.call(api.Call{Verb: api.VerbSetDefault, Name: c.Args().First()}, true)
}

func setDefaultVersion(c *command) error {
	version, err := parseVersion(c.Args().First())
	if err != nil {
		return err
	}
	return c.call(api.Call{Verb: api.VerbDefaultVersion, Version: version}, true)
}

// parseVersion reads the version of a distro.
func parseVersion(text string) (int, error) {
	switch text {
	case "1":
		return 1, nil
	case "2":
		return 2, nil
	}
	return 0, cmdline.Usagef("version %s: a distro is of version 1, on the host's kernel, or 2, in a VM", text)
}

func terminate(c *command) error {
	return c.call(api.Call{Verb: api.VerbTerminate, Name: c.Args().First()}, true)
}

func (c *command) call(call api.Call, start bool) error {
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	return cl.Call(call, nil, start)
}

func shutdown(c *command) error {
	err := c.call(api.Call{Verb: api.VerbShutdown, Force: c.Bool("force")}, false)
	if errors.Is(err, client.ErrNotRunning) {
		return nil
	}
	return err
}

func status(c *command) error {
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var st api.Status
	if err := cl.Call(api.Call{Verb: api.VerbStatus}, &st, true); err != nil {
		return err
	}
	accel := checkAccel(c.app.ctx)
	if c.Bool("json") {
		return c.json(struct {
			api.Status
			KVM check `json:"kvm"`
		}{st, accel.kvm})
	}
	w := c.app.out
	def := st.Default
	if def == "" {
		def = "none (wsl2 --import NAME FILE.tar)"
	}
	fmt.Fprintf(w, "Default distro:  %s\n", def)
	fmt.Fprintf(w, "Default version: %d\n", st.DefaultVersion)
	fmt.Fprintf(w, "Distros:         %d installed, %d running, %d sessions\n", st.Distros, st.Running, st.Sessions)
	if vm := st.VM; vm != nil {
		fmt.Fprintf(w, "VM:              running on %s, pid %d, %d vCPUs, %d MiB\n", vm.Accel, vm.PID, vm.CPUs, vm.MemoryBytes>>20)
		fmt.Fprintf(w, "Kernel:          Linux %s (%s), ready in %d ms\n", vm.KernelRelease, vm.Kernel, vm.BootMillis)
	} else {
		fmt.Fprintf(w, "VM:              not running\n")
	}
	for _, own := range st.OwnVMs {
		fmt.Fprintf(w, "VM of its own:   %s, running on %s, pid %d, %d vCPUs, %d MiB\n", own.Distro, own.Accel, own.PID, own.CPUs, own.MemoryBytes>>20)
	}
	for _, d := range st.Disks {
		at := []string{}
		for _, m := range d.Mounts {
			at = append(at, m.At)
		}
		fmt.Fprintf(w, "Disk:            %s, at %s\n", d.Disk, cmp.Or(strings.Join(at, ", "), "no place"))
	}
	if accel.kvm.OK {
		fmt.Fprintf(w, "Accelerator:     kvm\n")
	} else {
		fmt.Fprintf(w, "Accelerator:     %s\n", tcgNotice(accel.kvm.Detail))
	}
	return nil
}

// tcgNotice is what is said wherever KVM would have been better.
func tcgNotice(reason string) string {
	return fmt.Sprintf("KVM unusable: %s; using QEMU TCG (slow)", reason)
}

func printVersion(c *command) error {
	if c.Bool("json") {
		return c.json(struct {
			Version string `json:"version"`
		}{api.Version})
	}
	_, err := fmt.Fprintf(c.app.out, "wsl2 %s\n", api.Version)
	return err
}

func printHelp(c *command) error {
	_, err := io.WriteString(c.app.out, helpText())
	return err
}
