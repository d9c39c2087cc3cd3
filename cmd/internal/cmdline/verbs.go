package cmdline

import (
	"math"

	"github.com/wsl2/wsl2/launcher/ports"
)

// Verbs that are processes of wsl2 itself, which it starts.
const (
	Service = "service"
	VM      = "vm"
	Forward = ports.Role
)

var jsonOption = Option{Long: "json", Help: "as JSON, for programs"}

// Verbs in the order of the help.
var Verbs = []Verb{
	{Long: "--list", Also: []string{"-l"}, Help: "list the distros", Options: []Option{
		{Long: "verbose", Short: "v", Help: "with state and version"},
		{Long: "quiet", Short: "q", Help: "names only"},
		{Long: "running", Help: "only those that run"},
		{Long: "all", Help: "those being installed, or all versions, as well"},
		{Long: "online", Short: "o", Help: "those that can be installed"},
		jsonOption,
	}},
	{Long: "--install", Args: "[NAME]", Max: 1, Help: "install NAME: of --list --online, or an image\nof a registry (docker.io/library/alpine:3.20)", Options: []Option{
		{Long: "distribution", Short: "d", Value: "NAME", Help: "as NAME"},
		{Long: "name", Value: "OWN", Help: "call it OWN"},
		{Long: "location", Short: "l", Value: "DIR", Help: "where its disk goes"},
		{Long: "from-file", Short: "f", Value: "FILE", Help: "from a .wsl or tar file, or its URL"},
		{Long: "sha256", Value: "HEX", Help: "of the file at an https URL"},
		{Long: "vhd-size", Value: "SIZE", Help: "the size of its disk (256GB)"},
		{Long: "no-launch", Short: "n", Help: "do not open its shell"},
		jsonOption,
	}},
	{Long: "--import", Args: "NAME [DIR] FILE", Min: 2, Max: 3, Help: "make a distro from FILE, a tar of its root\n(plain, gzip, bzip2, xz or zstd; - is stdin)", Options: []Option{
		{Long: "vhd", Help: "FILE is a disk image: vhdx, vhd or raw ext4"},
		{Long: "version", Value: "N", Help: "1: on the host's kernel, 2: in a VM\n(as --set-default-version says, else 2)"},
	}},
	{Long: "--import-in-place", Args: "NAME DISK", Min: 2, Max: 2, Help: "make a distro of a raw ext4 disk where it lies"},
	{Long: "--export", Args: "NAME FILE", Min: 2, Max: 2, Help: "write a distro to FILE (- is stdout)", Options: []Option{
		{Long: "format", Value: "FORMAT", Help: "tar, tar.gz, tar.xz, tar.zst, vhdx or raw\n(as FILE's name ends, else tar)"},
		{Long: "vhd", Help: "as --format vhdx"},
	}},
	{Long: "--manage", Args: "NAME", Min: 1, Max: 1, Help: "change a distro, by exactly one of:", Options: []Option{
		{Long: "move", Short: "m", Value: "DIR", Help: "take its disk to DIR"},
		{Long: "resize", Short: "r", Value: "SIZE", Help: "grow or shrink its disk to SIZE (50GB)"},
		{Long: "set-default-user", Value: "USER", Help: "who its sessions run as"},
		{Long: "compact", Help: "give free blocks of its disk back"},
		{Long: "rename", Value: "NEW", Help: "give it another name"},
		{Long: "clone", Value: "NEW", Help: "make the distro NEW as a copy of it"},
		{Long: "repair", Help: "check and repair its file system"},
		{Long: "location", Short: "l", Value: "DIR", Help: "where the clone's disk goes"},
		jsonOption,
	}},
	{Long: "--set-default", Also: []string{"-s", "--setdefault"}, Args: "NAME", Min: 1, Max: 1, Help: "make NAME the default distro"},
	{Long: "--set-version", Args: "NAME N", Min: 2, Max: 2, Help: "convert a distro to version 1, on the host's\nkernel, or 2, in a VM"},
	{Long: "--set-default-version", Args: "N", Min: 1, Max: 1, Help: "the version of new distros: 1 or 2"},
	{Long: "--terminate", Also: []string{"-t"}, Args: "NAME", Min: 1, Max: 1, Help: "stop a distro and all that runs in it"},
	{Long: "--unregister", Args: "NAME", Min: 1, Max: 1, Help: "delete a distro and its disk (asks first)", Options: []Option{
		{Long: "yes", Short: "y", Help: "do not ask"},
	}},
	{Long: "--shutdown", Help: "stop all distros and the VM", Options: []Option{
		{Long: "force", Short: "f", Help: "at once, without asking the guest"},
	}},
	{Long: "--mount", Args: "DISK", Min: 1, Max: 1, Help: "mount a disk of the host, a device or a file, at\n/mnt/wsl/NAME of all distros", Options: []Option{
		{Long: "bare", Short: "b", Help: "attach it, but do not mount it"},
		{Long: "name", Short: "n", Value: "NAME", Help: "instead of one made of DISK's path"},
		{Long: "type", Short: "t", Value: "TYPE", Help: "its file system (found by itself)"},
		{Long: "options", Short: "o", Value: "OPTIONS", Help: "as of mount(8)"},
		{Long: "partition", Short: "p", Value: "N", Help: "of the disk, instead of all of it"},
		{Long: "vhd", Help: "DISK is a file (seen by itself)"},
		jsonOption,
	}},
	{Long: "--unmount", Args: "[DISK]", Max: 1, Help: "unmount and detach a disk, or all that --mount\nattached"},
	{Long: "--status", Help: "what runs, and how", Options: []Option{jsonOption}},
	{Long: "--update", Help: "how to bring wsl2 up to date"},
	{Long: "--uninstall", Help: "delete all distros and what wsl2 keeps\n(asks first)", Options: []Option{
		{Long: "yes", Short: "y", Help: "do not ask"},
	}},
	{Long: "--fs-path", Args: "NAME[:PATH]", Min: 1, Max: 1, Help: "mount a distro's files on this host, and print\nwhere they, or PATH, are"},
	{Long: "ps", Args: "[NAME]", Max: 1, Help: "the processes of distros of version 1, by their\nnumbers on the host and in the distro", Options: []Option{jsonOption}},
	{Long: "cp", Args: "SRC... DST", Min: 2, Max: math.MaxInt, Help: "copy files and directories to, from and\nbetween distros: debian:/etc/hosts .", Options: []Option{
		{Long: "user", Short: "u", Value: "USER", Help: "with the rights of USER in the distros"},
		{Long: "archive", Short: "a", Help: "keep owners, set-id bits and devices (-u root)"},
	}},
	{Long: "doctor", Help: "check what wsl2 needs on this host", Options: []Option{
		{Long: "kvm", Help: "only whether KVM is usable, as exit status"},
		jsonOption,
	}},
	{Long: "ports", Help: "list the ports of distros that the host has, and\nwhere", Options: []Option{
		{Long: "publish", Short: "p", Value: "RULE", Help: "a port on all of the host's addresses:\nDISTRO:PORT[:HOSTPORT][/udp]"},
		{Long: "address", Value: "ADDR", Help: "on this one only"},
		{Long: "allow", Value: "CIDRS", Help: "for these peers only (192.168.1.0/24,...)"},
		{Long: "unpublish", Short: "u", Value: "RULE", Help: "take that back"},
		{Long: "follow", Short: "f", Help: "list anew at every change"},
		jsonOption,
	}},
	{Long: "ssh-config", Help: "print lines for ~/.ssh/config, by which ssh,\nscp, rsync and editors reach NAME.wsl2"},
	{Long: "ssh-proxy", Args: "NAME", Min: 1, Max: 1, Help: "speak SSH for a distro on stdin and stdout"},
	{Long: "completion", Args: "bash|zsh|fish", Min: 1, Max: 1, Help: "print a completion script for a shell"},
	{Long: "man", Help: "show the manual page, wsl2(1)", Options: []Option{
		{Long: "install", Help: "put it where man(1) finds it"},
	}},
	{Long: "--version", Also: []string{"-v"}, Help: "print the version", Options: []Option{jsonOption}},
	{Long: "--help", Also: []string{"-h"}, Help: "print this help"},
	{Long: "tools", Hidden: true},
	{Long: Service, Hidden: true},
	{Long: VM, Hidden: true},
	{Long: Forward, Hidden: true},
}
