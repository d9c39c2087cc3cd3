package native

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/nsinit"
	"github.com/wsl2/wsl2/launcher/api"
)

// Check is one thing that version 1 needs of a host. Next is what to do, "" if it is there and nobody has to.
type Check struct{ Name, Detail, Next string }

// Checks are all of them, for the user who runs wsl2; init is /init as a program of the host.
func Checks(init string) (all []Check) {
	user, err := thisUser()
	if err != nil {
		return []Check{{"users", err.Error(), "make it readable"}}
	}
	all = append(all, checkNamespaces("/proc/sys", user.root(), init))
	if !user.root() {
		for _, tool := range []string{"newuidmap", "newgidmap"} {
			all = append(all, checkTool(tool))
		}
	}
	return append(all, user.check())
}

// sysctls are those that keep users from having the namespaces of a distro, outer and inner, by the values with which they do not.
var sysctls = []struct {
	path        string
	least, most int
	next        string
}{
	{"user/max_user_namespaces", 2, math.MaxInt, "sysctl -w user.max_user_namespaces=10000"},
	{"user/max_mnt_namespaces", 2, math.MaxInt, "sysctl -w user.max_mnt_namespaces=10000"},
	{"user/max_cgroup_namespaces", 2, math.MaxInt, "sysctl -w user.max_cgroup_namespaces=10000"},
	{"user/max_pid_namespaces", 1, math.MaxInt, "sysctl -w user.max_pid_namespaces=10000"},
	{"user/max_uts_namespaces", 1, math.MaxInt, "sysctl -w user.max_uts_namespaces=10000"},
	{"user/max_ipc_namespaces", 1, math.MaxInt, "sysctl -w user.max_ipc_namespaces=10000"},
	{"kernel/unprivileged_userns_clone", 1, math.MaxInt, "sysctl -w kernel.unprivileged_userns_clone=1"},               // Debian's
	{"kernel/apparmor_restrict_unprivileged_userns", 0, 0, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"}, // Ubuntu's
}

// checkTimeout is what /init gets to say what it is for.
const checkTimeout = 10 * time.Second

// checkNamespaces asks the sysctls below dir, then the kernel. The last of the sysctls does not hold for root; the others do
// for the inner of the two user namespaces.
func checkNamespaces(dir string, root bool, init string) Check {
	c := Check{Name: "namespaces", Detail: "this user may make them"}
	for i, s := range sysctls {
		text, err := os.ReadFile(filepath.Join(dir, s.path))
		value, nerr := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || nerr != nil || s.least <= value && value <= s.most || root && i == len(sysctls)-1 {
			continue
		}
		c.Detail = fmt.Sprintf("%s is %d: this user may not make those of a distro", strings.ReplaceAll(s.path, "/", "."), value)
		c.Next = "as root: " + s.next + " (and a line in /etc/sysctl.d, to keep it)"
		return c
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), checkTimeout, fmt.Errorf("%s does not end in them within %v", init, checkTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, init) // which says what it is for, and ends
	cmd.Args[0] = nsinit.Argv0
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces}
	err := cmd.Run()
	if errors.As(err, new(*exec.ExitError)) {
		err = nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		e := api.AsError(refusal(err))
		c.Detail, c.Next = e.Text, e.Hint
		if c.Next == "" {
			c.Next = "`make build` makes it beside wsl2"
		}
	}
	return c
}

// checkTool: the tool has to be there, and to be root's when it runs.
func checkTool(name string) Check {
	c := Check{Name: name}
	path, err := exec.LookPath(name)
	if err != nil {
		c.Detail, c.Next = "is not installed", "install it (Debian's package is uidmap)"
		return c
	}
	st, err := os.Stat(path)
	if err != nil {
		c.Detail, c.Next = err.Error(), "install it anew"
		return c
	}
	if st.Mode()&os.ModeSetuid == 0 {
		if _, err := unix.Getxattr(path, "security.capability", nil); err != nil { // as Fedora has it
			c.Detail, c.Next = path+" is not setuid root", "as root: chmod u+s "+path
			return c
		}
	}
	c.Detail = path
	return c
}

// check is whether the user has IDs, and nobody else has them.
func (u hostUser) check() Check {
	c := Check{Name: "ID ranges"}
	m, err := u.newMap()
	if err != nil {
		e := api.AsError(err)
		c.Detail, c.Next = e.Text, e.Hint
		return c
	}
	if w := u.overlaps(m); len(w) > 0 {
		c.Detail, c.Next = w[0], separate
		return c
	}
	c.Detail = "users are " + describe(m.UIDs) + ", groups " + describe(m.GIDs)
	return c
}

func describe(list []Extent) string {
	var all []string
	for _, e := range list {
		if e.Count == 1 {
			all = append(all, strconv.FormatUint(uint64(e.Outside), 10))
		} else {
			all = append(all, fmt.Sprintf("%d-%d", e.Outside, uint64(e.Outside)+uint64(e.Count)-1))
		}
	}
	return strings.Join(all, ", ")
}
