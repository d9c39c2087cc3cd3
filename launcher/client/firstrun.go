package client

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/term"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
)

// ownSetUp is the first run of distros that bring none: it makes a user who may
// become root. It is a script because only the distro knows its tools.
const ownSetUp = `
uid_of() { while IFS=: read -r n _ u _; do [ "$n" != "$1" ] || echo "$u"; done </etc/passwd; }
taken() { while IFS=: read -r _ _ u _; do [ "$u" != "$1" ] || return 0; done </etc/passwd; return 1; }
echo "Welcome. Make a user of your own, or press Enter to stay root."
while :; do
  printf 'User name: '
  read -r user || exit 0
  [ -n "$user" ] || exit 0
  case $user in [!a-z_]* | *[!a-z0-9_-]*) echo "Use small letters, digits, _ and -."; continue ;; esac
  [ -z "$(uid_of "$user")" ] || { echo "There is a user $user already."; break; }
  if command -v useradd >/dev/null; then
    shell=/bin/sh; [ -x /bin/bash ] && shell=/bin/bash
    useradd -m -s "$shell" "$user" && break
  elif command -v adduser >/dev/null; then
    adduser -D "$user" && break
  else
    uid=1000; while taken $uid; do uid=$((uid + 1)); done
    echo "$user:x:$uid:$uid::/home/$user:/bin/sh" >>/etc/passwd
    echo "$user:x:$uid:" >>/etc/group
    mkdir -p "/home/$user" && chown $uid:$uid "/home/$user" && break
  fi
done
if command -v passwd >/dev/null; then passwd "$user" || echo "No password is set; root can set one: passwd $user"; fi
for group in sudo wheel; do
  grep -q "^$group:" /etc/group || continue
  if command -v usermod >/dev/null; then usermod -a -G "$group" "$user"; else addgroup "$user" "$group"; fi
done
uid_of "$user" >/run/wsl2-first-user
`

// askUID prints the uid of the user that the set-up made: ours says, another one's is $1,
// if there is such a user.
const askUID = `
if [ -f /run/wsl2-first-user ]; then read -r uid </run/wsl2-first-user; rm -f /run/wsl2-first-user; echo "$uid"; exit; fi
while IFS=: read -r _ _ uid _; do [ "$uid" != "$1" ] || { echo "$uid"; break; }; done </etc/passwd
`

// interactive tells whether a session is a shell on a terminal.
func interactive(spec RunSpec, std Stdio) bool {
	return len(spec.Argv) == 0 && term.IsTerminal(int(std.In.Fd())) && term.IsTerminal(int(std.Out.Fd()))
}

// firstRun sets a new distro up before its first interactive shell: as root, on
// the user's terminal. Unless it succeeds there is no shell, and the next tries again.
func (c *Client) firstRun(o api.Opened, spec RunSpec, std Stdio) error {
	command := o.SetUp
	if command == "" {
		command = ownSetUp
	}
	// In a process of its own: what reads the terminal for a session goes on until the
	// process ends, and would take the shell's input.
	setUp := exec.Command(c.Service.Path, "-d", o.Distro, "-u", "0", "--cd", "/", "-e", "/bin/sh", "-c", command)
	setUp.Args[0] = "wsl2"
	setUp.Stdin, setUp.Stdout, setUp.Stderr = std.In, std.Out, std.Err
	err := setUp.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("set %s up: %w", o.Distro, err)
	}
	if status := setUp.ProcessState.ExitCode(); status != 0 {
		return api.Errorf(api.CodeFailed, "the next shell tries again; `wsl2 -d "+o.Distro+" -u root -e sh` goes without", "the set-up of %s ended with status %d", o.Distro, status)
	}
	user, err := c.output(RunSpec{Open: api.Open{Distro: o.Distro, VM: spec.Open.VM}, User: "0", Cwd: "/", Shell: wire.ShellNone,
		Argv: []string{"/bin/sh", "-c", askUID, "sh", o.SetUpUID}})
	if err != nil {
		return fmt.Errorf("set %s up: %w", o.Distro, err)
	}
	if _, err := strconv.ParseUint(user, 10, 32); err != nil { // whoever stayed root has made no user
		user = ""
	}
	return c.Call(api.Call{Verb: api.VerbSetUp, Name: o.Distro, User: user}, nil, true)
}

// maxOutput bounds what output takes.
const maxOutput = 4 << 10

// output runs a program and returns what it prints, at most maxOutput bytes.
func (c *Client) output(spec RunSpec) (string, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	text := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(r, maxOutput))
		io.Copy(io.Discard, r)
		text <- strings.TrimSpace(string(b))
	}()
	_, err = c.Run(spec, Stdio{In: null, Out: w, Err: null, Getenv: func(string) string { return "" }})
	w.Close()
	return <-text, err
}
