//go:build e2e

package vsock_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/wsl2/wsl2/vmm"
	"github.com/wsl2/wsl2/vmm/virtio/vsock"
	"github.com/wsl2/wsl2/vmm/vmmtest"
)

// TestLinux holds the device against the driver it is made for. The guest's
// program echoes.
func TestLinux(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	console := &vmmtest.Console{}
	m, err := vmm.New(vmm.Config{
		Accel: vmm.AccelTCG, Kernel: vmmtest.Kernel(t), Initramfs: vmmtest.Initramfs(t),
		MemoryBytes: 256 << 20, CPUs: 2, GuestCID: 3, VsockPath: path, ConsoleLog: console,
		Shutdown: func(context.Context) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Timeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		m.Kill()
		<-m.Done()
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	}()
	console.Wait(t, "guest: ready")

	// echo sends size bytes, half-closes, and compares what comes back.
	echo := func(size int, seed byte) {
		c := vmmtest.Dial(t, path)
		defer c.Close()
		var sent, got [32]byte
		var wg sync.WaitGroup
		wg.Go(func() {
			h := sha256.New()
			w := io.MultiWriter(c, h)
			if _, err := io.WriteString(c, "echo\n"); err != nil {
				t.Error(err)
			}
			if _, err := io.CopyN(w, rand.NewChaCha8([32]byte{seed}), int64(size)); err != nil {
				t.Error(err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
			sent = [32]byte(h.Sum(nil))
		})
		h := sha256.New()
		n, err := io.Copy(h, c)
		got = [32]byte(h.Sum(nil))
		wg.Wait()
		if err != nil || n != int64(size) || got != sent {
			t.Errorf("%d bytes of %d came back, equal: %v, %v", n, size, got == sent, err)
		}
	}

	t.Run("stream", func(t *testing.T) { echo(32<<20, 1) })
	t.Run("connections", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() { echo(20_000, byte(i)) })
		}
		wg.Wait()
	})
	t.Run("refused", func(t *testing.T) {
		// Linux answers RST: no timeout plays a part.
		if _, err := vsock.Dial(ctx, path, 4242); !errors.Is(err, vsock.ErrRefused) {
			t.Errorf("Dial of a closed port: %v", err)
		}
	})
	t.Run("slow reader", func(t *testing.T) {
		c := vmmtest.Dial(t, path)
		defer c.Close()
		data := bytes.Repeat([]byte("slow"), 1<<20)
		var wg sync.WaitGroup
		wg.Go(func() {
			c.Write(append([]byte("echo\n"), data...))
			c.CloseWrite()
		})
		echo(1<<20, 7) // while nobody reads c
		got, err := io.ReadAll(c)
		wg.Wait()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes of %d came back, %v", len(got), len(data), err)
		}
	})
	t.Run("vanish", func(t *testing.T) {
		for range 100 {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			c.Write([]byte("CONNECT 1024\necho\nlost"))
			c.Close()
		}
		echo(1000, 9)
	})
}
