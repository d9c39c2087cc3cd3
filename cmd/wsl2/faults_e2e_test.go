//go:build e2e

package main_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestBadImages: what cannot become a distro is refused with its reason, and
// nothing of it stays: no disk, no entry, no VM that cannot be used any more.
func TestBadImages(t *testing.T) {
	h := newHost(t)
	distro := testsys.Busybox(t)
	good := testsys.Tar(t, distro...)
	with := func(e ...testsys.Entry) []byte {
		return testsys.Tar(t, append(distro[:len(distro):len(distro)], e...)...)
	}
	zst := testsys.Compress(t, ".zst", good)
	gz := testsys.Compress(t, ".gz", good)
	xz := testsys.Compress(t, ".xz", good)
	flipped := bytes.Clone(gz)
	flipped[len(flipped)/2] ^= 0x55

	for _, c := range []struct {
		name, file string
		data       []byte
		says       string // part of the message
	}{
		{"empty", "empty.tar", nil, "empty"},
		{"text", "text.tar", []byte(strings.Repeat("this is no archive\n", 100)), "tar"},
		{"short text", "short.tar", []byte("no"), "tar"},
		{"zeros", "zeros.tar", make([]byte, 1<<20), "tar"},
		{"truncated", "truncated.tar", good[:len(good)/2], "cut off"},
		{"truncated gzip", "truncated.tar.gz", gz[:len(gz)/2], "truncated"},
		{"truncated xz", "truncated.tar.xz", xz[:len(xz)/2], "truncated"},
		{"truncated zstd", "truncated.tar.zst", zst[:len(zst)/2], "truncated"},
		{"damaged gzip", "damaged.tar.gz", flipped, "damaged.tar.gz"},
		{"compressed text", "text.tar.gz", testsys.Compress(t, ".gz", []byte(strings.Repeat("text\n", 1000))), "tar"},
		{"damaged header", "header.tar", damage(good), "tar"},
		{"no shell", "noshell.tar", testsys.Tar(t, testsys.Entry{Name: "etc/"}, testsys.Entry{Name: "etc/passwd", Content: []byte("root:x:0:0::/:/bin/sh\n")}), "shell"},
		{"no root file system", "data.tar", testsys.Tar(t, testsys.Entry{Name: "README", Content: []byte("hello")}), "/etc"},
		{"..", "dotdot.tar", with(testsys.Entry{Name: "../evil", Content: []byte("evil")}), "../evil"},
		{".. inside", "inside.tar", with(testsys.Entry{Name: "srv/../../../evil", Content: []byte("evil")}), "../evil"},
		{"hard link out", "hardlink.tar", with(testsys.Entry{Name: "evil", Type: tar.TypeLink, Link: "../../init"}), "evil"},
		{"hard link to nothing", "nothing.tar", with(testsys.Entry{Name: "evil", Type: tar.TypeLink, Link: "/no/such/file"}), "/no/such/file"},
		{"a name below a file", "below.tar", with(testsys.Entry{Name: "etc/passwd/evil", Content: []byte("evil")}), "etc/passwd"},
		{"a huge device number", "device.tar", with(testsys.Entry{Name: "srv/dev", Type: tar.TypeChar, Major: 1 << 14, Minor: 1}), "srv/dev"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			before := h.Files()
			r := h.Run("--import", "bad", h.File(c.file, c.data))
			h.Refused(r, c.says, c.file)
			if s := states(h); len(s) != 1 {
				t.Errorf("registered after all: %v", s)
			}
			if after := h.Files(); strings.Join(after, "\n") != strings.Join(before, "\n") {
				t.Errorf("left in the data directory: %v, before %v", after, before)
			}
		})
	}
	h.TB = t

	// Links that lead out lead nowhere: absolute names and links mean the
	// distro's own root, and nobody climbs above it. The same VM takes it, under
	// the name that was refused so often.
	h.Import("bad", append(distro[:len(distro):len(distro)],
		testsys.Entry{Name: "/absolute", Content: []byte("1")},
		testsys.Entry{Name: "srv/root", Type: tar.TypeSymlink, Link: "/"},
		testsys.Entry{Name: "srv/root/through-absolute", Content: []byte("2")},
		testsys.Entry{Name: "srv/up", Type: tar.TypeSymlink, Link: "../../../../.."},
		testsys.Entry{Name: "srv/up/through-relative", Content: []byte("3")},
		testsys.Entry{Name: "srv/init", Type: tar.TypeSymlink, Link: "/proc/1/root/init"},
		testsys.Entry{Name: "srv/init", Content: []byte("4")},
		testsys.Entry{Name: "srv/kmem", Type: tar.TypeChar, Major: 1, Minor: 2},
	)...)
	if got := h.OK("-d", "bad", "--cd", "/", "-e", "sh", "-c", "cat absolute through-absolute through-relative srv/init; stat -c %F srv/kmem"); got != "1234character special file\n" {
		t.Errorf("links in the archive: %q", got)
	}
	h.OK("--system", "-e", "true") // PID 1 and its files are as they were
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")
	h.Fsck(false)
}

