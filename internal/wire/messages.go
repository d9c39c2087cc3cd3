package wire

// SessionID binds the connections of one session; the client draws it from
// crypto/rand.
type SessionID [16]byte

// Role is what a session connection carries.
type Role uint8

// Roles.
const (
	RoleControl Role = iota + 1
	RoleStdin        // host → guest
	RoleStdout       // guest → host
	RoleStderr       // guest → host
	RolePTY          // both ways: the terminal
	// RoleArchive carries a tar on the port of an ImportReady: host → guest for
	// Import and Maintain, guest → host for Export. Its SessionID is the request's Archive.
	RoleArchive
	// RoleHost is the control connection of a host program's session (HostExec),
	// in which the guest is the one that starts.
	RoleHost
	// RoleShare carries 9P2000.L for a MountShare: the launcher is the server.
	RoleShare
	// RoleFiles is followed by a Start, of which only User counts, and answered with Serving
	// or Failed; then it carries 9P2000.L: the distro is the server, with the user's rights.
	RoleFiles
	// RolePort is followed by a DialPort and answered with Started or Failed; then it carries what
	// passes between the port and a peer on the host (package forward).
	RolePort
	// RoleShareDevice answers a MountShare with a virtio-fs device instead: a ShareDevice
	// follows, and nothing else.
	RoleShareDevice
	// RoleShareChanges carries what the host changes in a mounted share, whose MountShare's session it
	// has: each ShareChange is answered by ShareRaised.
	RoleShareChanges
)

// Hello is the first message on every connection to a guest port.
type Hello struct {
	Version uint32
	Role    Role
	Session SessionID
}

// Ready is the first message on the control channel, from PID 1.
type Ready struct {
	Version       uint32
	KernelRelease string
	// BootNanos is CLOCK_BOOTTIME when /init's main started and InitNanos when
	// Ready was sent: for the phase breakdown of the boot benchmark.
	BootNanos, InitNanos uint64
}

// StartDistro mounts a distro's disk and starts its init in new pid, mount,
// uts, ipc and cgroup namespaces. The Reply's Port is the distro's session
// port, its Text what of the distro's wsl.conf is to be complained about, line by line.
// Starting a distro that runs already replies the same.
type StartDistro struct {
	ID   uint32
	Name string
	// Slot is the block slot of the distro's disk (0 = /dev/vda); SystemSlot
	// for the u-root system distro, which lives in the initramfs; RootSlot for none:
	// sessions run in the VM's own root, beside PID 1.
	Slot     int32
	Hostname string // unless its wsl.conf names another
	Hosts    string // lines of hosts(5) that it takes over
	// Checked: the file system has been checked since errors were noted in it; without
	// that it is refused (CodeUnchecked).
	Checked bool
	// ReadOnly mounts it read-only, whatever is noted in it.
	ReadOnly bool
	// Shares are directories of the host, which User (see Start) owns in the distro.
	Shares   []Share
	User     string
	Timezone string // of the host, as tzdata names it; "" leaves the distro's alone
	// SafeMode starts it as if it had no wsl.conf.
	SafeMode bool
	Limits   Limits
	// OwnNetwork starts it in a network namespace of its own, with these addresses, of the VM's network (as in
	// Network), or without any, and nothing but loopback.
	OwnNetwork bool
	Own4, Own6 string
	// Certificates are PEM blocks of authorities that the distro is to trust as well; nil for none.
	Certificates []string
}

// Limits are what a distro may use of the VM; 0 is no limit.
type Limits struct {
	MemoryBytes uint64
	MilliCPUs   uint32 // thousandths of a processor
	PIDs        uint32 // processes and threads
}

// Share is a directory of the host in a distro, absolute and clean on both sides.
type Share struct {
	Host, Guest string
	ReadOnly    bool
}

// Slot of the system distro, of the VM's own root, and of version 1: the root is the
// directory in which /init is started (package nsinit), for StartDistro, Import and Export.
const (
	SystemSlot = -1
	RootSlot   = -2
	DirSlot    = -3
)

// Network gives the VM's network card its addresses (with the network's size, as
// "10.0.0.2/24") and tells who routes, and answers DNS. It comes before the first StartDistro, if the VM has
// a card. There is no Reply: the Reply to a StartDistro waits until the network is up.
type Network struct {
	Guest4, Gateway4 string
	Guest6, Gateway6 string
}

// StopDistro ends a distro: SIGTERM to its processes, SIGKILL after the grace
// time, unmount, sync. The Reply means its disk may be detached. With IfIdle
// nothing is done and the Reply is CodeBusy while the distro has any process
// besides its init.
type StopDistro struct {
	ID          uint32
	Name        string
	IfIdle      bool
	GraceMillis uint32
}

