// Package hostmount mounts the tree of a running distro on the host: `wsl2-files mount`, a
// child of the service for each distro that is mounted.
//
// The process lives until the other end of a socket is closed, which the service's own end
// does as well: it then unmounts and ends. What one that was killed leaves is a mount
// that answers ENOTCONN; whoever comes next detaches it.
package hostmount

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/spawn"
)

// Spec is what is mounted, and where.
type Spec struct {
	VsockPath string
	Port      uint32 // the distro's session port
	Distro    string
	User      string // the registry's default user of it (guestconn.DialFiles)
	Dir       string // absolute; made and removed by Run
}

// ControlFD is the process's end of the socket. It writes mountedLine, or why it failed.
const ControlFD = 3

// MountedLine is what the process says when all is mounted.
const MountedLine = "mounted\n"

// Check tells what is missing for a mount, before anything is started for one.
func Check() error {
	if os.Geteuid() == 0 {
		return nil
	}
	if _, err := fusermount(); err != nil {
		return api.Errorf(api.CodeNoToolchain, "install it (Debian, Ubuntu, Fedora: the package fuse3); `wsl2 cp` copies files without it",
			"a distro's files cannot be mounted without root: fusermount3 was not found")
	}
	return nil
}

// fusermount is the helper of the host's that may mount for users.
func fusermount() (string, error) {
	path, err := exec.LookPath("fusermount3")
	if err != nil {
		path, err = exec.LookPath("fusermount")
	}
	return path, err
}

// Run mounts and serves until ctx ends, the distro does, or somebody unmounts it. mounted is called when it is there.
func Run(ctx context.Context, s Spec, mounted func()) error {
	if err := prepare(s.Dir); err != nil {
		return err
	}
	defer os.Remove(s.Dir)
	path, err := config.FindFiles()
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	f, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	ours, err := net.FileConn(f)
	f.Close()
	if err != nil {
		theirs.Close()
		return err
	}
	p, err := spawn.Start(spawn.Command{Path: path, Args: append([]string{"mount"}, s.args()...), Dir: "/", Output: os.Stderr, Files: []*os.File{theirs}})
	theirs.Close()
	if err != nil {
		ours.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { ours.(*net.UnixConn).CloseWrite() }) //nolint:errcheck // the process may have ended
	line, readErr := bufio.NewReader(ours).ReadString('\n')
	if line == MountedLine {
		mounted()
		io.Copy(io.Discard, ours) //nolint:errcheck // to its end
	}
	stop()
	ours.Close()
	err = p.Wait()
	Detach(s.Dir) //nolint:errcheck // it has done so itself, if it was not killed
	switch {
	case line == MountedLine || ctx.Err() != nil:
		return nil
	case line != "":
		return errors.New(strings.TrimSpace(line))
	}
	return errors.Join(fmt.Errorf("wsl2-files: %w", readErr), err)
}

// prepare makes the directory, and frees it of what is left of an earlier mount.
func prepare(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil {
		return nil
	}
	Detach(dir) //nolint:errcheck // the next line tells
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w; unmount it: umount %s", err, dir)
	}
	return os.Mkdir(dir, 0o700)
}

// Detach takes a mount away, at once, whoever still uses it.
func Detach(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	path, err := fusermount()
	if err != nil {
		return err
	}
	return exec.Command(path, "-u", "-z", "-q", dir).Run()
}

// Clean takes away the mounts that processes left which were killed, in the directory of all.
func Clean(parent string) {
	entries, _ := os.ReadDir(parent) // there is none, mostly
	for _, e := range entries {
		dir := filepath.Join(parent, e.Name())
		if os.Remove(dir) != nil {
			Detach(dir)    //nolint:errcheck // Remove tells
			os.Remove(dir) //nolint:errcheck // prepare tells who wants to mount there
		}
	}
}

func (s Spec) args() []string {
	return []string{s.VsockPath, strconv.FormatUint(uint64(s.Port), 10), s.Distro, s.User, s.Dir}
}

// Parse reads the arguments behind "mount".
func Parse(args []string) (Spec, error) {
	if len(args) != 5 {
		return Spec{}, errors.New("`wsl2-files mount` is run by the service of wsl2, not by hand; see `wsl2 --fs-path`")
	}
	port, err := strconv.ParseUint(args[1], 10, 32)
	return Spec{VsockPath: args[0], Port: uint32(port), Distro: args[2], User: args[3], Dir: args[4]}, err
}
