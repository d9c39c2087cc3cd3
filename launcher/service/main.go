package service

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/config"
	"github.com/wsl2/wsl2/launcher/vmproc"
)

// FDListener is the listening socket that whoever starts the service hands over.
const FDListener = 3

// lockTimeout bounds the wait for an earlier service to end.
const lockTimeout = 90 * time.Second

// Main is the `wsl2 service` process: it serves the socket on FDListener until
// nothing is left to do. Its stderr is its log.
func Main(paths config.Paths) error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("pid", os.Getpid())

	f := os.NewFile(FDListener, "listener")
	nl, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("`wsl2 service` is run by other commands, not by hand (%w)", err)
	}
	l, ok := nl.(*net.UnixListener)
	if !ok {
		nl.Close()
		return fmt.Errorf("descriptor %d is no unix socket", FDListener)
	}
	l.SetUnlinkOnClose(true)
	wait, cancel := context.WithTimeoutCause(ctx, lockTimeout, fmt.Errorf("an earlier service has not ended within %v", lockTimeout))
	lock, err := lockFile(wait, paths.ServiceLock())
	cancel()
	if err != nil {
		l.Close()
		return err
	}
	defer lock.Close()
	if err := os.MkdirAll(paths.Data, 0o700); err != nil {
		l.Close()
		return err
	}
	start := func(ctx context.Context, c vmproc.Config, lock *os.File, diskError func(int, error)) (Process, error) {
		p, err := vmproc.Start(ctx, vmproc.Command{Path: "/proc/self/exe", Args: []string{"vm"}}, c, lock, os.Stderr, diskError)
		if err != nil {
			return nil, err
		}
		return p, nil
	}
	boot := &Booter{Paths: paths, Start: start, Getenv: os.Getenv, Log: log}
	n := &Native{Paths: paths, Log: log}
	n.Sweep()
	log.Info("service started", "version", api.Version)
	err = New(Config{Paths: paths, Boot: boot.Boot, Log: log, Self: api.Self(), Tools: packTools, Native: n.Boot, RemoveRoot: n.Remove}).Serve(ctx, l)
	log.Info("service ends", "err", err)
	return err
}

// packTools has wsl2-verbs pack the tools.
func packTools(ctx context.Context) ([]byte, error) {
	path, err := config.FindVerbs()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, "tools")
	cmd.Args[0] = self
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("pack e2fsprogs for the guest: %w: %s", err, strings.TrimPrefix(strings.TrimSpace(stderr.String()), "wsl2: "))
	}
	return out, nil
}