// damage spoils the checksum of a tar's second header.
func damage(archive []byte) []byte {
	bad := bytes.Clone(archive)
	bad[512+148] ^= 1
	return bad
}

// TestBadKernels: what is no kernel, or does not get to /init, ends the VM with
// a message, and the next command with a good one works.
func TestBadKernels(t *testing.T) {
	h := newHost(t)
	out := filepath.Dir(h.Exe)
	vmlinux, err := os.ReadFile(filepath.Join(out, "vmlinux"))
	testsys.Must(t, err)
	foreign := bytes.Clone(vmlinux)
	foreign[18] = 183 // e_machine: EM_AARCH64
	self, err := os.ReadFile(h.Exe)
	testsys.Must(t, err)

	run := []string{"-d", "small", "-e", "true"}
	for _, c := range []struct {
		name string
		data []byte
		says []string
	}{
		{"missing", nil, []string{"no such file"}},
		{"empty", []byte{}, nil},
		{"text", []byte(strings.Repeat("no kernel\n", 1000)), []string{"vmlinux", "bzImage"}},
		{"truncated", vmlinux[:len(vmlinux)/2], nil},
		{"of another machine", foreign, []string{"x86-64"}},
		{"a program", self, nil}, // its memory and entry are no kernel's
	} {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			kernel := h.Path("kernel-" + strings.ReplaceAll(c.name, " ", "-"))
			if c.data != nil {
				testsys.Must(t, os.WriteFile(kernel, c.data, 0o644))
			}
			h.Refused(h.Run(append([]string{"--kernel", kernel}, run...)...), append(c.says, kernel)...)
			// wslconfig names it as well.
			h.Config("[wsl2]", "kernel="+kernel)
			h.Refused(h.Run(run...), append(c.says, kernel)...)
			h.Config()
		})
	}
	h.TB = t
	h.OK(run...)

	// Kernel and initramfs lie beside wsl2: a host with a copy of it has its own.
	beside := func(initramfs []byte) {
		t.Helper()
		dir := h.Path("bin")
		testsys.Must(t, os.RemoveAll(dir))
		testsys.Must(t, os.Mkdir(dir, 0o755))
		for _, name := range []string{"wsl2", "wsl2-verbs"} {
			testsys.Must(t, os.Link(filepath.Join(out, name), filepath.Join(dir, name)))
		}
		testsys.Must(t, os.Symlink(filepath.Join(out, "vmlinux"), filepath.Join(dir, "vmlinux")))
		if initramfs != nil {
			testsys.Must(t, os.WriteFile(filepath.Join(dir, "initramfs.cpio"), initramfs, 0o644))
		}
	}
	h.OK("--shutdown")
	exe := h.Exe
	cpio, err := os.ReadFile(filepath.Join(out, "initramfs.cpio"))
	testsys.Must(t, err)
	for name, initramfs := range map[string][]byte{
		"initramfs truncated": cpio[:len(cpio)/3], "initramfs empty": {}, "initramfs missing": nil, "initramfs of text": []byte("no archive"),
	} {
		t.Run(name, func(t *testing.T) {
			h.TB = t
			h.Exe = exe
			beside(initramfs)
			h.Exe = h.Path("bin/wsl2")
			h.Refused(h.Run(run...), "initramfs")
			h.OK("--shutdown")
		})
	}
	h.TB, h.Exe = t, exe
	h.OK(run...)
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestSizes: memory and processors that no VM can have are named, and the VM
// runs or is refused; it never hangs.
func TestSizes(t *testing.T) {
	h := newHost(t)
	for _, c := range [][2]string{
		{"processors=0", "memory=0"},
		{"processors=1000", "memory=1MB"},
		{"processors=-1", "memory=9999TB"},
		{"processors=many", "memory=much"},
	} {
		t.Run(c[0]+" "+c[1], func(t *testing.T) {
			h.TB = t
			h.Config("[wsl2]", c[0], c[1])
			// wslconfig never locks users out: it is a warning, and a VM that works.
			h.Want(h.Run("-d", "small", "-e", "nproc"), 0, "'processors'", "'memory'")
			h.OK("--shutdown")
		})
	}
	h.TB = t
	// The smallest memory that is accepted is enough.
	h.Config("[wsl2]", "memory=128MB", "processors=1")
	if got := h.OK("-d", "small", "-e", "nproc"); got != "1\n" {
		t.Errorf("%q processors", got)
	}
	h.OK("--shutdown")
	h.Fsck(false)
}

