package pid1

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/guest/distro"
	"github.com/wsl2/wsl2/internal/wire"
)

// swapDiscard has the kernel give pages that it no longer needs back to the host's
// sparse file (SWAP_FLAG_DISCARD of linux/swap.h).
const swapDiscard = 0x10000

// swapOn lets the VM swap to a disk.
func swapOn(slot int32) *wire.Reply {
	device, err := distro.Device(slot)
	if err != nil {
		return refused("%v", err)
	}
	if r := checkDisk(device); r != nil {
		return r
	}
	path, err := unix.BytePtrFromString(device)
	if err != nil {
		return failed(wire.CodeInternal, err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(path)), swapDiscard, 0); errno != 0 {
		return failed(wire.CodeDisk, fmt.Errorf("swapon %s: %w", device, errno))
	}
	return &wire.Reply{}
}
