//go:build e2e

package main_test

import (
	"context"
	"os"
	"os/exec"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestHostCertificates: authorities that this host's administrator has added are put where a distro has its own, and
// the distro's program is run; and they go when they are not wanted any more.
func TestHostCertificates(t *testing.T) {
	h := newHost(t)
	h.Config("[network]", "hostCertificates = true")
	ctx, cancel := context.WithTimeout(t.Context(), testsys.Deadline)
	defer cancel()
	// The service, which the first command starts, sees another directory than this host's.
	flags := "-m"
	if os.Geteuid() != 0 {
		flags = "-rm"
	}
	const other = `mount -t tmpfs none /usr/local/share && mkdir /usr/local/share/ca-certificates &&
		printf -- '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n' >/usr/local/share/ca-certificates/corp.crt && exec "$0" "$@"`
	const store = `mkdir -p /usr/local/share/ca-certificates /usr/sbin; cd /usr/sbin
		printf '#!/bin/sh\ncat /usr/local/share/ca-certificates/* >/srv/new; mv /srv/new /srv/bundle\n' >update-ca-certificates; chmod 755 update-ca-certificates`
	wsl := h.Cmd(ctx, "-d", "small", "-u", "root", "-e", "sh", "-c", store)
	cmd := exec.CommandContext(ctx, "unshare", append([]string{flags, "sh", "-c", other}, wsl.Args...)...)
	cmd.Env, cmd.Dir = wsl.Env, wsl.Dir
	h.Want(h.Finish(ctx, cmd), 0)

	h.OK("--terminate", "small")
	const want = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
	if out := inside(h, "small", "until [ -s /srv/bundle ]; do :; done; cat /srv/bundle /usr/local/share/ca-certificates/wsl2-host-1.crt"); out != want+"\n"+want {
		t.Errorf("%q", out)
	}
	h.OK("--terminate", "small")
	h.Config("[network]", "hostCertificates = false")
	if out := inside(h, "small", "while [ -s /srv/bundle ]; do :; done; ls /usr/local/share/ca-certificates"); out != "" {
		t.Errorf("what is not wanted any more is there: %q", out)
	}
}