// device nodes of a /dev of the host's own; $1 is what becomes of /dev/kvm.
const ownDev = `
mkdir $DIR/dev
mount -t tmpfs -o mode=755 tmpfs $DIR/dev
for n in null zero full random urandom tty ptmx; do cp -a /dev/$n $DIR/dev/; done
mkdir $DIR/dev/pts $DIR/dev/shm; mount --bind /dev/pts $DIR/dev/pts; mount -t tmpfs -o mode=1777 tmpfs $DIR/dev/shm
ln -s /proc/self/fd $DIR/dev/fd
%s
mount --move $DIR/dev /dev
rmdir $DIR/dev
`

// TestNoKVM: /dev/kvm absent, not permitted, or no KVM at all: doctor and
// --accel kvm say which, and commands run on the emulated CPU.
func TestNoKVM(t *testing.T) {
	for _, c := range []struct {
		name, dev string
		uid       int
		says      []string
	}{
		{"absent", "", 0, []string{"/dev/kvm", "modprobe"}},
		{"not permitted", "mknod -m 600 $DIR/dev/kvm c 10 232", 65534, []string{"/dev/kvm", "permission", "usermod -aG kvm"}},
		{"useless", "mknod -m 666 $DIR/dev/kvm c 1 3", 0, []string{"KVM_GET_API_VERSION"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if c.uid != 0 {
				h.As(c.uid)
			}
			h.MountNamespace(fmt.Sprintf(ownDev, c.dev))
			says := append([]string{"tcg"}, c.says...)
			h.Refused(h.Run("--accel", "kvm", "-d", "small", "-e", "true"), says...)

			r := h.Run("doctor")
			for _, s := range c.says {
				if !strings.Contains(strings.ToLower(r.Stdout), strings.ToLower(s)) {
					t.Errorf("doctor does not say %q: %v", s, r)
				}
			}
			if r := h.Run("doctor", "--kvm"); r.Status == 0 {
				t.Errorf("usable: %v", r)
			}
			r = h.Run("-d", "small", "-e", "echo", "works")
			h.Want(r, 0, "kvm")
			if r.Stdout != "works\n" || strings.Count(strings.TrimSpace(r.Stderr), "\n") != 0 {
				t.Errorf("want the output and one line that says why it is slow: %v", r)
			}
		})
	}
}

