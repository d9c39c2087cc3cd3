// Command initramfs builds the initramfs of the VM: /init (cmd/init) and, packed
// beside it, the root of the system distro, u-root's commands and shell as one
// busybox binary.
//
// The same inputs give the same bytes: nothing of the time, the user, the
// machine or the directory gets in. Boot time counts every byte that the kernel copies
// to its root, so the system distro stays where it is, and compressed, until it is
// asked for: see packed.
//
//	go run ./scripts/initramfs -o out/initramfs.cpio -init out/wsl2-init
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/u-root/u-root/pkg/cpio"
)

func main() {
	out := flag.String("o", "out/initramfs.cpio", "file to write")
	initOut := flag.String("init", "", "file to write /init to as well, for distros of version 1")
	cache := flag.String("cache", "", "directory that keeps the system distro's busybox between builds (default: beside the output)")
	version := flag.String("version", "unknown", "what wslinfo --version says in the guest")
	flag.Parse()
	if *cache == "" {
		*cache = filepath.Join(filepath.Dir(*out), ".initramfs")
	}
	if err := build(*out, *initOut, *cache, *version); err != nil {
		fmt.Fprintln(os.Stderr, "initramfs:", err)
		os.Exit(1)
	}
}

func build(out, initOut, cache, version string) error {
	tmp, err := os.MkdirTemp("", "wsl2-initramfs-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	bb, err := busybox(cache, tmp)
	if err != nil {
		return fmt.Errorf("build the system distro's commands: %w", err)
	}
	system, err := systemArchive(bb)
	if err != nil {
		return fmt.Errorf("pack the system distro: %w", err)
	}
	init, err := buildInit(filepath.Join(tmp, "init"), version)
	if err != nil {
		return fmt.Errorf("build /init: %w", err)
	}
	if err := writeAtomic(out, func(w io.Writer) error { return writeCPIO(w, init, system) }); err != nil {
		return err
	}
	if initOut != "" {
		err := writeAtomic(initOut, func(w io.Writer) error { _, err := w.Write(init); return err })
		if err == nil {
			err = os.Chmod(initOut, 0o755)
		}
		if err != nil {
			return err
		}
	}
	st, err := os.Stat(out)
	if err != nil {
		return err
	}
	fmt.Printf("%s: %d bytes (/init %d, system distro %d packed)\n", out, st.Size(), len(init), len(system))
	return nil
}

// buildInit compiles cmd/init.
func buildInit(path, version string) ([]byte, error) {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid= -X github.com/wsl2/wsl2/guest/tools.Version="+version, "-o", path, "github.com/wsl2/wsl2/cmd/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// writeCPIO writes the archive. /dev/console and /dev/null must be there before
// devtmpfs is: the kernel opens the one for PID 1, Go's runtime the other.
func writeCPIO(w io.Writer, init, system []byte) error {
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.Directory("proc", 0o555),
		cpio.Directory("sys", 0o555),
		cpio.Directory("distro", 0o755),
		cpio.StaticFile("init", string(init), 0o755),
		packed("system.tar.gz", system),
	}
	cpio.MakeAllReproducible(records)
	rw := cpio.Newc.Writer(w)
	if err := cpio.WriteRecords(rw, records); err != nil {
		return err
	}
	return cpio.WriteTrailer(rw)
}

// packed is a file that the kernel does not unpack: the content of what is neither
// a file nor a link it passes over (init/initramfs.c, do_header). /init reads it in
// the archive itself (package distro), which the kernel keeps if its command line
// says retain_initrd.
func packed(name string, content []byte) cpio.Record {
	return cpio.StaticRecord(content, cpio.Info{Name: name, Mode: cpio.S_IFIFO | 0o444})
}

// writeAtomic replaces path with what write produces, or leaves it alone.
func writeAtomic(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
