// Package api is what the client and the service say to each other on the
// service's unix socket.
//
// One connection carries one request and what comes back. Each message is a
// frame: a length (uint32, little-endian, counting what follows it), a kind
// (one byte) and a body. The request's body begins with the sender's Identity.
//
//	client                       service
//	  Open ----------------------->          a session in a distro
//	  <------------------- Notice *          for the user's stderr
//	  <---------- Opened | Error | Replaced
//	  (the connection stays open: it is the lease of the session)
//	  <--------------------- Ended           the VM or the distro is gone
//	  close ---------------------->          the session is over
//
//	  Call ----------------------->          everything else
//	  <-- Notice * Progress * Ready *        Ready: an import or export waits for its archive's
//	  Sent ----------------------->          connection; Sent: the client has done its part
//	  <---------- Result | Error | Replaced
//
// Open and Opened are on the path of every command, hence not JSON; the others
// are. Replaced means that the service is another build than the client and
// ends because nothing runs: the client waits for the connection's end and
// starts its own.
package api

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/wsl2/wsl2/internal/hostpath"
	"github.com/wsl2/wsl2/launcher/ports"
)

// Version is what wsl2 --version prints; set by the linker
// (-X github.com/wsl2/wsl2/launcher/api.Version=...).
var Version = "0.1.0-dev"

// Protocol is the version of the messages in this package. Shutdown and status
// calls stay readable in every version.
const Protocol = 2

// Kind is a frame's kind.
type Kind uint8

// Kinds. Numbers are never reused.
const (
	KindOpen     Kind = 1
	KindCall     Kind = 2
	KindSent     Kind = 3
	KindOpened   Kind = 16
	KindResult   Kind = 17
	KindError    Kind = 18
	KindNotice   Kind = 19
	KindReady    Kind = 20
	KindEnded    Kind = 21
	KindReplaced Kind = 22
	KindProgress Kind = 23
)

// MaxFrame bounds a frame's length field.
const MaxFrame = 1 << 20

// Identity tells builds apart: a service that outlived an upgrade of the
// binary notices it by this.
type Identity struct {
	Protocol uint32
	Version  string
	// Build is different for each build of the executable.
	Build string
}

// Open asks for a session in a distro.
type Open struct {
	Distro string // "" = the default distro
	System bool   // the system distro
	// DebugShell: not the distro, but the root of the VM that it would run in.
	DebugShell bool
	VM         VMOptions
}

// VMOptions are asked for on the command line; empty fields follow wslconfig.
// They are refused if the VM already runs with others.
type VMOptions struct {
	Accel  string `json:"accel,omitempty"`
	Kernel string `json:"kernel,omitempty"` // absolute path
}

// Absolute makes the paths absolute: the service has another directory.
func (o *VMOptions) Absolute() error {
	if o.Kernel == "" {
		return nil
	}
	path, err := filepath.Abs(o.Kernel)
	o.Kernel = path
	return err
}

// Opened says where the session is to be started.
type Opened struct {
	Distro      string // its registered spelling
	VsockPath   string // the VM's vsock socket
	Port        uint32 // the distro's session port
	DefaultUser string // "" leaves it to the distro
	// FirstRun: the distro is to be set up before its first interactive shell, by SetUp, a
	// shell's command ("" is our own); then SetUpUID is to be the default user.
	FirstRun        bool
	SetUp, SetUpUID string
	Shares          hostpath.Table // the host's directories in the distro
	Proxy           bool           // the caller's proxies are the distro's as well
}

// Error is a failure that the user is told of.
type Error struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"` // the next step
}

func (e *Error) Error() string {
	if e.Hint != "" {
		return e.Text + "; " + e.Hint
	}
	return e.Text
}

// Code classifies an Error for callers that decide on it.
type Code string

// Codes.
const (
	CodeFailed      Code = "failed"
	CodeNotFound    Code = "distro-not-found"
	CodeNoDefault   Code = "no-default-distro"
	CodeExists      Code = "distro-exists"
	CodeBusy        Code = "busy"
	CodeSize        Code = "size"
	CodeVersion     Code = "version"
	CodeVM          Code = "vm"
	CodeArchive     Code = "archive"
	CodeNoSpace     Code = "no-space"
	CodeBadRequest  Code = "bad-request"
	CodeVMOptions   Code = "vm-options"
	CodeNoToolchain Code = "tool-missing"
)

