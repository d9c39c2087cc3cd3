package fusefs

import (
	"bytes"
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/wsl2/wsl2/internal/p9/replay"
)

// TestReplayedTime: what the kernel is told of a replayed change of times is no file's time, so that it drops
// its pages when it next looks.
func TestReplayedTime(t *testing.T) {
	k, dir := serve(t, Config{Replay: new(replay.Stage)})
	k.init(t)
	if err := os.WriteFile(dir+"/f", []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	file := k.lookup(t, "f")
	times := func(opcode uint32, body []byte) []byte {
		errno, b := k.do(t, opcode, file, body)
		if errno != 0 {
			t.Fatal(errno)
		}
		const mtime, mtimensec = 16 + 32, 16 + 52
		return join(b[mtime:mtime+8], b[mtimensec:mtimensec+4])
	}
	before := times(opGetattr, make([]byte, 16))
	k.uid = replay.UID
	if told := times(opSetattr, join(u32(fuse.FATTR_MTIME|fuse.FATTR_MTIME_NOW), make([]byte, 84))); bytes.Equal(told, before) {
		t.Error("the kernel is told the file's own time")
	}
	if after := times(opGetattr, make([]byte, 16)); !bytes.Equal(after, before) {
		t.Errorf("%x, was %x", after, before)
	}
}
