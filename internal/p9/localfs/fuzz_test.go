package localfs

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/p9"
)

// session makes a client's side of a connection of the fuzzer's bytes. Framed, they are
// a row of messages, each a type, a length and a body; so the fuzzer gets to the requests.
func session(data []byte, framed bool) []byte {
	if !framed {
		return data
	}
	b, _ := p9.Append(nil, p9.NoTag, &p9.Mversion{Kind: p9.TVersion, Msize: 8192, Version: p9.Version}, p9.MinMsize)
	b, _ = p9.Append(b, 0, &p9.Tattach{AFID: p9.NoFID}, p9.MinMsize)
	for tag := uint16(1); len(data) >= 2; tag++ {
		t, n := data[0], min(int(data[1]), len(data)-2)
		body := data[2 : 2+n]
		data = data[2+n:]
		if p9.Type(t) == p9.TVersion {
			continue
		}
		size := uint32(7 + n)
		b = append(b, byte(size), byte(size>>8), byte(size>>16), byte(size>>24), t, byte(tag), byte(tag>>8))
		b = append(b, body...)
	}
	return b
}

// seeds are sessions that do each thing once, for each name.
func seeds(names []string) [][]byte {
	var list [][]byte
	for _, name := range names {
		var data []byte
		for _, m := range []p9.Message{
			&p9.Twalk{FID: 0, NewFID: 1, Names: []string{name}},
			&p9.Twalk{FID: 0, NewFID: 2},
			&p9.Tlopen{FID: 1, Flags: uint32(os.O_RDWR)},
			&p9.Tread{Kind: p9.TRead, FID: 1, Count: 100},
			&p9.Twrite{FID: 1, Data: []byte("data")},
			&p9.Tread{Kind: p9.TReaddir, FID: 1, Count: 1000},
			&p9.Tgetattr{FID: 1, Mask: p9.AttrBasic},
			&p9.Tsetattr{FID: 1, Attr: p9.SetAttr{Valid: p9.SetMode | p9.SetSize, Mode: 0o4755}},
			&p9.Tlcreate{FID: 2, Name: name, Flags: uint32(os.O_RDWR), Mode: 0o644},
			&p9.Tmkdir{Name: name + "2", Mode: 0o755},
			&p9.Tmknod{Name: name, Mode: unix.S_IFIFO},
			&p9.Tsymlink{Name: "s", Target: "../" + name},
			&p9.Tfid{Kind: p9.TReadlink, FID: 1},
			&p9.Tlink{FID: 1, Name: "l"},
			&p9.Trenameat{OldName: name, NewName: "n"},
			&p9.Trename{FID: 1, Name: name},
			&p9.Txattrwalk{FID: 1, NewFID: 3},
			&p9.Txattrcreate{FID: 3, Name: "user.a", Size: 1},
			&p9.Tlock{FID: 1, Lock: p9.Lock{Type: p9.LockWrite}},
			&p9.Tgetlock{FID: 1},
			&p9.Tfsync{FID: 1},
			&p9.Tfid{Kind: p9.TStatfs, FID: 1},
			&p9.Tunlinkat{Name: name},
			&p9.Tflush{Old: 3},
			&p9.Tfid{Kind: p9.TClunk, FID: 3},
			&p9.Tfid{Kind: p9.TRemove, FID: 1},
		} {
			b, _ := p9.Append(nil, 0, m, p9.MinMsize)
			data = append(append(data, byte(m.Type()), byte(len(b)-7)), b[7:]...)
		}
		list = append(list, data)
	}
	return list
}
