package qemu

import (
	"encoding/binary"

	"github.com/wsl2/wsl2/vmm/boot"
)

//go:generate testdata/generate.sh

// romSize is what QEMU wants a multiple of.
const romSize = 64 << 10

// rom returns the firmware that starts the kernel as e says.
func rom(e boot.Entry) []byte {
	le := binary.LittleEndian
	b := make([]byte, romSize)
	page := b[romSize-0x1000:]
	copy(page, resetCode[:])
	copy(page[0xff0:], resetVector[:])
	le.PutUint16(page[romGdtr:], boot.GDTLimit)
	le.PutUint32(page[romGdtr+2:], uint32(e.GDT))
	le.PutUint32(page[romCr3:], uint32(e.CR3))
	le.PutUint32(page[romTarget:], romTarget32)
	le.PutUint16(page[romCode:], boot.CodeSelector)
	le.PutUint16(page[romData:], boot.DataSelector)
	le.PutUint64(page[romRsp:], uint64(e.RSP))
	le.PutUint64(page[romRsi:], uint64(e.RSI))
	le.PutUint64(page[romRip:], uint64(e.RIP))
	return b
}
