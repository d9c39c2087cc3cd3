// Package importer fills a fresh disk from an archive, in a process of its own
// (package diskjob) whose root is that disk.
package importer

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/diskjob"
	"github.com/wsl2/wsl2/guest/kmsg"
	"github.com/wsl2/wsl2/guest/untar"
	"github.com/wsl2/wsl2/internal/wire"
)

// Argv0 is the name under which /init imports.
const Argv0 = "wsl2-import"

// Run is the main function of an import. It returns the exit status.
func Run(args []string) int {
	return diskjob.Run(args, func(m *wire.Import) uint32 { return m.ID }, run)
}

// run mounts, receives, unpacks, checks and unmounts.
func run(j *diskjob.Job, m *wire.Import) (string, error) {
	dir, err := diskjob.Mount(m.Slot, 0)
	if err != nil {
		return "", err
	}
	if m.Slot == wire.DirSlot { // whoever made it is none of the distro's users
		if err := unix.Fchownat(unix.AT_FDCWD, dir, 0, 0, 0); err != nil {
			return "", fmt.Errorf("take over the root: %w", err)
		}
	}
	if err := checkEmpty(dir); err != nil {
		return "", err
	}
	c, err := j.Accept(m.ID, m.Archive)
	if err != nil {
		return "", err
	}
	err = unpack(c, dir, j.Log)
	// Before the Reply: a launcher blocked in writing wakes up.
	c.Close()
	if err != nil {
		return "", err
	}
	if err := untar.CheckRoot("/"); err != nil {
		return "", err
	}
	conf := distributionConf("/")
	return conf, diskjob.Finish("/")
}

// maxConf is what fits a Reply's text.
const maxConf = 4 << 10

// distributionConf returns the root's /etc/wsl-distribution.conf, by which a distro
// says how it wants to be installed; "" if there is none that makes sense.
func distributionConf(root string) string {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	f, err := unix.Openat2(fd, "etc/wsl-distribution.conf", &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return ""
	}
	defer unix.Close(f)
	var st unix.Stat_t
	if unix.Fstat(f, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxConf {
		return ""
	}
	b := make([]byte, maxConf)
	n, err := unix.Read(f, b)
	if err != nil || n < 0 {
		return ""
	}
	// What is no text is not carried.
	return strings.ReplaceAll(string(b[:n]), "\r\n", "\n")
}

// checkEmpty: the disk of a distro must not be unpacked over.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return diskjob.DiskError{Err: err}
	}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			return fmt.Errorf("%w: the disk is not empty; an import needs a fresh one (it holds /%s)", diskjob.ErrRefused, e.Name())
		}
	}
	return nil
}

// unpack confines the process to the disk mounted on dir and unpacks there.
func unpack(c io.Reader, dir string, log *kmsg.Logger) error {
	if err := diskjob.Enter(dir); err != nil {
		return err
	}
	const logged = 10
	n := 0
	err := untar.Unpack(context.Background(), "/", c, func(name, what string) {
		if n++; n <= logged {
			log.Printf("%s: %s is not supported here and was left out", name, what)
		}
	})
	if n > logged {
		log.Printf("%d attributes or devices were left out in all", n)
	}
	return err
}
