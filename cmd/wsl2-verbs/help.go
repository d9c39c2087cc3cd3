package main

import (
	"fmt"
	"strings"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
)

// helpText is made of the tables that the parser works by.
func helpText() string {
	var b strings.Builder
	b.WriteString(`wsl2 runs Linux distros in a lightweight VM of their own.

Usage:
  wsl2 [OPTIONS]                  the distro's login shell
  wsl2 [OPTIONS] [--] COMMAND...  COMMAND by the distro's shell (or 'a script')
  wsl2 [OPTIONS] -e PROGRAM...    PROGRAM with its arguments, without a shell
  wsl2 VERB ...

Options:
`)
	line := func(left, help string) {
		lines := strings.Split(help, "\n")
		fmt.Fprintf(&b, "  %-28s  %s\n", left, lines[0])
		for _, l := range lines[1:] {
			fmt.Fprintf(&b, "  %-28s  %s\n", "", l)
		}
	}
	for _, o := range cmdline.RunOptions {
		left := strings.Join(o.Names, ", ")
		if o.Value != "" {
			left += " " + o.Value
		}
		line(left, o.Help)
	}
	b.WriteString("\nVerbs:\n")
	for _, v := range cmdline.Verbs {
		if v.Hidden {
			continue
		}
		left := v.Long
		if len(v.Also) > 0 && len(v.Also[0]) == 2 {
			left = v.Also[0] + ", " + left
		}
		if v.Args != "" {
			left += " " + v.Args
		}
		line(left, v.Help)
		for _, o := range v.Options {
			name := "--" + o.Long
			if o.Short != "" {
				name = "-" + o.Short + ", " + name
			}
			line("    "+name, o.Help)
		}
	}
	b.WriteString(`
Exit status: the program's own; 128+N if signal N ended it; 127 if it was not
found, 126 if it could not be run, 125 if wsl2 itself failed.
Settings: $XDG_CONFIG_HOME/wsl2/wslconfig. Distros: $XDG_DATA_HOME/wsl2.
`)
	return b.String()
}
