// Command guest is the /init of the block device's test guest: it works on
// /dev/vda raw and mounts /dev/vdb, through Linux's own driver, and prints what
// the test on the host compares.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	diskBytes              = 64 << 20
	blkDiscard, blkZeroOut = 0x1277, 0x127f
	fitrim                 = 0xc0185879
)

func main() {
	if err := run(); err != nil {
		fmt.Println("blk guest: failed:", err)
	} else {
		fmt.Println("blk guest: done")
	}
	for {
		_ = unix.Pause() // the host ends the machine; a select{} alone would be a deadlock to the runtime
	}
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{{"attributes", attributes}, {"parallel I/O", parallelIO}, {"ranges", ranges}, {"file system", fileSystem}} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Println("blk guest: passed:", step.name)
	}
	return nil
}

// attributes are what Linux made of the configuration space.
func attributes() error {
	for name, want := range map[string]string{
		"size": fmt.Sprint(diskBytes / 512), "serial": "e2e-disk",
		"queue/logical_block_size": "512", "queue/physical_block_size": "4096",
		"queue/write_cache": "write back", "queue/discard_granularity": "4096",
		"queue/max_segments": "254", "ro": "0",
	} {
		b, err := os.ReadFile("/sys/block/vda/" + name)
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			return fmt.Errorf("%s is %q, want %q (%v)", name, got, want, err)
		}
	}
	for _, name := range []string{"queue/discard_max_bytes", "queue/write_zeroes_max_bytes"} {
		if b, err := os.ReadFile("/sys/block/vda/" + name); err != nil || strings.TrimSpace(string(b)) == "0" {
			return fmt.Errorf("%s is %q (%v)", name, b, err)
		}
	}
	return nil
}

// aligned returns n bytes that direct I/O takes.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	return b[4096-int(uintptr(unsafe.Pointer(&b[0]))%4096):][:n]
}

// parallelIO writes, flushes and reads back at random places, from 8 threads
// with a stripe each.
func parallelIO() error {
	f, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const workers, stripe = 8, diskBytes / 8
	errs := make(chan error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			bits := rand.NewChaCha8([32]byte{byte(w)})
			r := rand.New(bits)
			model, buf := aligned(stripe), aligned(1<<20)
			if _, err := f.ReadAt(model, int64(w*stripe)); err != nil {
				errs <- err
				return
			}
			for i := range 30 {
				n := 512 * (1 + r.IntN(2048))
				off := 512 * r.IntN((stripe-n)/512)
				p, at := buf[:n], int64(w*stripe+off)
				if i%3 != 2 {
					_, _ = bits.Read(p)
					copy(model[off:], p)
					if _, err := f.WriteAt(p, at); err != nil {
						errs <- fmt.Errorf("write %d at %d: %w", n, at, err)
						return
					}
				} else if _, err := f.ReadAt(p, at); err != nil || !bytes.Equal(p, model[off:off+n]) {
					errs <- fmt.Errorf("read %d at %d differs (%v)", n, at, err)
					return
				}
				if i%10 == 9 {
					if err := f.Sync(); err != nil {
						errs <- fmt.Errorf("fsync: %w", err)
						return
					}
				}
			}
		}()
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	return printHash("written")
}

func printHash(what string) error {
	f, err := os.Open("/dev/vda")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	fmt.Printf("blk guest: %s %x\n", what, h.Sum(nil))
	return nil
}

func ioctlRange(f *os.File, req uintptr, off, n uint64) error {
	r := [2]uint64{off, n}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}

// ranges discards the first half of the disk, and zeroes a part of the second.
func ranges() error {
	f, err := os.OpenFile("/dev/vda", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := ioctlRange(f, blkDiscard, 0, diskBytes/2); err != nil {
		return fmt.Errorf("BLKDISCARD: %w", err)
	}
	if err := ioctlRange(f, blkZeroOut, diskBytes/2+512, 5<<20); err != nil {
		return fmt.Errorf("BLKZEROOUT: %w", err)
	}
	b := make([]byte, 5<<20)
	for _, off := range []int64{0, diskBytes/2 - 5<<20, diskBytes/2 + 512} {
		if _, err := f.ReadAt(b, off); err != nil || !bytes.Equal(b, make([]byte, len(b))) {
			return fmt.Errorf("bytes at %d are not 0 (%v)", off, err)
		}
	}
	return printHash("trimmed")
}

// fileSystem fills an ext4, empties it and trims it.
func fileSystem() error {
	if err := os.Mkdir("/mnt", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/vdb", "/mnt", "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i * 7)
	}
	f, err := os.Create("/mnt/big")
	if err != nil {
		return err
	}
	for range 40 {
		if _, err := f.Write(data); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	fmt.Println("blk guest: filled")
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Remove("/mnt/big"); err != nil {
		return err
	}
	d, err := os.Open("/mnt")
	if err != nil {
		return err
	}
	unix.Sync()
	r := [3]uint64{0, 1<<64 - 1, 0}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), fitrim, uintptr(unsafe.Pointer(&r)))
	d.Close()
	if errno != 0 {
		return fmt.Errorf("FITRIM: %w", errno)
	}
	if r[1] < 40<<20 {
		return fmt.Errorf("trimmed %d bytes only", r[1])
	}
	if err := os.WriteFile("/mnt/kept", []byte("kept\n"), 0o644); err != nil {
		return err
	}
	return unix.Unmount("/mnt", 0)
}
