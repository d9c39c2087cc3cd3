//go:build e2e

package main_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// ansible runs Ansible's own ad-hoc commands in the distro "one", with the connections that
// it keeps by default. Its modules are programs of Python's that it copies there.
func ansible(ctx context.Context, h *testsys.Host, config string) {
	h.TB.Helper()
	run := func(args ...string) testsys.Result {
		h.TB.Helper()
		cmd := exec.CommandContext(ctx, "ansible", append([]string{"all", "-i", "one.wsl2,", "--ssh-common-args", "-F " + config + " -o BatchMode=yes"}, args...)...)
		cmd.Env, cmd.Dir = append(h.Env, "ANSIBLE_NOCOLOR=1", "ANSIBLE_PYTHON_INTERPRETER=/usr/bin/python3"), h.Dir
		return h.Finish(ctx, cmd)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-m", "ping"}, `"ping": "pong"`},
		{[]string{"-u", "alice", "-m", "command", "-a", "id -un"}, "rc=0 >>\nalice"},
		{[]string{"-m", "copy", "-a", "content=copied dest=/root/by-ansible mode=0600"}, `"mode": "0600"`},
	} {
		r := run(c.args...)
		h.Want(r, 0)
		if !strings.Contains(r.Stdout, c.want) {
			h.TB.Errorf("%q is missing: %v", c.want, r)
		}
	}
	if r := run("-m", "command", "-a", "false"); r.Status != 2 || !strings.Contains(r.Stdout, "non-zero return code") {
		h.TB.Error(r)
	}
	if got := inside(h, "one", "cat /root/by-ansible"); got != "copied" {
		h.TB.Errorf("%q", got)
	}
}

// editorServer does what VS Code's Remote-SSH does: a script on the stdin of a shell starts a
// server that stays, tells its port and holds the connection, through whose -D the editor
// reaches the server; a later connection finds the server where it was.
func editorServer(ctx context.Context, h *testsys.Host, config string) {
	h.TB.Helper()
	const install = `
cd; mkdir -p .editor-server; cd .editor-server
if ! kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then
	echo "the page of $(id -un)" >page
	rm -f log
	nohup python3 -u -m http.server --bind 127.0.0.1 0 >log 2>&1 </dev/null &
	echo $! >pid
	echo started
fi
until port=$(sed -n 's/^Serving HTTP on .* port \([0-9]*\).*/\1/p' log | grep .); do :; done
echo "listeningOn==$port=="
cat >/dev/null
`
	for i, started := range []bool{true, false} {
		socks := freeAddress(h.TB)
		cmd := exec.CommandContext(ctx, "ssh", "-T", "-D", socks, "-F", config, "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-l", "alice", "one.wsl2", "bash", "-s")
		cmd.Env, cmd.Dir = h.Env, h.Dir
		in, err := cmd.StdinPipe()
		testsys.Must(h.TB, err)
		out, err := cmd.StdoutPipe()
		testsys.Must(h.TB, err)
		testsys.Must(h.TB, cmd.Start())
		_, err = io.WriteString(in, install)
		testsys.Must(h.TB, err)
		port, came := "", false
		for lines := bufio.NewScanner(out); port == "" && lines.Scan(); {
			came = came || lines.Text() == "started"
			if rest, ok := strings.CutPrefix(lines.Text(), "listeningOn=="); ok {
				port = strings.TrimSuffix(rest, "==")
			}
		}
		if port == "" || came != started {
			h.TB.Errorf("connection %d: port %q, started %v", i, port, came)
		}
		page, err := throughSOCKS(ctx, socks, "http://127.0.0.1:"+port+"/page")
		if err != nil || page != "the page of alice\n" {
			h.TB.Errorf("connection %d: %q, %v", i, page, err)
		}
		testsys.Must(h.TB, in.Close()) // the editor's window is closed
		if err := cmd.Wait(); err != nil {
			h.TB.Errorf("connection %d: %v", i, err)
		}
	}
	inside(h, "one", "kill $(cat ~alice/.editor-server/pid)")
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
