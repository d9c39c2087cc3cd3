package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// filesUnit is one sequential read or write; filesPage a random one.
const filesUnit, filesPage = 1 << 20, 4 << 10

// files measures a file system: files DIR JOB COUNT. It prints the nanoseconds that COUNT
// of the job took. The jobs build on each other: write before the ones on data,
// create before those on names, unlink last.
func files(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: files DIR JOB COUNT")
	}
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	data, names := filepath.Join(args[0], "data"), filepath.Join(args[0], "names")
	jobs := map[string]func() error{
		"write":     func() error { return sequential(data, true, count) },
		"read":      func() error { return sequential(data, false, count) },
		"randread":  func() error { return random(data, false, count) },
		"randwrite": func() error { return random(data, true, count) },
		"create": func() error {
			return eachName(names, count, func(dir int, name string) error { return openOne(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY) })
		},
		"stat": func() error {
			return eachName(names, count, func(dir int, name string) error {
				var st unix.Stat_t
				return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
			})
		},
		"open": func() error {
			return eachName(names, count, func(dir int, name string) error { return openOne(dir, name, unix.O_RDONLY) })
		},
		"unlink": func() error {
			return eachName(names, count, func(dir int, name string) error { return unix.Unlinkat(dir, name, 0) })
		},
		"readdir": func() error { return readdir(names, count) },
	}
	job := jobs[args[1]]
	if job == nil {
		return fmt.Errorf("unknown job %q", args[1])
	}
	if args[1] == "create" {
		if err := os.Mkdir(names, 0o755); err != nil {
			return err
		}
	}
	// What the job is to find it has to ask for.
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return err
	}
	start := time.Now()
	if err := job(); err != nil {
		return fmt.Errorf("%s in %s: %w", args[1], args[0], err)
	}
	_, err = fmt.Fprintf(os.Stdout, "%d\n", time.Since(start).Nanoseconds())
	return err
}

// sequential reads or writes a file of count units to its end.
func sequential(path string, write bool, count int) error {
	flags := os.O_RDONLY
	if write {
		flags = os.O_RDWR | os.O_CREATE | os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, filesUnit)
	for range count {
		if write {
			_, err = f.Write(b)
		} else {
			_, err = io.ReadFull(f, b)
		}
		if err != nil {
			return err
		}
	}
	if write {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// random reads or writes pages of the file, none of which is in a cache.
func random(path string, write bool, count int) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	b, err := aligned(filesPage)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range count {
		at, n := r.Int64N(st.Size/filesPage)*filesPage, 0
		if write {
			n, err = unix.Pwrite(fd, b, at)
		} else {
			n, err = unix.Pread(fd, b, at)
		}
		if err != nil || n != len(b) {
			return fmt.Errorf("%d bytes at %d: %w", n, at, err)
		}
	}
	return nil
}

// eachName does something with each of count names of a directory.
func eachName(path string, count int, what func(dir int, name string) error) error {
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	for i := range count {
		if err := what(dir, fmt.Sprintf("file%06d", i)); err != nil {
			return err
		}
	}
	return nil
}

func openOne(dir int, name string, flags int) error {
	fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// readdir lists a directory of count names.
func readdir(path string, count int) error {
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	b, found := make([]byte, 32<<10), 0
	var names []string
	for {
		n, err := unix.Getdents(dir, b)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(b[:n], -1, names[:0])
		found += len(names)
	}
	if found != count {
		return fmt.Errorf("%d names of %d", found, count)
	}
	return nil
}

// timed runs a program that prints nothing, once for its caches, and prints the nanoseconds that the second took.
func timed(argv []string) error {
	for run := range 2 {
		start := time.Now()
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil || len(out) > 0 {
			return fmt.Errorf("%q: %w: %.300s", argv, err, out)
		}
		if run == 1 {
			fmt.Fprintf(os.Stdout, "%d\n", time.Since(start).Nanoseconds())
		}
	}
	return nil
}

// mount mounts a file system: mount TYPE SOURCE DIR OPTIONS. A source vsock:PORT is a connection
// to the host, as v9fs' trans=fd has it.
func mount(args []string) error {
	if len(args) != 4 {
		return errors.New("usage: mount TYPE SOURCE DIR OPTIONS")
	}
	kind, source, dir, options := args[0], args[1], args[2], args[3]
	var port uint32
	if n, _ := fmt.Sscanf(source, "vsock:%d", &port); n == 1 {
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("vsock: %w", err)
		}
		defer unix.Close(fd) // the mount has its own
		if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
			return fmt.Errorf("connect to the host's port %d: %w", port, err)
		}
		options += fmt.Sprintf(",trans=fd,rfdno=%d,wfdno=%d", fd, fd)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, kind, 0, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, dir, err)
	}
	return nil
}
