package distro

import "testing"

func TestNextDevice(t *testing.T) {
	for _, c := range []struct{ known, want string }{
		{"0x1000@0xd0000000:1:0\n\x00", "0x1000@0xd0001000:1"},
		{"0x1000@0xd0000000:1:0\n0x1000@0xd0001000:2:1\n0x200@0xd0002000:9:2\n", "0x200@0xd0002200:9"},
		{"0x1000@0xd0000000:1:0\n0x1000@0xd0009000:2:1\n0x1000@0xd0001000:2:2\n", "0x1000@0xd0002000:2"}, // beside a file system
		{"0x1000@0xd0000000:1:0\n0x1000@0xd0001000:2:1\n0x1000@0xd0009000:2:2\n0x1000@0xd0002000:2:3\n", "0x1000@0xd0003000:2"},
		{"", ""},
		{"\n", ""},
		{"\x00", ""},
		{"4K@0xd0000000:1", ""},
	} {
		got, err := nextDevice(c.known)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v; want %q", c.known, got, err, c.want)
		}
	}
}
