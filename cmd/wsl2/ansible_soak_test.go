//go:build e2e && soak

package main_test

import (
	"context"
	"os/exec"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/testsys"
)

// TestAnsible runs Ansible's own ad-hoc commands in a Debian, over connections that it keeps
// for the next command, as by default. Its modules are programs of Python's that it copies there.
func TestAnsible(t *testing.T) {
	h := testsys.New(t)
	h.Config("[wsl2]", "defaultVhdSize=4GB")
	if version1() {
		h.OK("--set-default-version", "1")
	}
	h.OK("--import", "one", bootstrap(t, h, "python3"))
	config, control := h.File("ssh_config", []byte(h.OK("ssh-config"))), h.Path("control-%r")
	ctx, cancel := context.WithTimeout(t.Context(), 3*testsys.Deadline)
	defer cancel()
	run := func(name string, args ...string) testsys.Result {
		t.Helper()
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env, cmd.Dir = append(h.Env, "ANSIBLE_NOCOLOR=1", "ANSIBLE_PYTHON_INTERPRETER=/usr/bin/python3",
			"ANSIBLE_SSH_ARGS=-F "+config+" -o BatchMode=yes -o ControlMaster=auto -o ControlPersist=yes -o ControlPath="+control), h.Dir
		return h.Finish(ctx, cmd)
	}
	adHoc := func(args ...string) testsys.Result {
		t.Helper()
		return run("ansible", append([]string{"all", "-i", "one.wsl2,"}, args...)...)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-u", "root", "-m", "ping"}, `"ping": "pong"`},
		{[]string{"-u", "alice", "-m", "command", "-a", "id -un"}, "rc=0 >>\nalice"},
		{[]string{"-u", "root", "-m", "copy", "-a", "content=copied dest=/root/by-ansible mode=0600"}, `"mode": "0600"`},
	} {
		r := adHoc(c.args...)
		h.Want(r, 0)
		if !strings.Contains(r.Stdout, c.want) {
			t.Errorf("%q is missing: %v", c.want, r)
		}
	}
	if r := adHoc("-u", "root", "-m", "command", "-a", "false"); r.Status != 2 || !strings.Contains(r.Stdout, "non-zero return code") {
		t.Error(r)
	}
	if got := inside(h, "one", "cat /root/by-ansible"); got != "copied" {
		t.Errorf("%q", got)
	}
	for _, user := range []string{"root", "alice"} { // they outlive Ansible
		h.Want(run("ssh", "-F", config, "-o", "ControlPath="+control, "-O", "exit", "-l", user, "one.wsl2"), 0)
	}
}