// Import unpacks a tar archive (uncompressed) onto the empty ext4 file system on
// Slot. PID 1 mounts it and answers with an ImportReady event; the launcher's side
// then sends the archive on a RoleArchive connection to Port and half-closes.
// The Reply comes when all is unpacked, checked (it holds a shell), synced and
// unmounted, or at the first error; then the archive connection is closed.
type Import struct {
	ID      uint32
	Slot    int32
	Archive SessionID
}

// Export reads the ext4 file system on Slot, which nothing uses, as a tar archive
// (PAX, with extended attributes). The guest answers with ImportReady; the launcher
// connects to its Port as RoleArchive, and the guest sends the archive and closes.
// The Reply comes when all of it is sent, or at the first error.
type Export struct {
	ID      uint32
	Slot    int32
	Archive SessionID
}

// Task is what Maintain does with a file system.
type Task uint8

// Tasks.
const (
	// TaskTrim returns free blocks to the host (FITRIM).
	TaskTrim Task = iota + 1
	// TaskGrow makes the file system as large as its disk.
	TaskGrow
	// TaskShrink makes the file system Bytes large, by resize2fs.
	TaskShrink
	// TaskCheck repairs the file system, by e2fsck.
	TaskCheck
	// TaskPreen repairs what can be repaired without losing anything (e2fsck -p).
	TaskPreen
)

// NeedsTools tells whether the task runs the host's e2fsprogs: then the guest
// answers with ImportReady and gets them as a tar on a RoleArchive connection.
func (t Task) NeedsTools() bool { return t == TaskShrink || t == TaskCheck || t == TaskPreen }

// Maintain works on the ext4 file system on Slot, which nothing uses. The tools
// that parse a damaged or hostile file system run in the guest, like all that does. The
// Reply's Text says what was done, whatever its Code.
type Maintain struct {
	ID      uint32
	Slot    int32
	Task    Task
	Bytes   uint64 // TaskShrink: the new size, a multiple of 4096
	Archive SessionID
}

// MountDisk mounts the disk on Slot, or its partition of that number, at
// /mnt/wsl/NAME of every distro. Without a Name it makes device nodes for it below
// /mnt/wsl/dev. A disk that is refused stays with the guest until ReleaseDisk. The
// Reply's Text is the path in the distros.
type MountDisk struct {
	ID        uint32
	Slot      int32
	Partition uint32 // 0: the whole disk
	Name      string
	FSType    string // "": whatever is found
	Options   string // as mount(8)'s -o
}

// ReleaseDisk unmounts the disk on Slot from wherever it was mounted below /mnt/wsl.
// The Reply means that it may be detached.
type ReleaseDisk struct {
	ID   uint32
	Slot int32
}

// SwapOn lets the VM swap to the disk on Slot, until it ends.
type SwapOn struct {
	ID   uint32
	Slot int32
}

// RemoveRoot deletes what is in the root directory of a distro of version 1.
type RemoveRoot struct{ ID uint32 }

// Shutdown stops every distro, unmounts, syncs and powers off through
// engine.ExitPort. There is no Reply on success: the VM ends.
type Shutdown struct {
	ID          uint32
	GraceMillis uint32
}

// Reply answers a request.
type Reply struct {
	ID   uint32
	Code Code // CodeOK or what failed
	// Text is for people: why, when Code is not CodeOK; what was done, for Maintain; warnings,
	// for StartDistro. For Import it is the distro's /etc/wsl-distribution.conf.
	Text string
	Port uint32 // session port, for StartDistro
}

// ImportReady says that the guest waits for the archive's connection of request
// ID (Import, Export, Maintain) on Port.
type ImportReady struct {
	ID   uint32
	Port uint32
}

// DistroExited is sent when a distro's init ended without StopDistro.
type DistroExited struct {
	Name string
	Text string
}

// DistroIdle is sent when a distro has neither a process besides its init nor a
// session any more: from now on StopDistro.IfIdle succeeds.
type DistroIdle struct{ Name string }

// Shell says how Start's Argv becomes a program.
type Shell uint8

// Shells (WSL's --shell-type).
const (
	ShellNone     Shell = iota // execvp Argv as it is
	ShellStandard              // $SHELL -c Argv[0]; no Argv: $SHELL
	ShellLogin                 // the same with argv0 "-sh"-style
)

// Streams says which of a session's streams have a connection of their own;
// each that has none is the terminal if PTY is set, else /dev/null.
type Streams uint8

// Streams.
const (
	StreamStdin Streams = 1 << iota
	StreamStdout
	StreamStderr
	StreamPTY
)

// Roles lists the connections that a session with these streams consists of,
// beside its control connection.
func (s Streams) Roles() []Role {
	list := make([]Role, 0, 4)
	for i, role := range [...]Role{RoleStdin, RoleStdout, RoleStderr, RolePTY} {
		if s&(1<<i) != 0 {
			list = append(list, role)
		}
	}
	return list
}

