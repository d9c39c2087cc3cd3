package cmdline

import (
	"errors"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/client"
)

// words splits at blanks; ” is an empty word.
func words(line string) []string {
	list := strings.Fields(line)
	for i := range list {
		if list[i] == "''" {
			list[i] = ""
		}
	}
	return list
}

func TestParseRun(t *testing.T) {
	login := client.RunSpec{Shell: wire.ShellLogin}
	shell := func(s string) client.RunSpec {
		return client.RunSpec{Shell: wire.ShellStandard, Argv: []string{s}}
	}
	home := func(s client.RunSpec) client.RunSpec { s.Cwd = "~"; return s }
	exec := func(a ...string) client.RunSpec { return client.RunSpec{Shell: wire.ShellNone, Argv: a} }
	with := func(s client.RunSpec, f func(*client.RunSpec)) client.RunSpec { f(&s); return s }
	debian := func(s client.RunSpec) client.RunSpec { s.Open.Distro = "debian"; return s }

	for line, want := range map[string]client.RunSpec{
		"":                                     login,
		"~":                                    home(login),
		"--":                                   login,
		"-d debian":                            debian(login),
		"~ -d debian":                          home(debian(login)),
		"--distribution debian":                debian(login),
		"--distribution=debian":                debian(login),
		"-d debian --":                         debian(login),
		"-d debian -u me":                      with(debian(login), func(s *client.RunSpec) { s.User = "me" }),
		"--user=0 -d debian":                   with(debian(login), func(s *client.RunSpec) { s.User = "0" }),
		"--cd /srv":                            with(login, func(s *client.RunSpec) { s.Cwd = "/srv" }),
		"--cd ~":                               home(login),
		"--cd=/a=b":                            with(login, func(s *client.RunSpec) { s.Cwd = "/a=b" }),
		"--system":                             with(login, func(s *client.RunSpec) { s.Open.System = true }),
		"--debug-shell":                        with(login, func(s *client.RunSpec) { s.Open.DebugShell = true }),
		"--debug-shell -e ps":                  with(exec("ps"), func(s *client.RunSpec) { s.Open.DebugShell = true }),
		"--accel tcg":                          with(login, func(s *client.RunSpec) { s.Open.VM.Accel = "tcg" }),
		"--kernel ./k --accel=kvm":             with(login, func(s *client.RunSpec) { s.Open.VM = api.VMOptions{Accel: "kvm", Kernel: "./k"} }),
		"ls":                                   shell("ls"),
		"ls -la /":                             shell("ls -la /"),
		"-d debian ls -la /":                   debian(shell("ls -la /")),
		"-d debian -- ls -la /":                debian(shell("ls -la /")),
		"-- ls -- x":                           shell("ls -- x"),
		"-- ~":                                 shell("~"),
		"echo a '' b":                          shell("echo a '' b"),
		"echo $HOME *.c":                       shell("echo '$HOME' '*.c'"),
		"VAR=1 ls":                             shell("VAR=1 ls"), // an assignment, as in WSL
		"-- --list":                            shell("--list"),
		"echo --list":                          shell("echo --list"),
		"-- -d debian":                         shell("-d debian"),
		"-d debian doctor":                     debian(shell("doctor")), // a verb only as the first word
		"-- doctor":                            shell("doctor"),
		"-e ls":                                exec("ls"),
		"--exec ls --color=auto -h":            exec("ls", "--color=auto", "-h"),
		"-e echo a '' b":                       exec("echo", "a", "", "b"),
		"-e -- ls":                             exec("--", "ls"),
		"-d debian -e --list":                  debian(exec("--list")),
		"-e doctor":                            exec("doctor"),
		"--shell-type login":                   login,
		"--shell-type login echo hi":           with(shell("echo hi"), func(s *client.RunSpec) { s.Shell = wire.ShellLogin }),
		"--shell-type standard":                with(login, func(s *client.RunSpec) { s.Shell = wire.ShellStandard }),
		"--shell-type=none echo a '' b":        exec("echo", "a", "", "b"),
		"--shell-type none -- echo -n":         exec("echo", "-n"),
		"echo --generate-bash-completion":      shell("echo --generate-bash-completion"),
		"~ ls ~":                               home(shell("ls '~'")),
		"~ ~":                                  home(shell("~")),
		"~ -- ~":                               home(shell("~")),
		"~ -e ls":                              home(exec("ls")),
		"~ --cd /srv":                          with(login, func(s *client.RunSpec) { s.Cwd = "/srv" }),
		"-d debian ~":                          debian(shell("~")), // leading means first
		"--cd . ls":                            with(shell("ls"), func(s *client.RunSpec) { s.Cwd, s.HostCwd = ".", true }),
		"--cd ../x":                            with(login, func(s *client.RunSpec) { s.Cwd, s.HostCwd = "../x", true }),
		"--cd=sub/dir -e pwd":                  with(exec("pwd"), func(s *client.RunSpec) { s.Cwd, s.HostCwd = "sub/dir", true }),
		"--cd ~x":                              with(login, func(s *client.RunSpec) { s.Cwd, s.HostCwd = "~x", true }),
		"--cd -- ls":                           with(shell("ls"), func(s *client.RunSpec) { s.Cwd, s.HostCwd = "--", true }),
		"-u '' ls":                             shell("ls"), // the default user
		"--user= ls":                           shell("ls"),
		"-u -x ls":                             with(shell("ls"), func(s *client.RunSpec) { s.User = "-x" }), // a value is a value
		"-d -- ls":                             with(shell("ls"), func(s *client.RunSpec) { s.Open.Distro = "--" }),
		"--distribution=a=b":                   with(login, func(s *client.RunSpec) { s.Open.Distro = "a=b" }),
		"-e ''":                                exec(""),
		"-e '' a":                              exec("", "a"),
		"-e ls ''":                             exec("ls", ""),
		"-e -d debian":                         exec("-d", "debian"),
		"-e ~":                                 exec("~"),
		"-e --help":                            exec("--help"),
		"-e ls -- -d debian --exec":            exec("ls", "--", "-d", "debian", "--exec"),
		"--exec --":                            exec("--"),
		"''":                                   shell(""),
		"'' x":                                 shell("'' x"),
		"-- ''":                                shell(""),
		"-- -- ls":                             shell("-- ls"),
		"-- -e ls":                             shell("-e ls"),
		"-- --help":                            shell("--help"),
		"ls -d debian":                         shell("ls -d debian"),
		"ls -- -x":                             shell("ls -- -x"),
		"ls --list":                            shell("ls --list"),
		"echo -e a":                            shell("echo -e a"),
		"echo -n $USER":                        shell("echo -n '$USER'"),
		"-d debian list":                       debian(shell("list")),
		"--system -e id -u":                    with(exec("id", "-u"), func(s *client.RunSpec) { s.Open.System = true }),
		"--system --":                          with(login, func(s *client.RunSpec) { s.Open.System = true }),
		"--shell-type login -- echo hi":        with(shell("echo hi"), func(s *client.RunSpec) { s.Shell = wire.ShellLogin }),
		"--shell-type=standard ls -l":          shell("ls -l"),
		"--shell-type login -d debian":         debian(login),
		"--shell-type none ''":                 exec(""),
		"--shell-type none -- -x":              exec("-x"),
		"--accel=tcg -d debian -e true":        with(debian(exec("true")), func(s *client.RunSpec) { s.Open.VM.Accel = "tcg" }),
		"-u me -d debian --cd / -e sh -c true": with(debian(exec("sh", "-c", "true")), func(s *client.RunSpec) { s.User, s.Cwd = "me", "/" }),
	} {
		inv, err := Parse(words(line))
		if err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		if inv.Run == nil || !reflect.DeepEqual(*inv.Run, want) {
			t.Errorf("%q:\ngot  %+v\nwant %+v", line, inv.Run, want)
		}
	}
}

