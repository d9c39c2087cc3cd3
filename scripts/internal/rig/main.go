// Command rig runs one program inside a stock Debian host that has a real
// /dev/kvm, on any machine: QEMU's TCG emulates AMD SVM, and Debian's own cloud
// kernel with its kvm-amd runs on that. `scripts/rig` builds and starts it.
//
// The program's stdout and stderr come out live and apart, through
// virtio-serial ports; its exit status becomes rig's own. It is meant for
// `go test -exec "scripts/rig --"`, and with --icount for benchmarks that
// count instructions.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Exit statuses of rig itself: those of timeout(1), env(1) and docker run.
const (
	exitTimeout  = 124
	exitRig      = 125
	exitNotRun   = 126
	exitNotFound = 127
)

// Fixed places inside the rig.
const (
	kernelPath    = "/rig/vmlinux"
	initramfsPath = "/rig/initramfs.cpio"
	defaultPath   = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/rig/bin"
)

// config is the command line.
type config struct {
	root     string // the repository
	files    []string
	bins     []string
	gets     []string
	env      []string
	modules  []string
	rootfs   string
	cwd      string
	memory   int // MiB
	cpus     int
	disk     int64 // bytes, 0 is none
	timeout  time.Duration
	icount   bool
	console  bool
	noStdin  bool
	update   bool
	qemu     string
	qemuArgs []string
	append   string
	args     []string
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

const usage = `usage: scripts/rig [OPTIONS] -- CMD [ARGS...]

Runs CMD as root inside a Debian host with a real /dev/kvm (QEMU TCG with SVM).
CMD is a file of this machine (copied in at its own path, with its libraries
and interpreter when it is dynamic) or, if there is none, a name inside the rig.
It starts in the same directory as here, with a copy of ./testdata when there is one.
exit status: CMD's; 128+N signal N; 124 timeout; 125 the rig failed; 126/127 CMD could not be run/found

  --file SRC[:DST]   copy a file or directory in (repeatable; DST: SRC's own absolute path)
  --bin SRC[:DST]    copy an executable in with its libraries (DST: /rig/bin/NAME)
  --rootfs TAR|DIR   a user land to start from (a tar, not compressed, or a directory)
  --get PATH[:HOST]  bring a file or directory back (HOST: the same path; repeatable)
  --env K=V          set a variable (WSL2_*, GODEBUG and GOTRACEBACK are passed by themselves)
  --cwd DIR          working directory of CMD inside the rig
  --module NAME      load one more kernel module, with what it depends on
  --memory MIB       memory of the rig (2048)
  --cpus N           its CPUs (2; with --icount 1)
  --disk SIZE        a scratch disk, ext4 at /scratch (such as 4G; sparse, removed at the end)
  --timeout D        end CMD after this time: SIGQUIT first, for Go's stacks (10m; 0: never)
  --icount           count instructions: 1 executed instruction is 1 virtual nanosecond
  --console          show the rig's kernel messages on stderr
  --no-stdin         CMD reads /dev/null (always so with --icount)
  --append WORDS     more words for the rig's kernel command line
  --qemu-arg ARG     one more argument for QEMU (repeatable)
  --update           fetch the newest Debian kernel instead of the cached one

In the rig: out/vmlinux (or $WSL2_KERNEL) is /rig/vmlinux, out/initramfs.cpio (or
$WSL2_INITRAMFS) is /rig/initramfs.cpio, and these variables name them there.
Guests need the words of $WSL2_RIG_CMDLINE on their kernels' command lines, or one
now and then sleeps for ever: QEMU's SVM forgets the interrupt shadow of STI.
`

func parse(argv []string) (*config, error) {
	c := &config{}
	fl := flag.NewFlagSet("rig", flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	fl.StringVar(&c.root, "repository", "", "")
	fl.Var((*list)(&c.files), "file", "")
	fl.Var((*list)(&c.bins), "bin", "")
	fl.Var((*list)(&c.gets), "get", "")
	fl.Var((*list)(&c.env), "env", "")
	fl.Var((*list)(&c.modules), "module", "")
	fl.StringVar(&c.rootfs, "rootfs", "", "")
	fl.StringVar(&c.cwd, "cwd", "", "")
	fl.IntVar(&c.memory, "memory", 2048, "")
	fl.IntVar(&c.cpus, "cpus", 0, "")
	disk := fl.String("disk", "", "")
	fl.DurationVar(&c.timeout, "timeout", 10*time.Minute, "")
	fl.BoolVar(&c.icount, "icount", false, "")
	fl.BoolVar(&c.console, "console", false, "")
	fl.BoolVar(&c.noStdin, "no-stdin", false, "")
	fl.BoolVar(&c.update, "update", false, "")
	fl.StringVar(&c.qemu, "qemu", "qemu-system-x86_64", "")
	fl.Var((*list)(&c.qemuArgs), "qemu-arg", "")
	fl.StringVar(&c.append, "append", "", "")
	if err := fl.Parse(argv); err != nil {
		return nil, err
	}
	c.args = fl.Args()
	if len(c.args) == 0 {
		return nil, errors.New("no command given")
	}
	if c.root == "" {
		return nil, errors.New("start it as scripts/rig")
	}
	if c.cpus == 0 {
		c.cpus = 2
		if c.icount {
			c.cpus = 1
		}
	}
	if c.cpus < 0 || c.cpus > 64 {
		return nil, fmt.Errorf("--cpus %d: 1 to 64", c.cpus)
	}
	if c.memory < 256 {
		return nil, fmt.Errorf("--memory %d: the rig's own kernel wants at least 256 MiB", c.memory)
	}
	if *disk != "" {
		n, err := size(*disk)
		if err != nil {
			return nil, err
		}
		c.disk = n
	}
	if c.icount {
		c.noStdin = true // input from outside has no repeatable time
	}
	for _, kv := range c.env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" {
			return nil, fmt.Errorf("--env %s: want NAME=VALUE", kv)
		}
	}
	return c, nil
}

func size(s string) (int64, error) {
	shift := map[byte]uint{'K': 10, 'M': 20, 'G': 30, 'T': 40}[s[len(s)-1]&^0x20]
	digits := s
	if shift != 0 {
		digits = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(digits, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("--disk %s: want a size such as 512M or 4G", s)
	}
	return n << shift, nil
}

func main() {
	c, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(usage)
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "rig:", err, "(scripts/rig --help)")
		os.Exit(2)
	}
	code, err := run(c)
	if err != nil {
		fmt.Fprintln(os.Stderr, "rig:", err)
	}
	os.Exit(code)
}

func run(c *config) (int, error) {
	ctx := context.Background()
	host, err := hostKernel(ctx, c.root, c.update)
	if err != nil {
		return exitRig, err
	}
	m, err := prepare(c, host)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return exitNotFound, err
		}
		return exitRig, err
	}
	defer m.close()

	var deadline <-chan time.Time
	if c.timeout > 0 {
		t := time.NewTimer(c.timeout)
		defer t.Stop()
		deadline = t.C
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	return m.run(deadline, signals)
}

// split parts "SRC[:DST]"; SRC becomes absolute, DST defaults to dst(SRC).
func split(arg string, dst func(string) string) (string, string, error) {
	src, to, ok := strings.Cut(arg, ":")
	src, err := filepath.Abs(src)
	if err != nil {
		return "", "", err
	}
	if !ok {
		to = dst(src)
	}
	if !filepath.IsAbs(to) {
		return "", "", fmt.Errorf("%s: the path inside the rig must be absolute", arg)
	}
	return src, filepath.Clean(to), nil
}
