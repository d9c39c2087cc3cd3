package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/config"
)

// sshSuffix makes a distro's name one that ssh(1) finds in its configuration.
const sshSuffix = ".wsl2"

// sshKey is this user's SSH host key; beside it lies known_hosts.
func sshKey() (string, error) {
	paths, err := config.FromEnv(os.Getenv, os.Getuid())
	if err != nil {
		return "", err
	}
	return filepath.Join(paths.Data, "ssh", "host_key"), nil
}

// sshConfig prints what ssh_config(5) needs.
func sshConfig(c *command) error {
	key, err := sshKey()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.app.out, `Host *%s
    ProxyCommand "%s" ssh-proxy %%n
    UserKnownHostsFile "%s"
    User default
`, sshSuffix, c.app.wsl2, filepath.Join(filepath.Dir(key), "known_hosts"))
	return err
}

// sshProxy becomes wsl2-ssh.
func sshProxy(c *command) error {
	key, err := sshKey()
	if err != nil {
		return err
	}
	program, err := config.FindSSH()
	if err != nil {
		return err
	}
	err = unix.Exec(program, []string{"wsl2-ssh", "serve", c.app.wsl2, key, strings.TrimSuffix(c.Args().First(), sshSuffix)}, os.Environ())
	return &os.PathError{Op: "run", Path: program, Err: err}
}
