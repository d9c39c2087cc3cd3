// Package cmdline decides what a command line of wsl2 asks for. It is shared by
// wsl2, which runs programs in distros, and wsl2-verbs, which does all else.
package cmdline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// Invocation is what a command line asks for: a program in a distro (Run), or
// a Verb with its arguments.
type Invocation struct {
	Run  *client.RunSpec
	Verb *Verb
	// Args are the verb's options, each as one word, then "--" and the rest.
	Args []string
	VM   api.VMOptions
}

// UsageError is a command line that makes no sense.
type UsageError struct{ text string }

func (e *UsageError) Error() string { return e.text }

func Usagef(format string, a ...any) error { return &UsageError{fmt.Sprintf(format, a...)} }

func invalid(arg string) error { return Usagef("Invalid command line argument: %s", arg) }

// Parse decides what args (without the program's name) ask for. The rules are
// those of wsl.exe: options come first; the first word that is none begins the
// command, which the distro's shell runs (see script); after -e the words are the
// program and its arguments; a verb takes the rest of the line.
func Parse(args []string) (*Invocation, error) {
	if len(args) > 0 {
		// Verbs without dashes are verbs only as the first word: anything
		// behind an option is a command.
		if v := findVerb(args[0], true); v != nil {
			return v.parse(args[1:], api.VMOptions{})
		}
	}
	spec := &client.RunSpec{Shell: wire.ShellLogin}
	shellType := ""
	seen := map[string]bool{}
	rest := args
	if len(rest) > 0 && rest[0] == "~" {
		spec.Cwd, rest = "~", rest[1:]
	}
	for len(rest) > 0 && strings.HasPrefix(rest[0], "-") {
		word := rest[0]
		rest = rest[1:]
		if word == "--" {
			return finish(spec, rest, shellType)
		}
		name, value, hasValue := strings.Cut(word, "=")
		if !strings.HasPrefix(name, "--") {
			name, hasValue = word, false
		}
		if opt, ok := runOptions[name]; ok {
			if seen[opt.Long] {
				return nil, Usagef("%s is given twice", opt.Long)
			}
			seen[opt.Long] = true
			if opt.set == nil { // a switch
				if hasValue {
					return nil, invalid(word)
				}
			} else {
				if !hasValue {
					if len(rest) == 0 {
						return nil, Usagef("%s needs a value: %s", name, opt.Value)
					}
					value, rest = rest[0], rest[1:]
				}
				if err := opt.set(spec, &shellType, value); err != nil {
					return nil, err
				}
			}
			switch opt.Long {
			case "--system":
				spec.Open.System = true
			case "--debug-shell":
				spec.Open.DebugShell = true
			case "--exec":
				if len(rest) == 0 {
					return nil, Usagef("%s needs a program", name)
				}
				if shellType != "" {
					return nil, Usagef("--exec and --shell-type exclude each other")
				}
				return finish(spec, rest, "none")
			}
			continue
		}
		if v := findVerb(name, false); v != nil && (!hasValue || v.Long == name) {
			for long := range seen {
				if long != "--accel" && long != "--kernel" {
					return nil, Usagef("%s does not go with %s", long, name)
				}
			}
			if hasValue {
				rest = append([]string{value}, rest...)
			}
			return v.parse(rest, spec.Open.VM)
		}
		if v, flags := grouped(word); v != nil {
			return v.parse(append(flags, rest...), spec.Open.VM)
		}
		return nil, invalid(word)
	}
	return finish(spec, rest, shellType)
}

// script is what the distro's shell gets for a command. A single word is a script
// as it stands, as in wsl2 'cd /srv && ls'. Several words are a program and its
// arguments, and stay what they are: wsl.exe can pass on the line with the quotes
// that were typed, but here the caller's shell has taken them off already, and
// without them sh -c 'exit 3' would become sh -c exit 3.
func script(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = quote(w)
	}
	return strings.Join(quoted, " ")
}

