package pid1

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/listeners"
	"github.com/wsl2/wsl2/internal/wire"
)

// watchPorts tells the host which ports distros serve, until the VM ends. The host asks for it
// when the first session runs: what it loads is on nobody's way then.
func (v *vm) watchPorts() {
	defer func() {
		if p := recover(); p != nil {
			v.log.Errorf("BUG: the watch of ports panicked: %v: %s", p, debug.Stack())
		}
	}()
	v.setUp()
	var last []wire.Port
	tell := func(list []listeners.Listener) {
		if now := v.ports(list); !slices.Equal(now, last) {
			last = now
			v.send(&wire.PortsOpen{Ports: now})
		}
	}
	w, err := listeners.New(cgroupRoot)
	if err == nil {
		err = w.Run(tell)
		w.Close()
	}
	v.log.Printf("no events of listening sockets (%v); asking for them every second", err)
	if err := listeners.Poll(context.Background(), tell); err != nil {
		v.log.Errorf("ports of distros do not appear on the host: %v", err)
	}
}

// ports are the listeners by distro, those of the VM itself left out. Two sockets on one
// port, for IPv4 and for IPv6 say, are one.
func (v *vm) ports(list []listeners.Listener) []wire.Port {
	owners := map[uint64]string{}
	merged := map[wire.Port]*wire.Port{}
	for _, l := range list {
		name, ok := owners[l.Cgroup]
		if !ok {
			var err error
			if name, err = v.ownerOf(l.Cgroup); err != nil {
				v.log.Printf("port %d: %v", l.Port, err)
			}
			owners[l.Cgroup] = name
		}
		if name == "" {
			continue
		}
		key := wire.Port{Distro: name, UDP: l.UDP, Number: l.Port}
		if merged[key] == nil {
			merged[key] = &wire.Port{Distro: name, UDP: l.UDP, Number: l.Port}
		}
		merged[key].V4 = merged[key].V4 || l.V4
		merged[key].V6 = merged[key].V6 || l.V6
	}
	all := make([]wire.Port, 0, len(merged))
	for _, p := range merged {
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b wire.Port) int {
		udp := func(p wire.Port) int {
			if p.UDP {
				return 1
			}
			return 0
		}
		return cmp.Or(cmp.Compare(a.Distro, b.Distro), cmp.Compare(a.Number, b.Number), cmp.Compare(udp(a), udp(b)))
	})
	return all[:min(len(all), wire.MaxPorts)]
}

// fileIDKernfs is the type of handles of cgroups (linux/exportfs.h, FILEID_KERNFS): their ID.
const fileIDKernfs = 0xfe

// ownerOf is the distro in whose cgroup, or in one below it, a socket was made; "" if in none.
func (v *vm) ownerOf(id uint64) (string, error) {
	root, err := unix.Open(cgroupRoot, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", cgroupRoot, err)
	}
	defer unix.Close(root)
	handle := unix.NewFileHandle(fileIDKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(root, handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("its cgroup %d is gone: %w", id, err)
	}
	defer unix.Close(fd)
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	rest, _ := strings.CutPrefix(path, cgroupRoot+"/")
	top, _, _ := strings.Cut(rest, "/")
	v.mu.Lock()
	defer v.mu.Unlock()
	for name, d := range v.distros {
		if filepath.Base(d.cgroup) == top {
			return name, nil
		}
	}
	return "", nil
}
