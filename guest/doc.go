// Package guest holds everything that runs in the VM: see its packages.
//
//	pid1      PID 1 of the VM: Ready, disks, distros, shutdown
//	distro    the init of one distro, in namespaces of its own
//	session   programs for clients, with pipes and terminals
//	importer  a fresh disk from an archive
//	untar     unpacking, confined
//	reaper    the one waiter of a process that adopts orphans
//	users     /etc/passwd and /etc/group
//	mounts    file systems, nodes and links as tables
//	kmsg      the kernel log
package guest