// WindowSize is a terminal's size in characters.
type WindowSize struct{ Rows, Cols uint16 }

// Start asks for the session's program. Env entries ("K=V") are added to the
// clean base environment (wsl.md §1.6), later ones win.
type Start struct {
	Shell   Shell
	Argv    []string
	User    string // name or number; "" = the one of the distro's wsl.conf
	Default string // who it is if there is none either; "" = root
	Cwd     string // absolute guest path, "" or "~" = the user's home
	Env     []string
	Streams Streams
	Size    WindowSize
	// Agent says that the client has an SSH agent: the guest sets SSH_AUTH_SOCK.
	Agent bool
}

// Started reports the program's pid in the distro's pid namespace. Notice is
// for the user's stderr (a Cwd that is not there, say); empty if none.
type Started struct {
	PID    uint32
	Notice string
}

// Failed ends a session whose program could not be started.
type Failed struct {
	Code Code
	Text string
}

// Resize sets the terminal's size; the guest's kernel raises SIGWINCH.
type Resize struct{ Size WindowSize }

// Signal sends a signal (Linux x86-64 number) to the session's foreground
// process group, or to the program's process group where there is no terminal.
type Signal struct{ Number uint8 }

// Exited ends a session: the program's exit status, or the signal that killed
// it (then Status is 0), and the bytes sent on each data connection.
type Exited struct {
	Status                             uint8
	Signal                             uint8
	StdoutBytes, StderrBytes, PTYBytes uint64
}

// HostExec asks for a session the other way round: a program of the host, in
// the streams of a process of the guest. The launcher opens the connections, to
// the distro's session port.
type HostExec struct {
	Session SessionID
	Kind    HostKind
	Distro  string // on the control channel; empty on a session's own connection
}

// HostKind is what a HostExec asks for.
type HostKind uint8

// Kinds.
const (
	HostProgram HostKind = iota
	// HostAgent is the caller's SSH agent: after Hello, the RoleHost connection
	// carries its protocol (RFC draft-ietf-sshm-ssh-agent), both ways.
	HostAgent
)

// MountShare asks for the share at Guest, whose files UID and GID are to own in the
// distro. The launcher opens a RoleShare connection to the distro's session port.
type MountShare struct {
	Session  SessionID
	Guest    string
	UID, GID uint32
	Distro   string // on the control channel
	// Stream: only a connection will do; the guest cannot mount a device.
	Stream bool
}

// WatchPorts asks PID 1 to tell, by PortsOpen, on which ports the VM's processes serve, from
// now on and whenever others do.
type WatchPorts struct{}

// PortsOpen are all ports that distros serve, at most MaxPorts.
type PortsOpen struct{ Ports []Port }

// MaxPorts bounds PortsOpen.
const MaxPorts = 1024

// Port is one that a process of a distro serves.
type Port struct {
	Distro string
	UDP    bool
	V4, V6 bool // at 127.0.0.1, at ::1
	Number uint16
}

// DialPort connects to a port of the distro, at ::1 or 127.0.0.1.
type DialPort struct {
	UDP, V6 bool
	Number  uint16
}

// Code is why something failed; the launcher maps it to an exit status and
// advice, once.
type Code uint16

// Codes.
const (
	CodeOK Code = iota
	CodeInternal
	CodeVersion // the other side speaks another version
	CodeUnknownDistro
	CodeUnknownUser
	CodeNotFound      // program not found: exit status 127
	CodeNotExecutable // program could not be run: exit status 126
	CodeBusy
	CodeDisk    // mount or I/O error of the disk
	CodeNoSpace // disk full
	CodeArchive // not a tar, truncated, or hostile
	CodeNoShell // archive holds no shell or /etc
	CodeRefused // request makes no sense in this state
	// CodeHeld: the distro has ended, but something still uses its disk.
	CodeHeld
	// CodeUnchecked: errors are noted in the disk's file system, which has not been checked since.
	CodeUnchecked
)

// Serving answers the Start of RoleFiles: who the server is in the distro.
type Serving struct {
	UID, GID uint32
	Groups   []uint32 // the others
}

// RegisterDevice has PID 1 tell its kernel of a device, in virtio_mmio.device='s terms. It is no
// error if the kernel knows it.
type RegisterDevice struct {
	ID     uint32
	Device string
}

// ShareDevice names the virtio-fs device of a share; "" says that it cannot be served.
type ShareDevice struct {
	Tag string
}

// ShareChange is a change of the host's to the entry Name of the directory Dir, a path from the share's
// root, to be replayed (package p9/replay) so that inotify tells of it.
type ShareChange struct {
	Kind            uint8  // replay.Kind
	Mode            uint32 // S_IFMT of the file
	Dir, Name       string
	NewDir, NewName string // of a rename
}

// ShareRaised answers a ShareChange, whatever became of it.
type ShareRaised struct{}
