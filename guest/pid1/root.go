package pid1

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	m "github.com/wsl2/wsl2/guest/mounts"
)

// base is the VM's own root. Distros do not see it; they make their own.
var base = []m.Item{
	m.Mount{FSType: "devtmpfs", Target: "/dev", Flags: unix.MS_NOSUID, Data: "mode=755", Why: "disks, /dev/port, /dev/kmsg"},
	m.Mount{FSType: "proc", Target: "/proc", Flags: m.NoSuidDevExec, Why: "/proc/self/exe starts the distros' inits"},
	m.Mount{FSType: "sysfs", Target: "/sys", Flags: m.NoSuidDevExec, Why: "disk slots, cgroups' mount point"},
}

// forDistros is made when the first distro starts. Each controller by itself:
// one that the kernel lacks must not cost the others.
var forDistros = []m.Item{
	m.Mount{FSType: "cgroup2", Target: cgroupRoot, Flags: m.NoSuidDevExec, Data: "nsdelegate", Why: "a subtree for each distro"},
	m.Value{Path: cgroupRoot + "/cgroup.subtree_control", Value: "+cpu", Why: "limits of containers in distros"},
	m.Value{Path: cgroupRoot + "/cgroup.subtree_control", Value: "+memory"},
	m.Value{Path: cgroupRoot + "/cgroup.subtree_control", Value: "+io"},
	m.Value{Path: cgroupRoot + "/cgroup.subtree_control", Value: "+pids"},
	m.Mount{FSType: "tmpfs", Target: distro.Shared, Flags: unix.MS_NOSUID, Data: "mode=1777", Why: "what distros share; with device nodes, for disks that are attached bare"},
	m.Dir{Path: distro.SharedDev, Mode: 0o755},
	m.Mount{FSType: "none", Target: distro.Shared, Flags: unix.MS_SHARED, Why: "mounts below it are seen by all"},
	m.Value{Path: "/proc/sys/kernel/dmesg_restrict", Value: "0", Why: "dmesg for users, as in WSL"},
	m.Value{Path: "/proc/sys/fs/inotify/max_user_watches", Value: "524288", Why: "editors watch whole trees"},
	m.Mount{FSType: "binfmt_misc", Target: binfmtMisc, Flags: m.NoSuidDevExec, Why: "programs of other systems; it holds in every distro"},
}

const binfmtMisc = "/proc/sys/fs/binfmt_misc"

// registerMZ makes Windows programs the host's to run. systemd-binfmt of a distro that
// stops forgets the formats of all of them, hence it is done again then.
func registerMZ() error {
	err := m.Value{Path: binfmtMisc + "/register", Value: distro.BinfmtMZ}.Make()
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
