// Package nsinit is what launcher and guest agree on for a distro of version 1: how /init is
// started in namespaces of the host's own kernel, where a VM's PID 1 would start it.
//
// The launcher starts Argv0 with the arguments ROLE ROOT NAME [SHARE...] in a user and a mount namespace, without
// mappings and with every capability there, and with the descriptors below. It writes the mappings and then one byte
// to the gate, whose end without one means that there will be none. /init becomes the namespace's root, makes the mounts
// that the distro's root must not change, and starts itself once more as the role, in all its namespaces: a second user
// namespace with the same users, and a copy of the mounts, which are locked there because they come from a more privileged one
// (mount_namespaces(7)). A Reply on the gate says how that went, and which process of the host the role is: a child of the
// launcher's. For the role the messages of internal/wire on the channel are the same as in a VM.
package nsinit

// Argv0 is the name under which /init enters its namespaces.
const Argv0 = "wsl2-native"

// Roles.
const (
	Distro = "distro"
	Import = "import"
	Export = "export"
	Remove = "remove"
	// RemoveCgroup is that of a process that ends in the outer namespaces: ROLE CGROUP are its arguments, and a gate its only
	// descriptor. It deletes the cgroups that a distro's users have made.
	RemoveCgroup = "remove-cgroup"
)

// Descriptors. Lock is held open for the life of the process: whoever finds it free (flock) may
// use the root.
const (
	ChannelFD = 3 + iota
	ListenerFD
	GateFD
	LockFD
	// FirstFree is the first one that nothing is said about.
	FirstFree
)

// ReadOnly begins a SHARE that is to be read only.
const ReadOnly = "ro:"

// Port stands for the socket on ListenerFD where a VM would have a vsock port.
const Port = 0