// Errorf makes an Error of CodeFailed kind c.
func Errorf(c Code, hint, format string, a ...any) *Error {
	return &Error{Code: c, Hint: hint, Text: fmt.Sprintf(format, a...)}
}

// AsError turns any error into an *Error.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: CodeFailed, Text: err.Error()}
}

// Verbs of Call.
const (
	VerbList       = "list"
	VerbImport     = "import"
	VerbTerminate  = "terminate"
	VerbUnregister = "unregister"
	VerbSetDefault = "set-default"
	VerbExport     = "export"
	VerbInPlace    = "import-in-place"
	VerbRename     = "rename"
	VerbSetUser    = "set-default-user"
	VerbMove       = "move"
	VerbResize     = "resize"
	VerbCompact    = "compact"
	VerbClone      = "clone"
	VerbRepair     = "repair"
	VerbSetUp      = "set-up" // the first run is done; User is the default user from now on
	VerbMount      = "mount"
	VerbUnmount    = "unmount"
	VerbHostMount  = "host-mount" // where the distro's tree is on the host; it is mounted there
	VerbShutdown   = "shutdown"
	VerbStatus     = "status"
	VerbPorts      = "ports"
	VerbSetVersion = "set-version"
	// VerbDefaultVersion sets the version of new distros.
	VerbDefaultVersion = "set-default-version"
)

// Call is any request but Open.
type Call struct {
	Verb    string `json:"verb"`
	Name    string `json:"name,omitempty"`
	Dir     string `json:"dir,omitempty"`     // import, move, clone: where the disk goes; absolute
	New     string `json:"new,omitempty"`     // rename, clone: the new name
	User    string `json:"user,omitempty"`    // set-default-user; "" leaves it to the distro
	Size    uint64 `json:"size,omitempty"`    // resize, import of an archive: the disk's, in bytes
	Image   string `json:"image,omitempty"`   // import of a disk image, import-in-place, mount, unmount ("": all): its absolute path
	Version int    `json:"version,omitempty"` // set-version, set-default-version, import (0: the default)
	Disk    bool   `json:"disk,omitempty"`    // export: as a disk image, which the client makes
	// Install is an import that is set up at its first run, and named by its archive if Name is "".
	Install bool `json:"install,omitempty"`
	Force   bool `json:"force,omitempty"` // shutdown: without the guest's help
	// Publish is a rule to add, or with Unpublish to take away; ports lists in any case.
	Publish   *ports.Rule `json:"publish,omitempty"`
	Unpublish bool        `json:"unpublish,omitempty"`
	// After is the Serial of a list of ports: the answer is the next one that differs.
	After uint64 `json:"after,omitempty"`
	// ArchiveBytes is the archive's size as far as it is known, for the check
	// of free space; 0 if it is not.
	ArchiveBytes uint64    `json:"archiveBytes,omitempty"`
	Mount        *Mount    `json:"mount,omitempty"` // mount: how
	VM           VMOptions `json:"vm,omitzero"`
}

// Ready says where an archive's connection is to go: a wire.RoleArchive
// connection to Port of VsockPath. For an export as a disk image it names the image, which
// stays as it is until the client says Sent or goes.
type Ready struct {
	VsockPath string   `json:"vsockPath,omitempty"`
	Port      uint32   `json:"port,omitempty"`
	Archive   [16]byte `json:"archive"`
	Disk      string   `json:"disk,omitempty"`
	// Bytes is about how much there is to export.
	Bytes int64 `json:"bytes,omitempty"`
}

// Installed is the Result of an import.
type Installed struct {
	Name string `json:"name"`
}

// HostMount is the Result of VerbHostMount.
type HostMount struct {
	Dir string `json:"dir"`
}

// Mount is one file system of a shared disk, or the disk itself, bare.
type Mount struct {
	Name      string `json:"name,omitempty"`      // below /mnt/wsl; "": bare
	Partition uint32 `json:"partition,omitempty"` // 0: the whole disk
	FSType    string `json:"type,omitempty"`      // "": whatever is found
	Options   string `json:"options,omitempty"`   // as mount(8)'s -o
	At        string `json:"at,omitempty"`        // its path in the distros, once it is there
}

