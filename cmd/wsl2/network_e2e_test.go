//go:build e2e

package main_test

import (
	"fmt"
	"strings"
	"testing"
)

func TestNetwork(t *testing.T) { network(newHost(t)) }

// TestNetworkRules: what wslconfig forbids is refused, and told; and without a network
// there is none.
func TestNetworkRules(t *testing.T) {
	h := newHost(t)
	allowed, other := loopbackServer(t, []byte("allowed\n")), loopbackServer(t, []byte("other\n"))
	h.Config("[network]", fmt.Sprintf("allow = host.wsl2.internal:%d", allowed))
	if r := h.Run("-d", "small", "-e", "wget", "-q", "-O", "-", fmt.Sprintf("http://host.wsl2.internal:%d/", allowed)); r.Stdout != "allowed\n" {
		t.Errorf("what is allowed: %v", r)
	}
	for _, to := range []string{fmt.Sprintf("10.77.0.1:%d", other), "192.0.2.1:80"} {
		if r := h.Run("-d", "small", "-e", "wget", "-O", "-", "http://"+to+"/"); r.Status == 0 || !strings.Contains(r.Stderr, "No route to host") {
			t.Errorf("what is not: %v", r)
		}
		if log := serviceLog(h); !strings.Contains(log, "refused: TCP to "+to) {
			t.Errorf("%s is not in the log: %s", to, log)
		}
	}
	h.Setenv("HTTPS_PROXY", "http://localhost:1234")
	if out := h.OK("-d", "small", "-e", "env"); !strings.Contains(out, "HTTPS_PROXY=http://host.wsl2.internal:1234\n") {
		t.Errorf("the caller's proxy: %s", out)
	}
	h.OK("--shutdown")
	h.Config("[wsl2]", "networkingMode = none")
	if r := h.Run("-d", "small", "-e", "sh", "-c", "ls /sys/class/net; wget -O - http://10.77.0.1/"); strings.Contains(r.Stdout, "eth0") || !strings.Contains(r.Stderr, "unreachable") {
		t.Errorf("without a network: %v", r)
	}
}
