package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

const (
	// What an archive of a root holds: mostly small files, as a distro's; 500 MB. The
	// numbers of files are scaled: times are proportional to them, and the rig's are long.
	rootSmall, rootSmallSize = 20000, 12 << 10
	rootLarge, rootLargeSize = 120, 2 << 20

	cloneBytes = 2 << 30 // what the distro's disk that is cloned takes
	startRuns  = 10      // starts of a distro in a VM that runs

	// unpackHangs is how long moving a root may take, as hangs for the rest.
	unpackHangs = 300 * time.Second
)

// distros measures what is done with whole distros.
func distros(h *host) ([]report.Row, error) {
	archive := filepath.Join(h.dir, "large.tar")
	if err := largeRoot(archive); err != nil {
		return nil, err
	}
	vm, err := h.ours() // so that no row has the VM's boot in it
	if err != nil {
		return nil, err
	}
	timed := func(c *exec.Cmd) (float64, error) {
		var errs bytes.Buffer
		c.Stderr = &errs
		start := time.Now()
		err := superviseFor(time.Duration(scaled(int(unpackHangs))), c)
		ms := time.Since(start).Seconds() * 1e3
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, bytes.TrimSpace(errs.Bytes()))
		}
		logf("%.1f ms: %s", ms, strings.Join(c.Args[1:], " "))
		return ms, err
	}
	inGuest := func(script string) (float64, error) {
		return timed(h.wsl2("-d", distroName, "-e", "sh", "-c", script))
	}

	// The same archive to the guest's own disk, and unpacked there.
	in, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	send := h.wsl2("-d", distroName, "-e", "sh", "-c", "cat >/root/large.tar && sync && mkdir /root/large")
	send.Stdin = in
	if _, err := timed(send); err != nil {
		return nil, err
	}
	// Both from the disk, as an import's and an export's.
	const cold = "echo 3 >/proc/sys/vm/drop_caches"
	if _, err := inGuest(cold); err != nil {
		return nil, err
	}
	unpack, err := inGuest("tar xf /root/large.tar -C /root/large && sync")
	if err != nil {
		return nil, err
	}
	// As an export does, from the disk to an archive that is kept; and to none.
	var packs [2]float64
	for i, script := range []string{"tar cf /root/out.tar -C /root/large . && sync", "tar cf - -C /root/large . | cat >/dev/null"} {
		if _, err := inGuest(cold); err != nil {
			return nil, err
		}
		if packs[i], err = inGuest(script); err != nil {
			return nil, err
		}
	}
	imported, err := timed(h.wsl2("--import", "large", archive))
	if err != nil {
		return nil, err
	}
	exported, err := timed(h.wsl2("--export", "large", filepath.Join(h.dir, "out.tar")))
	if err != nil {
		return nil, err
	}

	// Another distro in the VM that runs, and a command in one that runs.
	var starts []float64
	for range startRuns {
		if _, err := h.run("--terminate", "large"); err != nil {
			return nil, err
		}
		ms, err := timed(h.wsl2("-d", "large", "-e", "true"))
		if err != nil {
			return nil, err
		}
		starts = append(starts, ms)
	}
	warm, err := repeat(func() error { return supervise(h.wsl2("-d", "large", "-e", "true")) })
	if err != nil {
		return nil, err
	}
	if err := vm.stop(); err != nil {
		return nil, err
	}
	clone, err := h.reflinkClone(timed)
	if err != nil {
		return nil, err
	}
	const inside, nowhere, command = "tar in the same guest", "tar to /dev/null", "warm command"
	bar := &report.Bar{Peer: inside, Factor: 1.5}
	return []report.Row{
		{Row: fmt.Sprintf("import of a root, %d MB in %d files", scaled(rootSmall*rootSmallSize+rootLarge*rootLargeSize)>>20, scaled(rootSmall+rootLarge)), Unit: "ms", Ours: imported, Peers: map[string]float64{inside: unpack}, Bar: bar},
		{Row: "export of it", Unit: "ms", Ours: exported, Peers: map[string]float64{inside: packs[0], nowhere: packs[1]}, Bar: bar},
		{Row: "clone of 2 GB on XFS", Unit: "ms", Ours: clone, Bar: &report.Bar{Factor: 1000}},
		{Row: "start of a second distro, p50", Unit: "ms", Ours: percentile(starts, 0.5), Peers: map[string]float64{command: percentile(warm, 0.5)},
			Bar: &report.Bar{Peer: command, Factor: 10}},
	}, nil
}

// largeRoot writes an archive of the distro with many files.
func largeRoot(path string) error {
	root, err := distroTar()
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for r := tar.NewReader(bytes.NewReader(root)); ; {
		header, err := r.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = w.WriteHeader(header)
		}
		if err == nil {
			_, err = io.Copy(w, r)
		}
		if err != nil {
			return err
		}
	}
	random := rand.NewChaCha8([32]byte{})
	content := make([]byte, max(rootSmallSize, rootLargeSize))
	small, large := scaled(rootSmall), scaled(rootLarge)
	for i := range small + large {
		name, size := fmt.Sprintf("usr/share/d%d/f%d", i/100, i), rootSmallSize
		if i >= small {
			name, size = fmt.Sprintf("usr/lib/l%d", i), rootLargeSize
		}
		random.Read(content[:size])
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(size)}); err != nil {
			return err
		}
		if _, err := w.Write(content[:size]); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), f.Close())
}

// reflinkClone clones a distro whose disk takes cloneBytes on a file system that
// shares blocks.
func (h *host) reflinkClone(timed func(*exec.Cmd) (float64, error)) (float64, error) {
	image, dir := filepath.Join(h.dir, "xfs.img"), filepath.Join(h.dir, "xfs")
	f, err := os.Create(image)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(f.Truncate(3*cloneBytes), f.Close(), os.Mkdir(dir, 0o700)); err != nil {
		return 0, err
	}
	for _, argv := range [][]string{{"mkfs.xfs", "-q", image}, {busyboxPath, "mount", "-t", "xfs", "-o", "loop", image, dir}} {
		c := exec.Command(argv[0], argv[1:]...)
		c.Env = h.env
		if argv[0] == "mkfs.xfs" {
			c.Path, c.Err = "/rig/bin/mkfs.xfs", nil
		}
		if out, err := c.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%s: %w: %s", argv[0], err, out)
		}
	}
	defer unix.Unmount(dir, 0)
	if _, err := h.run("--import", "xfs", filepath.Join(dir, "distro"), filepath.Join(h.dir, "root.tar")); err != nil {
		return 0, err
	}
	disk, err := os.OpenFile(filepath.Join(dir, "distro/disk.ext4"), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer disk.Close()
	// Extents, as much as 2 GB of them: nothing is read from a clone, so what they hold is all the same.
	if err := unix.Fallocate(int(disk.Fd()), 0, 0, cloneBytes); err != nil {
		return 0, fmt.Errorf("allocate the disk: %w", err)
	}
	if err := errors.Join(disk.Sync(), disk.Close()); err != nil {
		return 0, err
	}
	ms, err := timed(h.wsl2("--manage", "xfs", "--clone", "clone", "--location", filepath.Join(dir, "clone")))
	if err != nil {
		return 0, err
	}
	return ms, h.stop()
}