// SharedDisk is one that --mount attached for all distros, and the Result of VerbMount.
type SharedDisk struct {
	Disk   string  `json:"disk"`
	Mounts []Mount `json:"mounts"`
}

// Progress is the body of KindProgress, JSON: how far the work on a disk is.
type Progress struct {
	What  string `json:"what"` // "copying the disk"
	Done  int64  `json:"done"`
	Total int64  `json:"total"` // 0 if it is not known
}

// Changed is the Result of the verbs that change a disk: its size and what it takes
// of the host's file system, before and after, in bytes.
type Changed struct {
	SizeBefore int64 `json:"sizeBefore"`
	SizeAfter  int64 `json:"sizeAfter"`
	UsedBefore int64 `json:"usedBefore"`
	UsedAfter  int64 `json:"usedAfter"`
	// Shared: a clone shares its blocks with the original.
	Shared bool `json:"shared,omitempty"`
	// Report is what e2fsck said.
	Report string `json:"report,omitempty"`
}

// Distro is a row of a List.
type Distro struct {
	Name     string `json:"name"`
	Default  bool   `json:"default"`
	State    string `json:"state"` // see States
	Version  int    `json:"version"`
	Disk     string `json:"disk"`
	Sessions int    `json:"sessions"`
	// SizeBytes is the size of the disk, UsedBytes what it takes of the host's file system.
	SizeBytes   int64  `json:"sizeBytes"`
	UsedBytes   int64  `json:"usedBytes"`
	DefaultUser string `json:"defaultUser,omitempty"`
	// PID is its init's on the host, while a distro of version 1 runs.
	PID int `json:"pid,omitempty"`
	// OwnVM: it runs in a VM of its own.
	OwnVM bool `json:"ownVM,omitempty"`
}

// States of a distro.
const (
	StateStopped  = "Stopped"
	StateStarting = "Starting"
	StateRunning  = "Running"
	StateStopping = "Stopping"
	// While something is done with its disk.
	StateInstalling   = "Installing"
	StateUninstalling = "Uninstalling"
	StateExporting    = "Exporting"
	StateChanging     = "Changing"
)

// List is the Result of VerbList.
type List struct {
	Distros []Distro `json:"distros"`
}

// Status is the Result of VerbStatus.
type Status struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	Default string `json:"default"`
	// DefaultVersion is that of new distros.
	DefaultVersion int `json:"defaultVersion"`
	Distros        int `json:"distros"`
	Running        int `json:"running"`
	Sessions       int `json:"sessions"`
	VM             *VM `json:"vm"` // the shared one; nil while none runs
	// OwnVMs are those of distros that have one of their own, and run.
	OwnVMs []OwnVM `json:"ownVMs,omitempty"`
	// Disks are those that distros share.
	Disks []SharedDisk `json:"disks"`
}

// OwnVM is the VM of one distro.
type OwnVM struct {
	Distro string `json:"distro"`
	VM
}

// VM describes a running VM.
type VM struct {
	PID           int    `json:"pid"`
	Accel         string `json:"accel"` // kvm or tcg
	AccelReason   string `json:"accelReason,omitempty"`
	Kernel        string `json:"kernel"`
	KernelRelease string `json:"kernelRelease"`
	MemoryBytes   uint64 `json:"memoryBytes"`
	CPUs          int    `json:"cpus"`
	// BootMillis is the time from the start of the VM's process to /init's readiness.
	BootMillis int64 `json:"bootMillis"`
	// KernelMicros is what of it the guest's kernel took until it started /init, by its own clock.
	KernelMicros int64 `json:"kernelMicros"`
}

// Ports is the Result of VerbPorts.
type Ports struct {
	Ports  []ports.Bound `json:"ports"`
	Rules  []ports.Rule  `json:"rules"` // of `wsl2 ports --publish`
	Serial uint64        `json:"serial"`
}

// Write sends one frame with one write.
func Write(w io.Writer, k Kind, body []byte) error {
	b := make([]byte, 0, 5+len(body))
	b = appendHeader(b, k, len(body))
	_, err := w.Write(append(b, body...))
	return err
}

