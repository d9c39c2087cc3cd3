// Package share starts the process that serves one directory of the host to one
// distro: `wsl2-files share`, a child of the service for each share that is mounted.
//
// It is a process of its own so that what a hostile guest makes it do, or need, harms
// nothing but this share, and so that the service does not link the protocol.
package share

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/internal/spawn"
)

// Spec is what is served, and to whom.
type Spec struct {
	VsockPath string
	Port      uint32 // the distro's session port
	Session   wire.SessionID
	Dir       string
	ReadOnly  bool
	UID, GID  uint32 // how the distro calls the owner
	// Tag is the virtio-fs device that it is, and Socket where its server connects to that; "" for 9P
	// on a connection to the distro.
	Tag, Socket string
	// What the distro does not see of permissions, and whether it has its own (localfs.Config).
	FileMask, DirMask uint32
	Metadata          bool
}

// Run runs the process to its end. What it has to say goes to our stderr, the service's log.
func Run(s Spec) error {
	path, err := config.FindFiles()
	if err != nil {
		return err
	}
	p, err := spawn.Start(spawn.Command{Path: path, Args: append([]string{"share"}, s.args()...), Dir: "/", Output: os.Stderr})
	if err != nil {
		return err
	}
	return p.Wait()
}

func (s Spec) args() []string {
	id := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	return []string{s.VsockPath, id(s.Port), hex.EncodeToString(s.Session[:]), id(s.UID), id(s.GID), strconv.FormatBool(s.ReadOnly), s.Dir, s.Tag, s.Socket,
		id(s.FileMask), id(s.DirMask), strconv.FormatBool(s.Metadata)}
}

// Parse reads the arguments behind "share".
func Parse(args []string) (s Spec, err error) {
	if len(args) != 12 {
		return s, errors.New("`wsl2-files share` is run by the service of wsl2, not by hand")
	}
	for i, to := range map[int]*uint32{1: &s.Port, 3: &s.UID, 4: &s.GID, 9: &s.FileMask, 10: &s.DirMask} {
		n, err := strconv.ParseUint(args[i], 10, 32)
		if err != nil {
			return s, err
		}
		*to = uint32(n)
	}
	session, err := hex.DecodeString(args[2])
	if err != nil || len(session) != len(s.Session) {
		return s, fmt.Errorf("%q is no session", args[2])
	}
	s.Session, s.VsockPath, s.Dir, s.Tag, s.Socket = wire.SessionID(session), args[0], args[6], args[7], args[8]
	if s.ReadOnly, err = strconv.ParseBool(args[5]); err == nil {
		s.Metadata, err = strconv.ParseBool(args[11])
	}
	return s, err
}