// TestNoQEMU: where QEMU is needed and absent, that is said, with the package.
func TestNoQEMU(t *testing.T) {
	h := newHost(t)
	bin := h.Path("bin")
	testsys.Must(t, os.Mkdir(bin, 0o755))
	h.Setenv("PATH", bin)
	h.Refused(h.Run("--accel", "tcg", "-d", "small", "-e", "true"), "qemu-system-x86")
	// Neither KVM nor QEMU.
	h.OK("--shutdown")
	h.CheckNothingLeft() // a service that still runs is not in the namespace
	h.MountNamespace(fmt.Sprintf(ownDev, "") + "\nmount --bind /dev/null $(readlink -f /sbin/mke2fs)")
	h.Refused(h.Run("-d", "small", "-e", "true"), "qemu-system-x86", "/dev/kvm")
	r := h.Run("doctor")
	if !strings.Contains(r.Stdout, "qemu-system-x86") || r.Status == 0 {
		t.Errorf("doctor: %v", r)
	}
	// A QEMU that cannot run is a message too.
	testsys.Must(t, os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte("#!/bin/sh\necho cannot emulate >&2\nexit 1\n"), 0o755))
	h.Refused(h.Run("--accel", "tcg", "-d", "small", "-e", "true"), "qemu", "cannot emulate")
	// And mke2fs, for an import.
	testsys.Must(t, os.Remove(filepath.Join(bin, "qemu-system-x86_64")))
	h.Refused(h.Run("--import", "another", h.File("a.tar", testsys.Tar(t, testsys.Busybox(t)...))), "mke2fs", "e2fsprogs")
}

// TestNoSpace: a full host stops an import without a trace, and a running distro
// without loss of what it had written.
func TestNoSpace(t *testing.T) {
	h := testsys.New(t)
	h.MountNamespace(`mount -t tmpfs -o size=64m,mode=700 tmpfs $DIR/data; mkdir -m 700 $DIR/data/wsl2`)
	distro := testsys.Busybox(t)
	disks := func() string {
		h.InNamespace(`cd $DIR/data; find . -type f -size +100k >$DIR/disks`)
		list, err := os.ReadFile(h.Path("disks"))
		testsys.Must(t, err)
		return string(list)
	}
	block := testsys.PatternBytes(t, 64<<10)
	big := testsys.Tar(t, append(distro[:len(distro):len(distro)], testsys.Entry{Name: "srv/big", Content: bytes.Repeat(block, 1536)})...)
	for _, ending := range []string{
		"",     // refused before it begins
		".zst", // its size is not known before it is too much
	} {
		data := big
		if ending != "" {
			data = testsys.Compress(t, ending, big)
		}
		h.Refused(h.Run("--import", "big", h.File("big.tar"+ending, data)), "space")
		if left := disks(); left != "" {
			t.Errorf("left of the import of big.tar%s: %s", ending, left)
		}
	}

	h.Import("small", distro...)
	h.OK("-d", "small", "-e", "sh", "-c", "echo precious >/root/precious && sync")
	r := h.Run("-d", "small", "-e", "sh", "-c", "yes fill | head -c 128000000 | dd of=/root/fill bs=1M conv=fsync")
	if r.Status == 0 {
		t.Errorf("128 MB fit into 64: %v", r)
	}
	// If it was the journal that found no room, Linux 6.12 lets nothing be opened any more.
	r = h.Run("-d", "small", "-e", "true")
	if r.Status != 0 && !strings.Contains(r.Stderr, "input/output error") {
		t.Errorf("on a full host: %v", r)
	}
	h.Want(r, r.Status, "no space", "the host is full", "--shutdown")
	// The user makes room; nothing is lost and the distro can be written again.
	h.InNamespace("mount -o remount,size=512m $DIR/data")
	h.OK("--shutdown")
	if got := h.OK("-d", "small", "-e", "sh", "-c", "cat /root/precious; rm -f /root/fill; echo more >/root/more && sync && cat /root/more"); got != "precious\nmore\n" {
		t.Errorf("after the host was full: %q", got)
	}
	h.OK("--shutdown")
	h.InNamespace(`for d in $(find $DIR/data -type f -size +100k); do e2fsck -f -n $d; done`)
}

