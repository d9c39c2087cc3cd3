//go:build e2e

package main_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/internal/testsys"
)

// posixSuite builds the suite of package posixtest where the distro finds it.
func posixSuite(t *testing.T, home string) {
	t.Helper()
	build := exec.Command("go", "test", "-c", "-o", home+"/posix", "./internal/posixtest")
	build.Dir, build.Env = testsys.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestShareTransports: the first share is a virtio-fs device, another says that it wants 9P; both
// are what the guest's own file system is, but for what docs/files.md tells.
func TestShareTransports(t *testing.T) {
	h := newHost(t)
	home, data := h.Path("home"), h.Path("data9p")
	testsys.Must(t, os.MkdirAll(data, 0o755))
	posixSuite(t, home)
	h.Config("[shares]", "data = "+data+", transport=9p")
	script := func(text string) string {
		t.Helper()
		r := in(h, home, "-e", "sh", "-c", text)
		h.Want(r, 0)
		return r.Stdout
	}
	if out := script("ls /mnt/data; grep -E ' /mnt/(host|data) ' /proc/mounts | cut -d' ' -f2,3 | grep -v autofs | sort"); out != "/mnt/data 9p\n/mnt/host virtiofs\n" {
		t.Fatalf("mounted are %q", out)
	}
	// What either side changes, the other sees at once.
	for _, text := range []string{"one\n", "and two\n", ""} {
		testsys.Must(t, os.WriteFile(home+"/f", []byte(text), 0o644))
		if out := script("cat f; stat -c %s f"); !strings.HasPrefix(out, text) {
			t.Errorf("%q, want %q", out, text)
		}
	}
	script("echo guest >f; mkdir -p d; chmod 4755 f; mv f d/g")
	st, err := os.Stat(filepath.Join(home, "d", "g"))
	if err != nil || st.Mode() != 0o755 || st.Size() != 6 {
		t.Errorf("%v, %v", st, err)
	}
	tool(t, home, "inotify")
	tool(t, home, "lock")
	hostChanges(t, h, "/mnt/host/d", home+"/d", true)
	hostChanges(t, h, "/mnt/data", data, false) // v9fs: below its root inotify does not see the distro's own changes either
	manyEntries(t, h, "/mnt/host", home)
	manyEntries(t, h, "/mnt/data", data)
	lockWaits(t, h, "/mnt/host", home)
	lockWaits(t, h, "/mnt/data", data)
	for dir, mount := range map[string]string{"/root": "ext4", "/mnt/host": "virtio-fs", "/mnt/data": "9P"} {
		r := in(h, home, "-e", "sh", "-c", fmt.Sprintf("WSL2_POSIX_DIR=%s WSL2_POSIX_EVERY=%d WSL2_POSIX_STEPS=%d ./posix -test.v", dir, every(), count(2000)))
		testsys.Differences(t, mount, 900/every(), r.Stdout)
	}
	manyAtOnce(t, h, "/mnt/host", home)
	manyAtOnce(t, h, "/mnt/data", data)
}

// every is the part of the suite's cases that is done: all in `make soak`, which take an emulated CPU minutes.
func every() int { return 11 - count(10) }

// manyEntries: a directory of 200,000 (a tenth of them in make test) is listed whole.
func manyEntries(t *testing.T, h *testsys.Host, guest, host string) {
	t.Helper()
	many := count(200_000)
	testsys.Must(t, os.Mkdir(host+"/many", 0o755))
	for i := range many {
		testsys.Must(t, os.WriteFile(fmt.Sprintf("%s/many/an entry of many, %06d", host, i), nil, 0o644))
	}
	// The shell reads the directory, and asks for none of the files.
	if out := h.OK("-d", "small", "--cd", guest+"/many", "-e", "sh", "-c", `set -- *; echo $#`); out != fmt.Sprintln(many) {
		t.Errorf("%s has %sentries, want %d", guest, out, many)
	}
	testsys.Must(t, os.RemoveAll(host+"/many"))
}

// hostChanges: what the host changes in a directory, inotify in the distro tells; what the distro changes itself, once.
func hostChanges(t *testing.T, h *testsys.Host, guest, host string, below bool) {
	t.Helper()
	live := h.Start("-d", "small", "-e", "/mnt/host/inotify", guest)
	live.Expect("watching " + guest + "\n")
	expect := func(lines ...string) {
		t.Helper()
		for _, line := range lines {
			what, name, _ := strings.Cut(line, " ")
			live.Expect(what + " " + guest + "/" + name + "\n")
		}
	}
	at := func(name string) string { return filepath.Join(host, name) }
	testsys.Must(t, os.WriteFile(at("new"), []byte("one\n"), 0o644))
	expect("create new", "written new")
	f, err := os.OpenFile(at("new"), os.O_WRONLY|os.O_APPEND, 0)
	testsys.Must(t, err)
	_, err = f.WriteString("two\n")
	testsys.Must(t, err)
	expect("modify new")
	testsys.Must(t, f.Close())
	expect("written new")
	testsys.Must(t, os.Chmod(at("new"), 0o600))
	expect("attrib new")
	testsys.Must(t, os.Rename(at("new"), at("renamed")))
	expect("from new", "to renamed")
	testsys.Must(t, os.Symlink("renamed", at("link")))
	expect("create link")
	testsys.Must(t, os.WriteFile(at("saved~"), []byte("three\n"), 0o644)) // as editors save
	testsys.Must(t, os.Rename(at("saved~"), at("renamed")))
	expect("to renamed")
	testsys.Must(t, os.Remove(at("link")))
	expect("delete link")
	testsys.Must(t, os.Mkdir(at("sub"), 0o755))
	expect("create sub", "watching sub")
	if below {
		testsys.Must(t, os.WriteFile(at("sub/f"), nil, 0o644))
		expect("create sub/f")
		testsys.Must(t, os.Remove(at("sub/f")))
		expect("delete sub/f")
		watched(t, h, guest, host)
		expect("delete moved")
	}
	if out := h.OK("-d", "small", "-e", "cat", guest+"/renamed"); out != "three\n" {
		t.Errorf("the file is %q", out)
	}
	if got, err := os.ReadFile(at("renamed")); err != nil || string(got) != "three\n" {
		t.Errorf("on the host it is %q, %v", got, err)
	}
	// The distro's own changes are told once: nothing of this file comes between it and the next.
	h.OK("-d", "small", "-e", "sh", "-c", "cd "+guest+" && echo x >own && mv own mine && rm mine")
	expect("create own", "modify own", "written own", "from own", "to mine", "delete mine")
	testsys.Must(t, os.Remove(at("sub")))
	line, err := bufio.NewReader(live.Stdout).ReadString('\n')
	want := "delete " + guest + "/sub\n"
	if below { // it is watched itself
		want = "deleted " + guest + "/sub\n"
	}
	if err != nil || line != want {
		t.Errorf("%q, %v, want %q", line, err, want)
	}
	live.Kill()
}

// watched: what becomes of a file on the host, a watch on the file itself tells as well.
func watched(t *testing.T, h *testsys.Host, guest, host string) {
	t.Helper()
	testsys.Must(t, os.WriteFile(host+"/watched", nil, 0o644))
	live := h.Start("-d", "small", "-e", "/mnt/host/inotify", guest+"/watched")
	live.Expect("watching " + guest + "/watched\n")
	testsys.Must(t, os.Rename(host+"/watched", host+"/moved"))
	live.Expect("moved " + guest + "/watched\n")
	testsys.Must(t, os.Remove(host+"/moved"))
	live.Expect("deleted " + guest + "/watched\n")
	live.Kill()
}

// TestShareServerDies: a share whose server is killed fails, and is there again for the next
// command, also where the old one is still in use.
func TestShareServerDies(t *testing.T) {
	h := newHost(t)
	home := h.Path("home")
	testsys.Must(t, os.WriteFile(home+"/f", []byte("x\n"), 0o644))
	live := h.Start("-d", "small", "--cd", "/", "-e", "sh", "-c", "exec 3</mnt/host/f; cat /mnt/host/f; read line; cat /mnt/host/f; echo $?; read line")
	live.Expect("x\n")
	h.Process("share").Kill(t)
	io.WriteString(live.Stdin, "go on\n")
	live.Expect("1\n")
	// The device is still mounted where it is in use: the next mount is another, or 9P.
	if r := in(h, home, "-e", "cat", "f"); r.Stdout != "x\n" {
		t.Errorf("while it is in use: %v", r)
	}
	live.Stdin.Close()
	live.Wait()
}

// TestShareServerHangs: a share whose server does not answer holds up who waits for it, and nobody else.
func TestShareServerHangs(t *testing.T) {
	h := newHost(t)
	home, data := h.Path("home"), h.Path("data9p")
	testsys.Must(t, os.MkdirAll(data, 0o755))
	for _, dir := range []string{home, data} {
		testsys.Must(t, os.WriteFile(dir+"/f", []byte(dir), 0o644))
	}
	h.Config("[shares]", "data = "+data+", transport=9p")
	read := func(guest string) string {
		t.Helper()
		return h.OK("-d", "small", "--cd", "/", "-e", "cat", guest+"/f")
	}
	read("/mnt/host")
	servers := map[string]testsys.Process{"/mnt/host": h.Process("share")}
	read("/mnt/data")
	for _, p := range h.Processes() {
		if p.Role() == "share" && p.PID != servers["/mnt/host"].PID {
			servers["/mnt/data"] = p
		}
	}
	for guest, other := range map[string]string{"/mnt/host": "/mnt/data", "/mnt/data": "/mnt/host"} {
		want := map[string]string{"/mnt/host": home, "/mnt/data": data}
		testsys.Must(t, unix.Kill(servers[guest].PID, unix.SIGSTOP))
		defer unix.Kill(servers[guest].PID, unix.SIGCONT) //nolint:errcheck // it goes on already, if all is well
		waits := h.Start("-d", "small", "--cd", "/", "-e", "sh", "-c", "echo asks; cat "+guest+"/f")
		waits.Expect("asks\n")
		if got := read(other); got != want[other] {
			t.Errorf("while %s hangs, %s has %q", guest, other, got)
		}
		testsys.Must(t, unix.Kill(servers[guest].PID, unix.SIGCONT))
		waits.Expect(want[guest])
		waits.Wait()
	}
}
