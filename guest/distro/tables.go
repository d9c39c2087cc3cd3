package distro

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"

	m "github.com/wsl2/wsl2/guest/mounts"
	"github.com/wsl2/wsl2/guest/session"
	"github.com/wsl2/wsl2/guest/tools"
)

// outer are the mounts of the VM's own root that a distro's namespace inherits
// and must not keep, deepest first.
var outer = []string{Shared, "/sys/fs/cgroup", "/sys", "/proc", "/dev"}

// root is what a distro's programs expect to find, made inside its root. /dev is
// a tmpfs and not the VM's devtmpfs: that one holds every distro's disk, and what one
// distro does to it would happen to all. /tmp stays on the disk: where
// it lives is the distro's own decision.
var root = slices.Concat([]m.Item{
	m.Mount{FSType: "proc", Target: "/proc", Flags: m.NoSuidDevExec, Why: "its own pid namespace"},
	m.Mount{FSType: "sysfs", Target: "/sys", Flags: m.NoSuidDevExec, Why: "udev, docker, lscpu"},
	m.Mount{FSType: "cgroup2", Target: "/sys/fs/cgroup", Flags: m.NoSuidDevExec, Data: "nsdelegate", Optional: true, Why: "the distro's subtree, delegated"},
	m.Mount{FSType: "binfmt_misc", Target: "/proc/sys/fs/binfmt_misc", Flags: m.NoSuidDevExec, Optional: true, Why: "programs for other systems, qemu-user"},
}, ownFileSystems, directories, nodes, links)

// ownFileSystems are new with each start of a distro.
var ownFileSystems = []m.Item{
	m.Mount{FSType: "tmpfs", Target: "/dev", Flags: unix.MS_NOSUID, Data: "mode=755,size=1m", Why: "nodes of its own"},
	m.Mount{FSType: "devpts", Target: "/dev/pts", Flags: unix.MS_NOSUID | unix.MS_NOEXEC, Data: "newinstance,ptmxmode=0666,mode=620,gid=5", Why: "terminals of its own; gid 5 is tty"},
	m.Mount{FSType: "tmpfs", Target: "/dev/shm", Flags: m.NoSuidDev, Data: "mode=1777", Why: "shm_open(3)"},
	m.Mount{FSType: "mqueue", Target: "/dev/mqueue", Flags: m.NoSuidDevExec, Optional: true, Why: "its own ipc namespace"},
	m.Mount{FSType: "tmpfs", Target: "/run", Flags: m.NoSuidDev, Data: "mode=755", Why: "hier(7): empty at each start"},
}

var directories = []m.Item{
	m.Dir{Path: "/run/lock", Mode: 0o1777, Why: "/var/lock points here"},
	m.Dir{Path: "/run/user", Mode: 0o755, Why: "XDG_RUNTIME_DIR"},
	m.Dir{Path: "/run/wsl2", Mode: 0o755, Why: "what the VM tells its distros"},
	m.Dir{Path: "/run/wsl2/bin", Mode: 0o755},
	m.Dir{Path: "/tmp", Mode: 0o1777, Why: "some images lack it"},
}

var nodes = []m.Item{
	m.Node{Path: "/dev/null", Mode: 0o666, Major: 1, Minor: 3},
	m.Node{Path: "/dev/zero", Mode: 0o666, Major: 1, Minor: 5},
	m.Node{Path: "/dev/full", Mode: 0o666, Major: 1, Minor: 7},
	m.Node{Path: "/dev/random", Mode: 0o666, Major: 1, Minor: 8},
	m.Node{Path: "/dev/urandom", Mode: 0o666, Major: 1, Minor: 9},
	m.Node{Path: "/dev/kmsg", Mode: 0o644, Major: 1, Minor: 11, Why: "dmesg, journald"},
	m.Node{Path: "/dev/tty", Mode: 0o666, Major: 5, Minor: 0},
	m.Node{Path: "/dev/fuse", Mode: 0o666, Major: 10, Minor: 229, Why: "sshfs, AppImage"},
	m.Node{Path: "/dev/net/tun", Mode: 0o666, Major: 10, Minor: 200, Why: "VPNs"},
	m.Node{Path: "/dev/loop-control", Mode: 0o660, Major: 10, Minor: 237, Why: "mount -o loop"},
}

var links = []m.Item{
	m.Link{Path: session.Browser, To: tools.Init, Why: "$BROWSER: pages open on the host"},
	m.Link{Path: "/dev/ptmx", To: "pts/ptmx", Why: "the instance above"},
	m.Link{Path: "/dev/fd", To: "/proc/self/fd"},
	m.Link{Path: "/dev/stdin", To: "/proc/self/fd/0"},
	m.Link{Path: "/dev/stdout", To: "/proc/self/fd/1"},
	m.Link{Path: "/dev/stderr", To: "/proc/self/fd/2"},
}

const noSuidDevExec = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// In a root of version 1, whose kernel is the host's, the same is made of what is taken while the host's root is
// there, and placed when it is not: whatever the distro has for links in the place of these directories, they
// lead to nothing but the distro's.
var (
	hostProc  = m.Mount{FSType: "proc", Target: "/proc", Why: "its own pid namespace"}
	lockedSys = m.Bind{From: "/sys", Target: "/sys", Dir: true, Why: "package native has made it"}
	hostNodes = []m.Bind{node("null"), node("zero"), node("full"), node("random"), node("urandom"), node("tty"), node("fuse"), node("net/tun")}
)

// dirRoot is what comes between /sys and the nodes.
var dirRoot = slices.Concat(ownFileSystems, directories)

// dirLast is what is made when all else is there.
var dirLast = slices.Concat([]m.Item{hidden("latency_stats"), hidden("sched_debug"), hidden("timer_list")}, links)

// node is a device of the host's: nobody makes one in a user namespace.
func node(name string) m.Bind {
	return m.Bind{From: "/dev/" + name, Target: "/dev/" + name, Attributes: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC, Optional: true, Why: "as in root"}
}

// hidden is a file of /proc that tells of the host. It is covered only where every user may read it, which no
// kernel since 5.13 lets them: with something covered nobody could mount a proc of his own in a user namespace of
// his (unshare --mount-proc, bubblewrap, podman). What is left, such as kcore, is for the host's root.
type hidden string

func (h hidden) path() string { return "/proc/" + string(h) }

// Make covers it.
func (h hidden) Make() error {
	if st, err := os.Stat(h.path()); err != nil || st.Mode().Perm()&0o004 == 0 {
		return nil // there is no such file
	}
	return m.Bind{From: "/dev/null", Target: h.path(), Attributes: unix.MOUNT_ATTR_RDONLY}.Make()
}

func (h hidden) String() string { return "cover " + h.path() }

// limits are the sessions' resource limits where the kernel's defaults are too
// small for development work (WSL has the same).
var limits = []struct {
	resource int
	rlimit   unix.Rlimit
	why      string
}{
	{unix.RLIMIT_NOFILE, unix.Rlimit{Cur: 10240, Max: 1 << 20}, "watchers, databases, browsers"},
	{unix.RLIMIT_MEMLOCK, unix.Rlimit{Cur: 64 << 20, Max: 64 << 20}, "io_uring, bpf"},
}