// TestScript: what the shell makes of a script are the words that were given; a
// single word is a script itself.
func TestScript(t *testing.T) {
	if got := script([]string{"cd /srv && ls"}); got != "cd /srv && ls" {
		t.Errorf("one word: %q", got)
	}
	for _, words := range [][]string{
		{"printf", "%s\n", "a b", "", "it's", "'", "\"$HOME\"", "`id`", "$(id)", "*", "~", "#", "\\", "a\nb", "ü", "-n", "&&", ";", "\x01\xff"},
		{"printf", "[%s]", "x=1", "{a,b}", "!", "^", "|", "<", ">", "[a]", "?"},
	} {
		out, err := exec.Command("sh", "-c", script(words)).Output()
		if err != nil {
			t.Fatal(err)
		}
		want, err := exec.Command(words[0], words[1:]...).Output()
		if err != nil || string(out) != string(want) {
			t.Errorf("%q:\ngot  %q\nwant %q, %v", words, out, want, err)
		}
	}
}

func TestParseVerbs(t *testing.T) {
	for line, want := range map[string]string{
		"--list":                        "--list: --",
		"-l":                            "--list: --",
		"-l -v":                         "--list: --verbose --",
		"-lv":                           "--list: --verbose --",
		"-lq":                           "--list: --quiet --",
		"--list -q --running":           "--list: --quiet --running --",
		"--list --json":                 "--list: --json --",
		"--import a b.tar":              "--import: -- a b.tar",
		"--import a dir -":              "--import: -- a dir -",
		"--import -- -a -b":             "--import: -- -a -b",
		"--accel tcg --import a b":      "--import: -- a b tcg",
		"--import a b --accel tcg":      "--import: -- a b tcg",
		"--terminate a":                 "--terminate: -- a",
		"-t a":                          "--terminate: -- a",
		"--terminate=a":                 "--terminate: -- a",
		"-s a":                          "--set-default: -- a",
		"--setdefault a":                "--set-default: -- a",
		"--unregister a --yes":          "--unregister: --yes -- a",
		"--unregister -y a":             "--unregister: --yes -- a",
		"--shutdown":                    "--shutdown: --",
		"--shutdown --force":            "--shutdown: --force --",
		"--status --json":               "--status: --json --",
		"-v":                            "--version: --",
		"--version":                     "--version: --",
		"--help":                        "--help: --",
		"-h":                            "--help: --",
		"--list --help":                 "--list: --help",
		"--import -h":                   "--import: --help",
		"doctor":                        "doctor: --",
		"doctor --kvm --json":           "doctor: --kvm --json --",
		"completion zsh":                "completion: -- zsh",
		"ssh-config":                    "ssh-config: --",
		"ssh-proxy debian.wsl2":         "ssh-proxy: -- debian.wsl2",
		"service":                       "service: --",
		"vm":                            "vm: --",
		"--manage a --move b":           "--manage: --move=b -- a",
		"--manage -r 5GB a":             "--manage: --resize=5GB -- a",
		"--manage --compact a":          "--manage: --compact -- a",
		"--export a - --format tar.zst": "--export: --format=tar.zst -- a -",
	} {
		inv, err := Parse(words(line))
		if err != nil || inv.Verb == nil {
			t.Errorf("%q: %+v, %v", line, inv, err)
			continue
		}
		got := inv.Verb.Long + ": " + strings.Join(inv.Args, " ")
		if inv.VM.Accel != "" {
			got += " " + inv.VM.Accel
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

// TestEveryOption: each verb, by each of its names, knows its options by their long and short
// forms, before and behind its arguments.
func TestEveryOption(t *testing.T) {
	for _, v := range Verbs {
		args := []string{"one", "two"}[:v.Min]
		for _, o := range v.Options {
			value, want := []string{}, "--"+o.Long
			if o.Value != "" {
				value, want = []string{"x"}, want+"=x"
			}
			forms := [][]string{append([]string{"--" + o.Long}, value...)}
			if o.Short != "" {
				forms = append(forms, append([]string{"-" + o.Short}, value...))
			}
			if o.Value != "" {
				forms = append(forms, []string{want})
			}
			for _, name := range append([]string{v.Long}, v.Also...) {
				for _, form := range forms {
					for _, line := range [][]string{slices.Concat([]string{name}, form, args), slices.Concat([]string{name}, args, form)} {
						inv, err := Parse(line)
						if err != nil || inv.Verb == nil || inv.Verb.Long != v.Long || !slices.Equal(inv.Args, slices.Concat([]string{want, "--"}, args)) {
							t.Errorf("%q: %+v, %v", line, inv, err)
						}
					}
				}
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for line, want := range map[string]string{
		"-x":                           "Invalid command line argument: -x",
		"--nosuch":                     "--nosuch",
		"-":                            "Invalid command line argument: -",
		"-d":                           "needs a value",
		"--distribution= ls":           "needs a name",
		"-d a -d b":                    "twice",
		"-d a --distribution b":        "twice",
		"--system -d a":                "exclude",
		"--system --debug-shell":       "exclude",
		"--system=yes":                 "--system=yes",
		"--cd ''":                      "needs a directory",
		"--cd=":                        "needs a directory",
		"--cd / --cd /":                "twice",
		"-u":                           "needs a value",
		"-u a --user=b":                "twice",
		"--shell-type":                 "needs a value",
		"--shell-type= ls":             "standard, login or none",
		"--shell-type none --":         "needs a program",
		"--exec=ls":                    "--exec=ls",
		"-du":                          "Invalid command line argument: -du",
		"~ -x":                         "-x",
		"--cd":                         "needs a value",
		"-e":                           "needs a program",
		"-d a --exec":                  "needs a program",
		"--shell-type fancy":           "standard, login or none",
		"--shell-type none":            "needs a program",
		"--shell-type none -e ls":      "exclude",
		"--accel hvf":                  "auto, kvm or tcg",
		"--kernel=":                    "needs a file",
		"-d a --list":                  "-d",
		"-u me --shutdown":             "does not go with",
		"--list extra":                 "extra",
		"--list --nosuch":              "--nosuch",
		"--list -vx":                   "-vx",
		"-lx":                          "-lx",
		"--list --verbose=1":           "--verbose=1",
		"--list -v -v":                 "twice",
		"--import a":                   "NAME [DIR] FILE",
		"--import":                     "NAME [DIR] FILE",
		"--import a b c d":             "d",
		"--import a b --accel":         "needs a value",
		"--import a b --accel fast":    "auto, kvm or tcg",
		"--terminate":                  "NAME",
		"--terminate a b":              "b",
		"completion":                   "bash|zsh|fish",
		"ssh-proxy":                    "NAME",
		"doctor now":                   "now",
		"--help me":                    "me",
		"--import a b --format tar":    "--format",
		"--export a":                   "NAME FILE",
		"--manage":                     "NAME",
		"--manage a --move":            "DIR",
		"--manage a --move=x --move=y": "twice",
		"--uninstall a":                "a",
		"--import-in-place a":          "NAME DISK",
	} {
		inv, err := Parse(words(line))
		var usage *UsageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), strings.TrimPrefix(want, "-d")) {
			t.Errorf("%q: %+v, %v; want %q", line, inv, err, want)
		}
	}
}

// FuzzParse: every line is a command, a verb or an error of usage, and the words behind -e stay what they are.
func FuzzParse(f *testing.F) {
	for _, line := range []string{"", "-d debian -- ls", "--import a b", "-lv", "--shell-type none x"} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, " ")
		before := slices.Clone(args)
		inv, err := Parse(args)
		var usage *UsageError
		if err != nil && (!errors.As(err, &usage) || strings.TrimSpace(err.Error()) == "") {
			t.Fatalf("%q: not an error of usage: %v", line, err)
		}
		if err == nil && (inv.Run == nil) == (inv.Verb == nil) {
			t.Fatalf("%q is neither or both: %+v", line, inv)
		}
		if !slices.Equal(args, before) {
			t.Fatalf("%q was changed to %q", before, args)
		}
		inv, err = Parse(append([]string{"-e"}, args...))
		if err != nil || inv.Run == nil || !slices.Equal(inv.Run.Argv, args) {
			t.Fatalf("behind -e: %q became %+v, %v", args, inv.Run, err)
		}
	})
}
