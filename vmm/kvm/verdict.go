package kvm

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ProbeOnce is Probe, but a KVM that path says has passed is only opened: what
// Probe finds does not change while the host runs, and making and freeing the
// probe's VM costs as much as a sixth of a boot. It writes path when KVM passes;
// failures are found anew each time. The file belongs in a directory that other
// users cannot write to.
func ProbeOnce(ctx context.Context, path string) error {
	sys, err := Open()
	if err != nil {
		return err
	}
	mark, err := sys.mark()
	sys.Close()
	if err != nil {
		return err
	}
	if passed, err := os.ReadFile(path); err == nil && string(passed) == mark {
		return nil
	}
	if err := Probe(ctx); err != nil {
		return err
	}
	// Without the file the next start probes again. One that is written in part
	// does not match.
	_ = os.WriteFile(path, []byte(mark), 0o600)
	return nil
}

// mark tells this KVM from any other: the host's boot, the device's inode, which
// is another once the module was loaded anew, and the code that judges it.
func (s *System) mark() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("kvm: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return "", &os.PathError{Op: "kvm: stat", Path: Device, Err: err}
	}
	return fmt.Sprintf("%s %d.%d.%d.%d %x\n", strings.TrimSpace(string(boot)), st.Dev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec, crc32.ChecksumIEEE(probeCode[:])), nil
}

// Forget makes the next ProbeOnce of path probe: a KVM that has failed a guest is
// judged again.
func Forget(path string) { _ = os.Remove(path) }
