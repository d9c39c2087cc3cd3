// Command wsl2-net is the network of a VM (package vmm/usernet), an executable of its own
// so that no command pays for the start of a TCP/IP stack.
package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/launcher/netproc"
	"github.com/wsl2/wsl2/vmm/usernet"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "wsl2-net: %v\n", err)
		os.Exit(125)
	}
}

func run() error {
	// ^C in the terminal whose command started the service is not for the VM.
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	c, err := netproc.Parse(os.Args[1:])
	if err != nil {
		return err
	}
	unix.CloseOnExec(netproc.Link)
	n, err := usernet.New(usernet.Config{
		GuestMAC: netproc.GuestMAC, GatewayMAC: netproc.GatewayMAC, MTU: netproc.MTU,
		Guest4: netip.MustParseAddr(netproc.Guest4), Gateway4: netip.MustParseAddr(netproc.Gateway4),
		Guest6: netip.MustParseAddr(netproc.Guest6), Gateway6: netip.MustParseAddr(netproc.Gateway6),
		HostLoopback: c.HostLoopback, Policy: c.Policy, BytesPerSecond: c.BytesPerSecond, DNS: usernet.DNSConfig{Names: c.Names}, Logf: logf,
	}, netproc.Link)
	if err != nil {
		return err
	}
	return n.Serve(ctx)
}

// logf writes to the service's log.
func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "time=%s wsl2-net: %s\n", time.Now().Format(time.RFC3339), fmt.Sprintf(format, args...))
}
