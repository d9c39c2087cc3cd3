package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// invocation is what a command line asks for: a program in a distro (run), or
// a verb with its arguments.
type invocation struct {
	run  *client.RunSpec
	verb *verb
	// args are the verb's options, each as one word, then "--" and the rest.
	args []string
	vm   api.VMOptions
}

// usageError is a command line that makes no sense.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, a ...any) error { return &usageError{fmt.Sprintf(format, a...)} }

func invalid(arg string) error { return usagef("Invalid command line argument: %s", arg) }

// parse decides what args (without the program's name) ask for. The rules are
// those of wsl.exe: options come first; the first word that is none begins the
// command, which the distro's shell runs (see script); after -e the words are the
// program and its arguments; a verb takes the rest of the line.
func parse(args []string) (*invocation, error) {
	if len(args) > 0 {
		// Verbs without dashes are verbs only as the first word: anything
		// behind an option is a command.
		if v := findVerb(args[0], true); v != nil {
			return v.parse(args[1:], api.VMOptions{})
		}
	}
	spec := &client.RunSpec{Cwd: "~", Shell: wire.ShellLogin}
	shellType := ""
	seen := map[string]bool{}
	rest := args
	if len(rest) > 0 && rest[0] == "~" {
		rest = rest[1:]
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
			if seen[opt.long] {
				return nil, usagef("%s is given twice", opt.long)
			}
			seen[opt.long] = true
			if opt.set == nil { // a switch
				if hasValue {
					return nil, invalid(word)
				}
			} else {
				if !hasValue {
					if len(rest) == 0 {
						return nil, usagef("%s needs a value: %s", name, opt.value)
					}
					value, rest = rest[0], rest[1:]
				}
				if err := opt.set(spec, &shellType, value); err != nil {
					return nil, err
				}
			}
			switch opt.long {
			case "--system":
				spec.Open.System = true
			case "--exec":
				if len(rest) == 0 {
					return nil, usagef("%s needs a program", name)
				}
				if shellType != "" {
					return nil, usagef("--exec and --shell-type exclude each other")
				}
				return finish(spec, rest, "none")
			}
			continue
		}
		if v := findVerb(name, false); v != nil && (!hasValue || v.long == name) {
			for long := range seen {
				if long != "--accel" && long != "--kernel" {
					return nil, usagef("%s does not go with %s", long, name)
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
func finish(spec *client.RunSpec, words []string, shellType string) (*invocation, error) {
	if spec.Open.System && spec.Open.Distro != "" {
		return nil, usagef("--system and --distribution exclude each other")
	}
	switch {
	case shellType == "none":
		if len(words) == 0 {
			return nil, usagef("--shell-type none needs a program")
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
	return &invocation{run: spec, vm: spec.Open.VM}, nil
}

// runOption is an option of a command in a distro.
type runOption struct {
	long, value, help string
	set               func(spec *client.RunSpec, shellType *string, value string) error // nil: a switch
}

// runOptions by each of their spellings.
var runOptions = map[string]*runOption{}

// runOptionList is their order in the help.
var runOptionList = []struct {
	names []string
	runOption
}{
	{[]string{"-d", "--distribution"}, runOption{value: "NAME", help: "the distro, instead of the default one", set: func(s *client.RunSpec, _ *string, v string) error {
		if v == "" {
			return usagef("--distribution needs a name")
		}
		s.Open.Distro = v
		return nil
	}}},
	{[]string{"-u", "--user"}, runOption{value: "USER", help: "the user, by name or number", set: func(s *client.RunSpec, _ *string, v string) error { s.User = v; return nil }}},
	{[]string{"--cd"}, runOption{value: "DIR", help: "the directory: absolute in the distro, or ~", set: func(s *client.RunSpec, _ *string, v string) error {
		if v != "~" && !strings.HasPrefix(v, "/") {
			return usagef("--cd %s: give an absolute path in the distro, or ~", v)
		}
		s.Cwd = v
		return nil
	}}},
	{[]string{"-e", "--exec"}, runOption{value: "PROGRAM...", help: "run PROGRAM itself, without a shell"}},
	{[]string{"--shell-type"}, runOption{value: "TYPE", help: "standard, login or none", set: func(_ *client.RunSpec, t *string, v string) error {
		if v != "standard" && v != "login" && v != "none" {
			return usagef("--shell-type %s: want standard, login or none", v)
		}
		*t = v
		return nil
	}}},
	{[]string{"--system"}, runOption{help: "the system distro, which is always there"}},
	{[]string{"--accel"}, runOption{value: "HOW", help: "run the VM by kvm, tcg (QEMU, slow) or auto", set: func(s *client.RunSpec, _ *string, v string) error {
		if v != "auto" && v != "kvm" && v != "tcg" {
			return usagef("--accel %s: want auto, kvm or tcg", v)
		}
		s.Open.VM.Accel = v
		return nil
	}}},
	{[]string{"--kernel"}, runOption{value: "FILE", help: "boot the VM with this vmlinux or bzImage", set: func(s *client.RunSpec, _ *string, v string) error {
		if v == "" {
			return usagef("--kernel needs a file")
		}
		s.Open.VM.Kernel = v
		return nil
	}}},
}

func init() {
	for i := range runOptionList {
		o := &runOptionList[i]
		o.long = o.names[len(o.names)-1]
		for _, n := range o.names {
			runOptions[n] = &o.runOption
		}
	}
}

// verb is everything but running a command.
type verb struct {
	long    string // "--list"; without dashes for verbs that are words
	also    []string
	args    string // usage of what follows the options
	min     int    // fewest and
	max     int    // most positional arguments
	help    string
	options []verbOption
	hidden  bool
	action  func(*command) error
}

// verbOption is an option of a verb.
type verbOption struct {
	long, short string // without dashes
	value       string // what its value is, "" for a switch
	help        string
}

// findVerb finds a verb by any of its spellings; word selects those without dashes.
func findVerb(name string, word bool) *verb {
	for i := range verbs {
		v := &verbs[i]
		if strings.HasPrefix(v.long, "-") == word {
			continue
		}
		if v.long == name || slices.Contains(v.also, name) {
			return v
		}
	}
	return nil
}

// grouped resolves -lv: a verb's short name with its short switches.
func grouped(word string) (*verb, []string) {
	if len(word) < 3 || word[0] != '-' || word[1] == '-' {
		return nil, nil
	}
	v := findVerb(word[:2], false)
	if v == nil {
		return nil, nil
	}
	var flags []string
	for _, c := range word[2:] {
		if o := v.option("-" + string(c)); o == nil || o.value != "" {
			return nil, nil
		}
		flags = append(flags, "-"+string(c))
	}
	return v, flags
}

func (v *verb) option(name string) *verbOption {
	for i := range v.options {
		o := &v.options[i]
		if name == "--"+o.long || o.short != "" && name == "-"+o.short {
			return o
		}
	}
	return nil
}

// parse brings a verb's arguments into the order that the flag parser wants:
// options, which may stand anywhere before "--", then the rest.
func (v *verb) parse(words []string, vm api.VMOptions) (*invocation, error) {
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
			return &invocation{verb: v, args: []string{"--help"}}, nil
		}
		if name == "--accel" || name == "--kernel" { // of the VM that the verb may start
			if !hasValue {
				if len(words) == 0 {
					return nil, usagef("%s needs a value: %s", name, runOptions[name].value)
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
				if o == nil || o.value != "" {
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
		if seen[o.long] {
			return nil, usagef("--%s is given twice", o.long)
		}
		seen[o.long] = true
		switch {
		case o.value == "" && hasValue:
			return nil, invalid(word)
		case o.value == "":
			options = append(options, "--"+o.long)
		default:
			if !hasValue {
				if len(words) == 0 {
					return nil, usagef("%s needs a value: %s", name, o.value)
				}
				value, words = words[0], words[1:]
			}
			options = append(options, "--"+o.long+"="+value)
		}
	}
	switch {
	case len(rest) < v.min:
		return nil, usagef("%s needs %s", v.long, v.args)
	case len(rest) > v.max:
		return nil, invalid(rest[v.max])
	}
	return &invocation{verb: v, args: append(append(options, "--"), rest...), vm: vm}, nil
}
