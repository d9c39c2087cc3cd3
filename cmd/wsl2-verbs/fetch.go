package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/wsl2/wsl2/images"
)

// fetch is a wsl2-fetch under way: its Read is the archive that it brings, which
// ends in an error unless all of it came.
type fetch struct {
	// Name is that of the distro, "" if the archive has to say.
	Name string
	// Total is how many bytes are to be fetched, 0 if that is not known.
	Total int64

	out    io.ReadCloser
	end    func() error // waits for its end, once
	cancel context.CancelFunc
}

// startFetch runs the program exe. notice is told what the user has to know, progress
// what has come; both by another goroutine, until Close has returned.
func startFetch(ctx context.Context, exe string, args []string, notice func(string), progress images.Progress) (*fetch, error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var stderr strings.Builder
	cmd.Stderr = &stderr
	r, w, err := os.Pipe()
	if err != nil {
		cancel()
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{w}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = startBound(ctx, cmd)
	}
	w.Close()
	if err != nil {
		r.Close()
		cancel()
		return nil, err
	}
	f := &fetch{out: out, cancel: cancel}
	first := make(chan struct{}) // closed when its first event is here, or it says nothing
	told := make(chan error, 1)
	go func() {
		defer r.Close()
		told <- f.events(r, sync.OnceFunc(func() { close(first) }), notice, progress)
	}()
	f.end = sync.OnceValue(func() error {
		failed := <-told
		err := cmd.Wait()
		cancel()
		switch {
		case failed != nil:
			return failed
		case err != nil:
			return fmt.Errorf("wsl2-fetch: %w: %s", err, strings.TrimSpace(stderr.String()))
		}
		return nil
	})
	<-first
	return f, nil
}

// startBound starts a process that does not outlive this one: Pdeathsig is the end
// of the thread that started it, which therefore stays until ctx ends.
func startBound(ctx context.Context, cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		started <- cmd.Start()
		<-ctx.Done()
	}()
	return <-started
}

// events reads what the program tells and returns the error that it ended with.
func (f *fetch) events(r io.Reader, first func(), notice func(string), progress images.Progress) error {
	defer first()
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e images.FetchEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("wsl2-fetch: %w", err)
		}
		if e.Notice != "" {
			notice(e.Notice)
		}
		switch {
		case e.Error != "":
			return errors.New(e.Error)
		case e.Name != "":
			f.Name, f.Total = e.Name, e.Total
			first()
		case e.Notice != "": // the name follows
		default:
			first()
			if progress != nil {
				progress(e.Done, e.Total)
			}
		}
	}
	return lines.Err()
}

func (f *fetch) Read(p []byte) (int, error) {
	n, err := f.out.Read(p)
	if err == io.EOF {
		if ferr := f.end(); ferr != nil {
			err = ferr
		}
	}
	return n, err
}

// Close ends the program if it still runs, and returns why it failed, if it has.
func (f *fetch) Close() error {
	f.out.Close() // it gets EPIPE, whatever it does
	f.cancel()
	return f.end()
}
