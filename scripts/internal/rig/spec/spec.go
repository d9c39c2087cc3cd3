// Package spec is what the two halves of the rig tell each other: the program
// on the host (scripts/internal/rig) and PID 1 of the machine that it starts
// (scripts/internal/rig/l1).
package spec

// Path is where PID 1 finds the Spec, as JSON.
const Path = "/rig/spec.json"

// Names of the virtio-serial ports, /dev/virtio-ports/NAME in ordinary distros.
const (
	PortStdin   = "rig.stdin"   // to the command; absent when it gets /dev/null
	PortStdout  = "rig.stdout"  // from the command
	PortStderr  = "rig.stderr"  // from the command
	PortFiles   = "rig.files"   // a tar archive of Spec.Get, once the command has ended
	PortControl = "rig.control" // to PID 1: one byte, a signal's number, for the command
	PortStatus  = "rig.status"  // from PID 1: one Status, as JSON
)

// Spec tells PID 1 what to do.
type Spec struct {
	// Modules are the kernel modules to load, in order: paths of uncompressed .ko files.
	Modules []string `json:"modules"`
	// Args is the command; Args[0] is a path, or a name to be found in PATH of Env.
	Args []string `json:"args"`
	// Env is the command's whole environment.
	Env []string `json:"env"`
	// Dir is the command's working directory.
	Dir string `json:"dir"`
	// Stdin says that PortStdin exists.
	Stdin bool `json:"stdin"`
	// Scratch says that the first virtio disk is to be mounted at /scratch.
	Scratch bool `json:"scratch"`
	// Get are the files and directories to send back.
	Get []string `json:"get,omitempty"`
}

// Status is how the command ended. Exactly one field is set: Error when the
// command could not be run at all, NotFound with it when there is no such file.
type Status struct {
	Exited   *int   `json:"exited,omitempty"`
	Signal   *int   `json:"signal,omitempty"`
	Error    string `json:"error,omitempty"`
	NotFound bool   `json:"notFound,omitempty"`
}
