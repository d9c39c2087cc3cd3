package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/u-root/gobusybox/src/pkg/bb"
	"github.com/u-root/gobusybox/src/pkg/bb/findpkg"
	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/uio/ulog"
)

// uroot is the module whose commands the system distro consists of; its
// version is go.mod's.
const uroot = "github.com/u-root/u-root/cmds/core/"

// commands of the system distro: a shell, what one needs to look around in a VM
// and repair a disk, and no more.
var commands = strings.Fields(`
	base64 basename blkid cat chmod chroot cmp cp date dd df dirname dmesg du echo
	false find free gosh grep gzip head hexdump hostname id ip kill ln losetup ls
	lsfd md5sum mkdir mkfifo mknod mktemp more mount mv netstat nohup pidof ping
	printenv ps pwd readlink realpath rm seq shasum sleep sort strings stty sync
	tail tar tee time timeout touch tr true truncate tty umount uname uniq unshare
	uptime wc which xargs yes`)

// alias is added to the busybox' main package, which chooses the command by
// argv[0]: programs call the shell "sh", and login shells have a "-" in front.
const alias = `package main

import (
	"os"
	"path/filepath"
	"strings"
)

func init() {
	switch strings.TrimPrefix(filepath.Base(os.Args[0]), "-") {
	case "sh", "gosh":
		os.Args[0] = "gosh"
	}
}
`

// busybox returns the commands as one static binary. It is kept in cache under
// the hash of what it is made from: the build takes half a minute.
func busybox(cache, tmp string) ([]byte, error) {
	key, err := busyboxKey()
	if err != nil {
		return nil, err
	}
	kept := filepath.Join(cache, "busybox-"+key)
	if b, err := os.ReadFile(kept); err == nil {
		return b, nil
	}
	src, bin := filepath.Join(tmp, "src"), filepath.Join(tmp, "bb")
	env := golang.Default(golang.DisableCGO(), golang.WithGOOS("linux"), golang.WithGOARCH("amd64"),
		golang.WithBuildTag("goshliner")) // line editing without a terminal-UI framework
	lookup := findpkg.DefaultEnv()
	opts := &bb.Opts{Env: env, LookupEnv: &lookup, GenSrcDir: src, BinaryPath: bin, GenerateOnly: true}
	for _, c := range commands {
		opts.CommandPaths = append(opts.CommandPaths, uroot+c)
	}
	if err := bb.BuildBusybox(ulog.Null, opts); err != nil {
		return nil, err
	}
	main := filepath.Join(src, "src/bb.u-root.com/bb")
	if err := os.WriteFile(filepath.Join(main, "alias.go"), []byte(alias), 0o644); err != nil {
		return nil, err
	}
	// As bb itself builds what it generates.
	gopath := env.Copy(golang.WithGO111MODULE("off"), golang.WithGOPATH(src), golang.WithMod(""))
	if err := gopath.BuildDir(main, bin, &golang.BuildOpts{}); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	return b, writeAtomic(kept, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

// busyboxKey is the hash of what the busybox is made from: the commands, the
// modules' versions (go.sum pins them all) and the compiler.
func busyboxKey() (string, error) {
	gomod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s %s %q", runtime.Version(), commands, alias)
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(strings.TrimSpace(string(gomod))), name))
		if err != nil {
			return "", err
		}
		h.Write(b)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// entry is one file of the system distro's root.
type entry struct {
	name, content string // a link's target for links
	typ           byte
	mode          int64
}

// systemRoot lists the root of the system distro.
func systemRoot(bb []byte) []entry {
	dir := func(name string, mode int64) entry { return entry{name + "/", "", tar.TypeDir, mode} }
	file := func(name, content string) entry { return entry{name, content, tar.TypeReg, 0o644} }
	link := func(name, to string) entry { return entry{name, to, tar.TypeSymlink, 0o777} }
	root := []entry{
		dir(".", 0o755),
		dir("bin", 0o755), dir("dev", 0o755), dir("etc", 0o755), dir("mnt", 0o755), dir("proc", 0o555),
		dir("root", 0o700), dir("run", 0o755), dir("sys", 0o555), dir("tmp", 0o1777), dir("usr", 0o755), dir("var", 0o755),
		link("sbin", "bin"), link("usr/bin", "../bin"), link("usr/sbin", "../bin"), link("var/run", "../run"),
		file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
		file("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
		file("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
		file("etc/os-release", "NAME=\"wsl2 system distro\"\nID=wsl2-system\nPRETTY_NAME=\"wsl2 system distro (u-root)\"\n"),
		{"bin/bb", string(bb), tar.TypeReg, 0o755},
		link("bin/sh", "bb"),
	}
	for _, c := range commands {
		root = append(root, link(path.Join("bin", c), "bb"))
	}
	return root
}

// systemArchive packs the root as a gzipped tar.
func systemArchive(bb []byte) ([]byte, error) {
	var buf bytes.Buffer
	z, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	t := tar.NewWriter(z)
	for _, e := range systemRoot(bb) {
		h := &tar.Header{Typeflag: e.typ, Name: e.name, Mode: e.mode, Format: tar.FormatPAX}
		if e.typ == tar.TypeSymlink {
			h.Linkname = e.content
		} else {
			h.Size = int64(len(e.content))
		}
		if err := t.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
		if e.typ == tar.TypeReg {
			if _, err := io.WriteString(t, e.content); err != nil {
				return nil, fmt.Errorf("%s: %w", e.name, err)
			}
		}
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