// TestNoSpaceVerbs: wherever in a verb the host's file system becomes full, the distros
// and files afterwards are those of before, or those that the verb was to make.
func TestNoSpaceVerbs(t *testing.T) {
	h := testsys.New(t)
	h.MountNamespace(`mount -t tmpfs -o size=128m,mode=700 tmpfs $DIR/data; mkdir -m 700 $DIR/data/wsl2`)
	h.Config("[wsl2]", "defaultVhdSize=1GB")
	distro := append(testsys.Busybox(t), testsys.Entry{Name: "srv/precious", Content: testsys.PatternBytes(t, 3<<20)})
	archive := h.File("image.tar", testsys.Tar(t, distro...))
	want, _ := testsys.SHA256(t, bytes.NewReader(testsys.PatternBytes(t, 3<<20)))
	h.OK("--import", "small", archive)
	h.OK("--shutdown")
	h.InNamespace(`mkdir $DIR/data/other`)
	files := func() string {
		t.Helper()
		h.InNamespace(`cd $DIR/data; find . -type f -o -type d | sort >$DIR/files`)
		list, err := os.ReadFile(h.Path("files"))
		testsys.Must(t, err)
		return string(list)
	}
	precious := func(name string) {
		t.Helper()
		r := h.Run("-d", name, "-e", "sh", "-c", "sha256sum </srv/precious; echo more >/srv/more && sync")
		if r.Status != 0 || !strings.HasPrefix(r.Stdout, want) {
			t.Errorf("%s does not hold what it did: %v", name, r)
		}
	}
	precious("small")
	other := h.Path("data/other")
	for _, c := range []struct {
		name  string
		args  []string
		undo  []string // what takes its success back
		makes string   // a distro
	}{
		{"import", []string{"--import", "new", archive}, []string{"--unregister", "new"}, "new"},
		{"install", []string{"--install", "--from-file", archive, "--name", "new", "--no-launch"}, []string{"--unregister", "new"}, "new"},
		{"import --vhd", []string{"--import", "new", "--vhd", disks(h)["small"]}, []string{"--unregister", "new"}, "new"},
		{"clone", []string{"--manage", "small", "--clone", "new"}, []string{"--unregister", "new"}, "new"},
		{"export", []string{"--export", "small", other + "/small.tar"}, nil, ""},
		{"export raw", []string{"--export", "small", other + "/small.raw"}, nil, ""},
		{"move", []string{"--manage", "small", "--move", other + "/moved"}, []string{"--manage", "small", "--move", filepath.Dir(disks(h)["small"])}, ""},
		{"grow", []string{"--manage", "small", "--resize", "64GB"}, []string{"--manage", "small", "--resize", "1GB"}, ""},
		{"shrink", []string{"--manage", "small", "--resize", "512MB"}, []string{"--manage", "small", "--resize", "1GB"}, ""},
		{"compact", []string{"--manage", "small", "--compact"}, nil, ""},
		{"rename", []string{"--manage", "small", "--rename", "new"}, []string{"--manage", "new", "--rename", "small"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.TB = t
			h.OK("--terminate", "small")
			before := files()
			failed := false
			for _, free := range []int{0, 128, 4 << 10, 16 << 10} { // KB
				h.InNamespace(fmt.Sprintf(`free=$(df -k --output=avail $DIR/data | tail -n 1)
					[ $free -le %[1]d ] || fallocate -l $((free-%[1]d))K $DIR/data/filler`, free))
				r := h.Run(c.args...)
				h.InNamespace(`rm -f $DIR/data/filler`)
				if r.Status != 0 {
					failed = true
					h.Refused(r, "space")
				} else {
					if c.makes != "" {
						precious(c.makes)
					}
					if c.undo != nil {
						h.OK(c.undo...)
					}
					h.InNamespace(`rm -f $DIR/data/other/small.*; rmdir $DIR/data/other/* 2>/dev/null || true`)
				}
				if after := files(); after != before {
					t.Errorf("with %d KB, status %d: left\n%s\nbefore\n%s", free, r.Status, after, before)
				}
			}
			if !failed && c.name != "compact" && c.name != "move" {
				t.Error("it always had room: the test shows nothing")
			}
			precious("small")
		})
	}
	h.TB = t
	h.OK("--shutdown")
	h.InNamespace(`for d in $(find $DIR/data -name disk.ext4); do e2fsck -f -n $d; done`)
}