func appendHeader(b []byte, k Kind, n int) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(n+1)), byte(k))
}

// Read reads exactly one frame. io.EOF, unwrapped, means that the peer closed
// between two frames.
func Read(r io.Reader) (Kind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n == 0 || n > MaxFrame {
		return 0, nil, fmt.Errorf("frame of %d bytes, want 1 to %d", n, MaxFrame)
	}
	body := make([]byte, n-1)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Kind(head[4]), body, nil
}

// AppendOpen appends the frame of an Open request.
func AppendOpen(b []byte, id Identity, o *Open) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(KindOpen))
	b = appendIdentity(b, id)
	b = appendString(b, o.Distro)
	b = appendBool(b, o.System)
	b = appendBool(b, o.DebugShell)
	b = appendString(b, o.VM.Accel)
	b = appendString(b, o.VM.Kernel)
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b
}

// AppendCall appends the frame of a Call request.
func AppendCall(b []byte, id Identity, c *Call) ([]byte, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return b, err
	}
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(KindCall))
	b = append(appendIdentity(b, id), body...)
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b, nil
}

// AppendOpened appends the frame of an Opened answer.
func AppendOpened(b []byte, o *Opened) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(KindOpened))
	b = appendString(b, o.Distro)
	b = appendString(b, o.VsockPath)
	b = binary.LittleEndian.AppendUint32(b, o.Port)
	b = appendString(b, o.DefaultUser)
	b = appendBool(b, o.FirstRun)
	b = appendString(b, o.SetUp)
	b = appendString(b, o.SetUpUID)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(o.Shares)))
	for _, s := range o.Shares {
		b = appendString(appendString(b, s.Host), s.Guest)
	}
	b = appendBool(b, o.Proxy)
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b
}

// ErrMalformed says that a body cannot be decoded.
var ErrMalformed = errors.New("malformed message")

// DecodeRequest splits a request's body; rest is Open's or Call's part. The
// Identity's Protocol comes first in every version; if it differs from ours
// rest is only good for a Call.
func DecodeRequest(body []byte) (id Identity, rest []byte, err error) {
	d := decoder{b: body}
	id = Identity{Protocol: d.u32(), Version: d.string(), Build: d.string()}
	return id, d.b, d.err
}

// DecodeOpen decodes DecodeRequest's rest.
func DecodeOpen(rest []byte) (Open, error) {
	d := decoder{b: rest}
	o := Open{Distro: d.string(), System: d.bool(), DebugShell: d.bool(), VM: VMOptions{Accel: d.string(), Kernel: d.string()}}
	return o, d.end()
}

// DecodeOpened decodes an Opened body.
func DecodeOpened(body []byte) (Opened, error) {
	d := decoder{b: body}
	o := Opened{Distro: d.string(), VsockPath: d.string(), Port: d.u32(), DefaultUser: d.string(),
		FirstRun: d.bool(), SetUp: d.string(), SetUpUID: d.string()}
	for n := d.u32(); n > 0 && d.err == nil; n-- {
		o.Shares = append(o.Shares, hostpath.Share{Host: d.string(), Guest: d.string()})
	}
	o.Proxy = d.bool()
	return o, d.end()
}

// DecodeError decodes an Error's or Ended's body; what cannot be decoded is
// quoted.
func DecodeError(body []byte) *Error {
	e := new(Error)
	if err := json.Unmarshal(body, e); err != nil {
		return &Error{Code: CodeFailed, Text: fmt.Sprintf("the service answered %q", body)}
	}
	return e
}

func appendIdentity(b []byte, id Identity) []byte {
	b = binary.LittleEndian.AppendUint32(b, id.Protocol)
	return appendString(appendString(b, id.Version), id.Build)
}

func appendString(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(s))), s...)
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// decoder reads a body field by field; its first error sticks.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) take(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.err, d.b = ErrMalformed, nil
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) string() string { return string(d.take(int(d.u32()))) }

func (d *decoder) bool() bool {
	p := d.take(1)
	return p != nil && p[0] == 1
}

func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		return ErrMalformed
	}
	return d.err
}
