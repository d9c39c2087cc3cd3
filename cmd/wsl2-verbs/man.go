package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/term"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
)

// man shows the manual page, or prints it for whoever packs it, or puts it where
// man(1) finds it.
func man(c *command) error {
	if c.Bool("install") {
		path, err := manPath()
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(manPage()), 0o644); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.app.out, "%s is there now; man(1) finds it if %s is in its path (manpath(1)).\n", path, filepath.Dir(filepath.Dir(path)))
		return err
	}
	out, ok := c.app.out.(*os.File)
	viewer, err := exec.LookPath("man")
	if !ok || !term.IsTerminal(int(out.Fd())) || err != nil {
		_, err := fmt.Fprint(c.app.out, manPage())
		return err
	}
	page, err := os.CreateTemp("", "wsl2.*.1")
	if err != nil {
		return err
	}
	defer os.Remove(page.Name())
	_, err = page.WriteString(manPage())
	if err = errors.Join(err, page.Close()); err != nil {
		return err
	}
	cmd := exec.CommandContext(c.app.ctx, viewer, page.Name()) // with a slash in it, it is a file
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.app.in, out, c.app.err
	return cmd.Run()
}

// manPath is the page's place among the user's own data.
func manPath() (string, error) {
	dir, err := config.XDG(os.Getenv, "XDG_DATA_HOME", ".local/share")
	return filepath.Join(dir, "man/man1/wsl2.1"), err
}

// roff quotes text for troff: what begins with a dot is a request, a hyphen is
// no minus, and words in quotation marks would be one argument.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// manPage is wsl2(1), made of the tables that the parser works by, with man(7)'s macros.
func manPage() string {
	var b strings.Builder
	section := func(name string) { fmt.Fprintf(&b, ".SH %s\n", name) }
	text := func(lines string) { b.WriteString(roff(strings.TrimSpace(lines)) + "\n") }
	code := func(lines string) {
		fmt.Fprintf(&b, ".PP\n.nf\n.RS\n%s\n.RE\n.fi\n.PP\n", roff(strings.Trim(lines, "\n")))
	}
	// entry is a paragraph with a tag: names in bold, what they take in italics.
	entry := func(names []string, value, help string) {
		b.WriteString(".TP\n")
		for i, n := range names {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(`\fB` + roff(n) + `\fR`)
		}
		if value != "" {
			b.WriteString(` \fI` + roff(value) + `\fR`)
		}
		fmt.Fprintf(&b, "\n%s\n", roff(strings.ToUpper(help[:1])+help[1:]+"."))
	}
	fmt.Fprintf(&b, ".TH WSL2 1 \"\" \"wsl2 %s\" \"User Commands\"\n", roff(api.Version))
	section("NAME")
	text("wsl2 - Linux distros in a lightweight virtual machine")
	section("SYNOPSIS")
	for _, line := range []string{"[\\fIOPTIONS\\fR]", "[\\fIOPTIONS\\fR] [\\fB\\-\\-\\fR] \\fICOMMAND\\fR...", "[\\fIOPTIONS\\fR] \\fB\\-e\\fR \\fIPROGRAM\\fR...", "\\fIVERB\\fR ..."} {
		fmt.Fprintf(&b, ".B wsl2\n%s\n.br\n", line)
	}
	section("DESCRIPTION")
	text(`
wsl2 gives a Linux host what WSL2 gives Windows: a shell, or one command, in a distro on its own Linux
kernel. Without a command it opens the distro's login shell. Several words are a program and its arguments; a
single word is a script for the distro's shell. Standard streams, terminal, signals and exit status are the
program's own. Names, options and meanings of the verbs are those of wsl.exe.`)
	section("OPTIONS")
	for _, o := range cmdline.RunOptions {
		entry(o.Names, o.Value, o.Help)
	}
	section("VERBS")
	for _, v := range cmdline.Verbs {
		if v.Hidden {
			continue
		}
		entry(append([]string{v.Long}, v.Also...), v.Args, v.Help)
		if len(v.Options) == 0 {
			continue
		}
		b.WriteString(".RS\n")
		for _, o := range v.Options {
			names := []string{"--" + o.Long}
			if o.Short != "" {
				names = []string{"-" + o.Short, "--" + o.Long}
			}
			entry(names, o.Value, o.Help)
		}
		b.WriteString(".RE\n")
	}
	section("EXIT STATUS")
	text(`
The program's own; 128+N if signal N ended it; 127 if it was not found, 126 if it could not be run, 125 if
wsl2 itself failed.`)
	section("FILES")
	entry([]string{"$XDG_CONFIG_HOME/wsl2/wslconfig"}, "", "settings")
	entry([]string{"$XDG_DATA_HOME/wsl2"}, "", "the distros' disks, and registry.json, their list")
	entry([]string{"$XDG_STATE_HOME/wsl2"}, "", "service.log, and console.log, what the VM's kernel printed")
	section("EXAMPLES")
	code(`
wsl2 --install debian
wsl2 -d debian -- make -j4
wsl2 --export debian - | ssh host wsl2 --import debian -
wsl2 --mount disk.img --name data`)
	section("SEE ALSO")
	text("tar(1), ssh(1), e2fsck(8), mount(8)")
	return b.String()
}
