// Command guest is the /init of the test guests: PID 1 of a VM that does what
// the test on the host asks for, by the kernel command line or over vsock.
//
// On the command line, vmmtest=ACTION is carried out at once: poweroff, reboot,
// panic or hang. Without it guest listens on vsock port Port. Each connection
// carries one line, a command with its arguments, and then what the command
// says below; errors are answered by a line that begins with "error: ".
package main

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Port is where the guest listens.
const Port = 1024

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
		panicKernel()
	}
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, w := range strings.Fields(string(cmdline)) {
		if action, ok := strings.CutPrefix(w, "vmmtest="); ok {
			fmt.Println("guest: " + action)
			return command(action, nil, nil)
		}
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, Port, nil)
	if err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	fmt.Println("guest: ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer c.Close()
			if err := serve(c); err != nil {
				fmt.Fprintf(c, "error: %v\n", err)
			}
		}()
	}
}

func serve(c io.ReadWriter) error {
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return fmt.Errorf("empty command")
	}
	return command(words[0], words[1:], struct {
		io.Reader
		io.Writer
	}{r, c})
}

func command(name string, args []string, c io.ReadWriter) error {
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	num := func(i int) int64 {
		n, err := strconv.ParseInt(arg(i), 0, 64)
		if err != nil {
			return -1
		}
		return n
	}
	switch name {
	case "poweroff":
		return powerOff()
	case "reboot":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		panicKernel()
		return nil
	case "hang":
		for {
			_ = unix.Pause() // select{} alone would be a deadlock to the runtime
		}
	case "cpus": // answers the number of online CPUs
		fmt.Fprintf(c, "%d\n", runtime.NumCPU())
		return nil
	case "cat": // FILE: answers its bytes
		b, err := os.ReadFile(arg(0))
		if err != nil {
			return err
		}
		_, err = c.Write(b)
		return err
	case "echo": // echoes until end of file
		_, err := io.Copy(c, c)
		return err
	case "size": // DISK SECTORS: answers "ok" if the disk has that size
		if err := expectSize(arg(0), arg(1)); err != nil {
			return err
		}
		fmt.Fprintln(c, "ok")
		return nil
	case "write": // DISK OFFSET HEX: writes and syncs, answers "ok"
		b, err := hex.DecodeString(arg(2))
		if err != nil {
			return err
		}
		f, err := os.OpenFile("/dev/"+arg(0), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteAt(b, num(1)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		fmt.Fprintln(c, "ok")
		return nil
	case "read": // DISK OFFSET LENGTH: answers hex
		f, err := os.Open("/dev/" + arg(0))
		if err != nil {
			return err
		}
		defer f.Close()
		b := make([]byte, num(2))
		if _, err := f.ReadAt(b, num(1)); err != nil {
			return err
		}
		fmt.Fprintf(c, "%x\n", b)
		return nil
	case "code": // DISK N: loads pages 0..N-1 of the disk to one place in turn and calls it; answers what each returned
		results, err := runCode("/dev/"+arg(0), int(num(1)))
		if err != nil {
			return err
		}
		fmt.Fprintln(c, results)
		return nil
	}
	return fmt.Errorf("unknown command %q", name)
}

// powerOff writes StatusPowerOff to ExitPort (package engine).
func powerOff() error {
	unix.Sync()
	f, err := os.OpenFile("/dev/port", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{0}, 0xf4)
	return fmt.Errorf("still running after power-off (%v)", err)
}

func panicKernel() {
	os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	os.Exit(1) // the end of PID 1 is a panic, too
}

// expectSize checks a disk's size. The kernel learns of a new one by a work item
// of which nobody is told when the old or the new size is 0; if that has not run
// yet the driver is bound anew, which reads the size at once.
func expectSize(disk, sectors string) error {
	size := func() (string, error) {
		b, err := os.ReadFile("/sys/class/block/" + disk + "/size")
		return strings.TrimSpace(string(b)), err
	}
	got, err := size()
	if err != nil || got == sectors {
		return err
	}
	dev, err := os.Readlink("/sys/class/block/" + disk + "/device")
	if err != nil {
		return err
	}
	for _, step := range []string{"unbind", "bind"} {
		if err := os.WriteFile("/sys/bus/virtio/drivers/virtio_blk/"+step, []byte(filepath.Base(dev)), 0); err != nil {
			return err
		}
	}
	if got, err = size(); err == nil && got != sectors {
		err = fmt.Errorf("%s has %s sectors", disk, got)
	}
	return err
}

// runCode reads each page of machine code from the disk straight into the same
// page of memory, without a copy by the CPU, and calls it.
func runCode(disk string, n int) ([]uint32, error) {
	fd, err := unix.Open(disk, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(page)
	entry := unsafe.Pointer(unsafe.SliceData(page))
	closure := &entry
	f := *(*func() uint32)(unsafe.Pointer(&closure))
	var results []uint32
	for i := range n {
		if _, err := unix.Pread(fd, page, int64(i*len(page))); err != nil {
			return nil, err
		}
		results = append(results, f())
	}
	return results, nil
}