// TestDamagedDisk: errors that the kernel has noted are repaired at the next start, if
// that takes no decision; else the distro can be read, and --repair takes it.
func TestDamagedDisk(t *testing.T) {
	h := newHost(t)
	inside(h, "small", "echo precious >/srv/precious; echo victim >/srv/victim")
	damage := func(command string) {
		t.Helper()
		h.OK("--shutdown")
		// The errors themselves, and what the kernel notes when it meets one.
		for _, c := range []string{command, "set_super_value state 2", "set_super_value error_count 1"} {
			out, err := exec.Command(hostTool(t, "debugfs"), "-w", "-R", c, disks(h)["small"]).CombinedOutput()
			if err != nil {
				t.Fatalf("debugfs %s: %v: %s", c, err, out)
			}
		}
	}
	start := func(stderr, want string) {
		t.Helper()
		r := h.Run("-d", "small", "-e", "sh", "-c", "cat /srv/precious; ls /srv; touch /root/written && echo writable")
		h.Want(r, 0, stderr)
		if stderr != "" && !strings.Contains(r.Stderr, "is being checked") || stderr == "" && strings.Contains(r.Stderr, "file system") || r.Stdout != want {
			t.Fatalf("want %q: %v", want, r)
		}
	}
	damage("clri /srv/victim") // a name without a file
	start("were repaired", "precious\nprecious\nwritable\n")
	start("", "precious\nprecious\nwritable\n") // once is enough

	inside(h, "small", "echo victim >/srv/victim")
	damage("set_inode_field /srv/victim mode 0") // neither file nor directory
	for range 2 {
		r := h.Run("-d", "small", "-e", "sh", "-c", "cat /srv/precious; touch /root/more")
		h.Want(r, 1, "read-only", "wsl2 --manage small --repair")
		if r.Stdout != "precious\n" {
			t.Errorf("read-only: %v", r)
		}
	}
	h.Refused(h.Run("--manage", "small", "--repair", "--compact"), "exclude")
	h.OK("--terminate", "small")
	h.OK("--manage", "small", "--repair")
	start("", "precious\nprecious\nwritable\n")
	h.OK("--shutdown")
	h.Fsck(false)
}

// TestDiskInUse: two services of one user (another XDG_RUNTIME_DIR, a container)
// never have one disk open.
func TestDiskInUse(t *testing.T) {
	h := newHost(t)
	l := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	l.Expect("ready\n")

	other := testsys.New(t)
	other.Setenv("XDG_DATA_HOME", h.Path("data"))
	other.Refused(other.Run("-d", "small", "-e", "true"), "small", "in use")
	other.Want(other.Run("--shutdown"), 0)

	l.Stdin.Close()
	h.Want(l.Wait(), 0)
	h.OK("--shutdown")
	// Now it is the other's.
	other.OK("-d", "small", "-e", "true")
	other.OK("--shutdown")
	h.Fsck(false)
}
