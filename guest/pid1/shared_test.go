package pid1

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountsOf(t *testing.T) {
	text := `21 1 0:18 / /proc rw - proc proc rw
30 1 0:26 / /mnt/wsl rw shared:1 - tmpfs tmpfs rw
31 30 254:16 /home /mnt/wsl/home rw shared:2 - ext4 /dev/vdb rw
32 30 254:1 / /mnt/wsl/other rw shared:3 - ext4 /dev/vda1 rw
33 31 254:16 / /mnt/wsl/home/a\040b\134 rw shared:4 - ext4 /dev/vdb rw
34 1 254:16 / /distro rw - ext4 /dev/vdb rw
35 1
`
	got := mountsOf(text, unix.Mkdev(254, 16), "/mnt/wsl/")
	if want := []string{`/mnt/wsl/home/a b\`, "/mnt/wsl/home"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestUnescape(t *testing.T) {
	for s, want := range map[string]string{"": "", "a": "a", `\040`: " ", `a\011b`: "a\tb", `\134040`: `\040`, `\`: `\`, `\04`: `\04`, `\999`: `\999`, `\777`: `\777`} {
		if got := unescape(s); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

// FuzzMountsOf: the names in it are the distros'.
func FuzzMountsOf(f *testing.F) {
	f.Add(`33 31 254:16 / /mnt/wsl/home/a\040b\134 rw`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, dir := range mountsOf(text, unix.Mkdev(254, 16), "/mnt/wsl/") {
			if !strings.HasPrefix(dir, "/mnt/wsl/") {
				t.Errorf("%q is elsewhere", dir)
			}
		}
	})
}
