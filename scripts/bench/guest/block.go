package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// block measures direct I/O on a file: block FILE SIZE prepare, or
// block FILE SIZE MODE UNIT DEPTH COUNT, where MODE is randread, randwrite, read
// or write, UNIT the bytes of one request, DEPTH how many are under way at a
// time and COUNT how many there are in all. It prints the nanoseconds taken.
func block(args []string) error {
	if len(args) != 3 && len(args) != 6 {
		return errors.New("usage: block FILE SIZE prepare | block FILE SIZE MODE UNIT DEPTH COUNT")
	}
	path, mode := args[0], args[2]
	var n [4]int64
	for i, at := range []int{1, 3, 4, 5} {
		if at >= len(args) {
			break
		}
		var err error
		if n[i], err = strconv.ParseInt(args[at], 10, 64); err != nil {
			return err
		}
	}
	size, unit, depth, count := n[0], n[1], n[2], n[3]
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_DIRECT, 0o600)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	if mode == "prepare" {
		return prepare(fd, size)
	}
	write := mode == "write" || mode == "randwrite"
	random := mode == "randread" || mode == "randwrite"
	var next atomic.Int64
	worker := func(seed uint64) error {
		b, err := aligned(unit)
		if err != nil {
			return err
		}
		r := rand.New(rand.NewPCG(1, seed))
		for {
			i := next.Add(1) - 1
			if i >= count {
				return nil
			}
			at := i * unit % size
			if random {
				at = r.Int64N(size/unit) * unit
			}
			done := 0
			if write {
				done, err = unix.Pwrite(fd, b, at)
			} else {
				done, err = unix.Pread(fd, b, at)
			}
			if err != nil || done != len(b) {
				return fmt.Errorf("%s at %d: %d bytes of %d: %w", mode, at, done, len(b), err)
			}
		}
	}
	errs := make([]error, depth)
	start := time.Now()
	if depth == 1 {
		errs[0] = worker(1)
	} else {
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { errs[i] = worker(uint64(i)) })
		}
		wg.Wait()
	}
	took := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stdout, "%d\n", took.Nanoseconds())
	return err
}

// prepare fills the file, so that no request has to allocate.
func prepare(fd int, size int64) error {
	b, err := aligned(1 << 20)
	if err != nil {
		return err
	}
	for i := range b {
		b[i] = byte(i)
	}
	for at := int64(0); at < size; at += int64(len(b)) {
		if n, err := unix.Pwrite(fd, b, at); err != nil || n != len(b) {
			return fmt.Errorf("prepare: %d bytes at %d: %w", n, at, err)
		}
	}
	return unix.Fsync(fd)
}

func aligned(n int64) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("buffer: %w", err)
	}
	return b, nil
}
