package pid1

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
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
	var last map[wire.Port]bool
	tell := func(list []listeners.Listener) {
		now := v.ports(list)
		if maps.Equal(now, last) {
			return
		}
		last = now
		v.send(&wire.PortsOpen{Ports: firstPorts(now)})
	}
	w, err := listeners.New(cgroupRoot, v.watched)
	if err == nil {
		err = w.Run(tell)
		w.Close()
	}
	v.log.Printf("no events of listening sockets (%v); asking for them every second", err)
	if err := listeners.Poll(context.Background(), v.watched, tell); err != nil {
		v.log.Errorf("ports of distros do not appear on the host: %v", err)
	}
}

// firstPorts is as much of a list as a message holds. Of too many it is the same ones each time: the host would open
// and close others at every change.
func firstPorts(all map[wire.Port]bool) []wire.Port {
	list := slices.SortedFunc(maps.Keys(all), func(a, b wire.Port) int {
		order := cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Distro, b.Distro))
		if order == 0 && a.UDP != b.UDP {
			order = 1
			if b.UDP {
				order = -1
			}
		}
		return order
	})
	return list[:min(len(list), wire.MaxPorts)]
}

// ports are the listeners by distro, those of the VM itself left out. Two sockets on one
// port, for IPv4 and for IPv6 say, are one.
func (v *vm) ports(list []listeners.Listener) map[wire.Port]bool {
	owners := map[uint64]string{}
	merged := map[wire.Port]wire.Port{}
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
		p, ok := merged[key]
		if !ok {
			p = key
		}
		p.V4, p.V6 = p.V4 || l.V4, p.V6 || l.V6
		merged[key] = p
	}
	all := make(map[wire.Port]bool, len(merged))
	for _, p := range merged {
		all[p] = true
	}
	return all
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
