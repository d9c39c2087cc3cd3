//go:build e2e

package main_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// editorServer does what VS Code's Remote-SSH does: a script on the stdin of a shell starts a
// server that stays, tells its port and holds the connection, through whose -D the editor
// reaches the server; a later connection finds the server where it was.
func editorServer(ctx context.Context, t *testing.T, h *testsys.Host, config string) {
	t.Helper()
	// Not one of those that the host gives to whoever connects.
	port := 27113
	if version1() { // which has the host's ports, and those of other tests' VMs among them
		port++
	}
	install := fmt.Sprintf(`
mkdir -p ~/.editor-server && cd ~/.editor-server
if ! [ -s pid ] || ! kill -0 "$(cat pid)" 2>/dev/null; then
	echo "the page of $(id -un)" >page
	setsid httpd -f -p 127.0.0.1:%[1]d >log 2>&1 </dev/null &
	echo $! >pid
	echo started
fi
until grep -q ':%04[1]X .* 0A ' /proc/net/tcp; do :; done
echo listeningOn==%[1]d==
cat >/dev/null
`, port)
	for i, started := range []bool{true, false} {
		socks := freeAddress(t)
		cmd := exec.CommandContext(ctx, "ssh", "-T", "-D", socks, "-F", config, "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-l", "alice", "small.wsl2", "sh", "-s")
		cmd.Env, cmd.Dir = h.Env, h.Dir
		in, err := cmd.StdinPipe()
		testsys.Must(t, err)
		out, err := cmd.StdoutPipe()
		testsys.Must(t, err)
		testsys.Must(t, cmd.Start())
		_, err = io.WriteString(in, install)
		testsys.Must(t, err)
		listens, came := fmt.Sprintf("listeningOn==%d==", port), false
		for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != listens; {
			came = came || lines.Text() == "started"
		}
		if came != started {
			t.Errorf("connection %d: started %v", i, came)
		}
		page, err := throughSOCKS(ctx, socks, fmt.Sprintf("http://127.0.0.1:%d/page", port))
		if err != nil || page != "the page of alice\n" {
			t.Errorf("connection %d: %q, %v", i, page, err)
		}
		testsys.Must(t, in.Close()) // the editor's window is closed
		if err := cmd.Wait(); err != nil {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	h.OK("-d", "small", "-u", "alice", "-e", "sh", "-c", "kill $(cat ~/.editor-server/pid)")
}

// freeAddress is an address of this host where nobody listens, nor will: others take 127.0.0.1.
func freeAddress(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.52.1:0")
	testsys.Must(tb, err)
	defer l.Close()
	return l.Addr().String()
}

// throughSOCKS gets a page through a SOCKS server.
func throughSOCKS(ctx context.Context, server, page string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "socks5", Host: server}), DisableKeepAlives: true}}
	r, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	return string(text), err
}