// quote makes one word of w for a POSIX shell.
func quote(w string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("%+,-./:=@_", r)
	}
	if w != "" && strings.IndexFunc(w, func(r rune) bool { return !plain(r) }) < 0 {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// finish makes a program of words and checks what no single option can.
func finish(spec *client.RunSpec, words []string, shellType string) (*Invocation, error) {
	switch {
	case spec.Open.System && spec.Open.Distro != "":
		return nil, Usagef("--system and --distribution exclude each other")
	case spec.Open.System && spec.Open.DebugShell:
		return nil, Usagef("--system and --debug-shell exclude each other")
	}
	switch {
	case shellType == "none":
		if len(words) == 0 {
			return nil, Usagef("--shell-type none needs a program")
		}
		spec.Shell, spec.Argv = wire.ShellNone, slices.Clone(words)
	case len(words) > 0:
		spec.Shell, spec.Argv = wire.ShellStandard, []string{script(words)}
	}
	switch shellType {
	case "standard":
		spec.Shell = wire.ShellStandard
	case "login":
		spec.Shell = wire.ShellLogin
	}
	return &Invocation{Run: spec, VM: spec.Open.VM}, nil
}

// RunOption is an option of a command in a distro.
type RunOption struct {
	Names             []string // its spellings
	Long, Value, Help string
	set               func(spec *client.RunSpec, shellType *string, value string) error // nil: a switch
}

// runOptions by each of their spellings.
var runOptions = map[string]*RunOption{}

// RunOptions is their order in the help.
var RunOptions = []RunOption{
	{Names: []string{"-d", "--distribution"}, Value: "NAME", Help: "the distro, instead of the default one", set: func(s *client.RunSpec, _ *string, v string) error {
		if v == "" {
			return Usagef("--distribution needs a name")
		}
		s.Open.Distro = v
		return nil
	}},
	{Names: []string{"-u", "--user"}, Value: "USER", Help: "the user, by name or number", set: func(s *client.RunSpec, _ *string, v string) error { s.User = v; return nil }},
	{Names: []string{"--cd"}, Value: "DIR", Help: "the directory: absolute in the distro, ~, or\nrelative to the caller's (missing: ~);\nwithout: the caller's if it is shared, else ~", set: func(s *client.RunSpec, _ *string, v string) error {
		switch {
		case v == "":
			return Usagef("--cd needs a directory")
		case v == "~" || strings.HasPrefix(v, "/"):
			s.Cwd, s.HostCwd = v, false
		default: // as any other command's relative path: below where the caller is
			s.Cwd, s.HostCwd = v, true
		}
		return nil
	}},
	{Names: []string{"-e", "--exec"}, Value: "PROGRAM...", Help: "run PROGRAM itself, without a shell"},
	{Names: []string{"--shell-type"}, Value: "TYPE", Help: "standard, login or none", set: func(_ *client.RunSpec, t *string, v string) error {
		if v != "standard" && v != "login" && v != "none" {
			return Usagef("--shell-type %s: want standard, login or none", v)
		}
		*t = v
		return nil
	}},
	{Names: []string{"--system"}, Help: "the system distro, which is always there"},
	{Names: []string{"--debug-shell"}, Help: "root's shell in the VM, outside of distros"},
	{Names: []string{"--accel"}, Value: "HOW", Help: "run the VM by kvm, tcg (QEMU, slow) or auto", set: func(s *client.RunSpec, _ *string, v string) error {
		if v != "auto" && v != "kvm" && v != "tcg" {
			return Usagef("--accel %s: want auto, kvm or tcg", v)
		}
		s.Open.VM.Accel = v
		return nil
	}},
	{Names: []string{"--kernel"}, Value: "FILE", Help: "boot the VM with this vmlinux or bzImage", set: func(s *client.RunSpec, _ *string, v string) error {
		if v == "" {
			return Usagef("--kernel needs a file")
		}
		s.Open.VM.Kernel = v
		return nil
	}},
}

func init() {
	for i := range RunOptions {
		o := &RunOptions[i]
		o.Long = o.Names[len(o.Names)-1]
		for _, n := range o.Names {
			runOptions[n] = o
		}
	}
}

// Verb is everything but running a command.
type Verb struct {
	Long    string // "--list"; without dashes for verbs that are words
	Also    []string
	Args    string // usage of what follows the options
	Min     int    // fewest and
	Max     int    // most positional arguments
	Help    string
	Options []Option
	Hidden  bool
}

// Option is an option of a verb.
type Option struct {
	Long, Short string // without dashes
	Value       string // what its value is, "" for a switch
	Help        string
}

// findVerb finds a verb by any of its spellings; word selects those without dashes.
func findVerb(name string, word bool) *Verb {
	for i := range Verbs {
		v := &Verbs[i]
		if strings.HasPrefix(v.Long, "-") == word {
			continue
		}
		if v.Long == name || slices.Contains(v.Also, name) {
			return v
		}
	}
	return nil
}

// grouped resolves -lv: a verb's short name with its short switches.
func grouped(word string) (*Verb, []string) {
	if len(word) < 3 || word[0] != '-' || word[1] == '-' {
		return nil, nil
	}
	v := findVerb(word[:2], false)
	if v == nil {
		return nil, nil
	}
	var flags []string
	for _, c := range word[2:] {
		if o := v.option("-" + string(c)); o == nil || o.Value != "" {
			return nil, nil
		}
		flags = append(flags, "-"+string(c))
	}
	return v, flags
}

func (v *Verb) option(name string) *Option {
	for i := range v.Options {
		o := &v.Options[i]
		if name == "--"+o.Long || o.Short != "" && name == "-"+o.Short {
			return o
		}
	}
	return nil
}

// parse brings a verb's arguments into the order that the flag parser wants:
// options, which may stand anywhere before "--", then the rest.
func (v *Verb) parse(words []string, vm api.VMOptions) (*Invocation, error) {
	var options, rest []string
	seen := map[string]bool{}
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		if word == "--" {
			rest = append(rest, words...)
			break
		}
		if word == "-" || !strings.HasPrefix(word, "-") {
			rest = append(rest, word)
			continue
		}
		name, value, hasValue := strings.Cut(word, "=")
		if name == "--help" || name == "-h" {
			return &Invocation{Verb: v, Args: []string{"--help"}}, nil
		}
		if name == "--accel" || name == "--kernel" { // of the VM that the verb may start
			if !hasValue {
				if len(words) == 0 {
					return nil, Usagef("%s needs a value: %s", name, runOptions[name].Value)
				}
				value, words = words[0], words[1:]
			}
			spec := client.RunSpec{Open: api.Open{VM: vm}}
			if err := runOptions[name].set(&spec, nil, value); err != nil {
				return nil, err
			}
			vm = spec.Open.VM
			continue
		}
		if len(word) > 2 && word[1] != '-' { // a group of short switches
			var split []string
			for _, c := range word[1:] {
				o := v.option("-" + string(c))
				if o == nil || o.Value != "" {
					return nil, invalid(word)
				}
				split = append(split, "-"+string(c))
			}
			words = append(split, words...)
			continue
		}
		o := v.option(name)
		if o == nil {
			return nil, invalid(word)
		}
		if seen[o.Long] {
			return nil, Usagef("--%s is given twice", o.Long)
		}
		seen[o.Long] = true
		switch {
		case o.Value == "" && hasValue:
			return nil, invalid(word)
		case o.Value == "":
			options = append(options, "--"+o.Long)
		default:
			if !hasValue {
				if len(words) == 0 {
					return nil, Usagef("%s needs a value: %s", name, o.Value)
				}
				value, words = words[0], words[1:]
			}
			options = append(options, "--"+o.Long+"="+value)
		}
	}
	switch {
	case len(rest) < v.Min:
		return nil, Usagef("%s needs %s", v.Long, v.Args)
	case len(rest) > v.Max:
		return nil, invalid(rest[v.Max])
	}
	return &Invocation{Verb: v, Args: append(append(options, "--"), rest...), VM: vm}, nil
}
