package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

// Topic version1 is an ordinary user's: his distro of version 1, the same one of version 2, the same
// namespaces made by a script, and the host itself.

const (
	version1User = 1000
	version1Name = "bench1"
	// The range of IDs in /etc/subuid, all of the script's namespace.
	firstID, manyIDs = 100000, 65536

	bashPath    = "/rig/bin/bash"
	dynamicPath = "/rig/bin/dynamic" // true(1), which has nothing but libc to load
	handRoot    = "/bench.hand"      // the script's own
	nativeTree  = "/bench.native"
)

var version1Programs = []string{bashPath, gitPath, dynamicPath}

// The commands that are measured inside; the tree is where git finds the files.
const (
	forks    = 1000
	gitAdded = 3000

	forkExec = `for ((i = 0; i < %d; i++)); do %s; done`
	gitAdd   = `cd %s && rm -rf .git && %[2]s init -q --template= && %[2]s add .`
)

// byHand makes the least that a distro of version 1 has, then runs the command: $1 is the root.
const byHand = `#!/rig/bin/sh
exec unshare --user --map-users %[1]d,0,%[2]d --map-groups %[1]d,0,%[2]d --setuid 0 --setgid 0 \
	--mount --propagation private --pid --fork --uts --ipc --cgroup /rig/bin/sh -ec '
mount --rbind "$1" "$1"
cd "$1"
shift
mount -t proc proc proc
mount -t tmpfs -o mode=755,size=1m tmpfs dev
mkdir dev/pts dev/old
: >dev/null
mount --bind /dev/null dev/null
: >dev/urandom
mount --bind /dev/urandom dev/urandom
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
pivot_root . dev/old
cd /
/bin/umount -l /dev/old
exec "$@"' sh "$@"
`

const byHandPath = "/bench.byhand"

// ordinaryUser makes the host an ordinary user's, who has a range of IDs.
func (h *host) ordinaryUser() error {
	h.uid = version1User
	ranges := fmt.Sprintf("bench:%d:%d\n", firstID, manyIDs)
	for path, text := range map[string]string{
		"/etc/passwd": fmt.Sprintf("root:x:0:0::/:/bin/sh\nbench:x:%d:%[1]d::%s:/bin/sh\n", version1User, h.dir), "/etc/group": fmt.Sprintf("root:x:0:\nbench:x:%d:\n", version1User),
		"/etc/subuid": ranges, "/etc/subgid": ranges,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Chmod("/dev/kvm", 0o666); err != nil {
		return err
	}
	return filepath.Walk(h.dir, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Chown(path, version1User, version1User))
	})
}

// kind is one of those that are compared, and where its programs are.
type kind struct {
	name string
	// run is a command that runs a program of its root.
	run func(argv ...string) *exec.Cmd
	// stop ends all that run has left running, terminate only what is the distro's.
	stop, terminate           func() error
	tree                      string
	guest, bash, git, dynamic string
}

// version1 measures them.
func version1(h *host) ([]report.Row, error) {
	if _, err := h.run("--import", version1Name, filepath.Join(h.dir, "root.tar"), "--version", "1"); err != nil {
		return nil, err
	}
	if err := h.stop(); err != nil {
		return nil, err
	}
	if err := h.handRoot(); err != nil {
		return nil, err
	}
	nothing := func() error { return nil }
	inRoot := kind{stop: nothing, terminate: nothing, tree: "/root/tree", guest: guestTool, bash: "/bin/bash", git: "/bin/git", dynamic: "/bin/dynamic"}
	distro := func(title, name string) kind {
		k := inRoot
		k.name, k.stop = title, h.stop
		k.run = func(argv ...string) *exec.Cmd {
			return h.wsl2(append([]string{"-d", name, "-u", "root", "-e"}, argv...)...)
		}
		k.terminate = func() error { _, err := h.run("--terminate", name); return err }
		return k
	}
	ours, vm, hand := distro("version 1", version1Name), distro("version 2", distroName), inRoot
	hand.name = "unshare by hand"
	hand.run = func(argv ...string) *exec.Cmd { return h.asUser(byHandPath, append([]string{handRoot}, argv...)...) }
	native := kind{name: "native", run: func(argv ...string) *exec.Cmd { return h.asUser(argv[0], argv[1:]...) }, stop: nothing, terminate: nothing,
		tree: nativeTree, guest: guestPath, bash: bashPath, git: gitPath, dynamic: dynamicPath}

	type row struct {
		name    string
		bar     *report.Bar
		measure func(k kind) (float64, error)
	}
	start, inside := &report.Bar{Peer: hand.name, Factor: 1.2}, &report.Bar{Peer: native.name, Factor: 1.1}
	job := func(script func(k kind) string) func(k kind) (float64, error) {
		return func(k kind) (float64, error) { return h.timedIn(k, k.bash, "-c", script(k)) }
	}
	rows := []row{
		{"start to first output, nothing runs", start, func(k kind) (float64, error) { return h.several(boots, k.stop, k) }},
		{"start to first output, the service runs", start, func(k kind) (float64, error) { return h.several(boots, k.terminate, k) }},
		{"warm command with output", nil, func(k kind) (float64, error) { return h.several(warmRuns, nothing, k) }},
		{fmt.Sprintf("fork and exec of a dynamic program in bash, %d", scaled(forks)), inside, job(func(k kind) string { return fmt.Sprintf(forkExec, scaled(forks), k.dynamic) })},
		{fmt.Sprintf("git add of %d files", gitAdded), inside, job(func(k kind) string { return fmt.Sprintf(gitAdd, k.tree, k.git) })},
	}
	figures := make([]report.Row, len(rows))
	for i, r := range rows {
		figures[i] = report.Row{Row: r.name, Unit: "ms", Bar: r.bar, Peers: map[string]float64{}}
	}
	for _, k := range []kind{hand, native, ours, vm} {
		for i, r := range rows {
			logf("%s: %s", k.name, r.name)
			if i == 0 {
				if err := h.plantTree(k); err != nil {
					return nil, fmt.Errorf("%s: the tree: %w", k.name, err)
				}
			}
			ms, err := r.measure(k)
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", k.name, r.name, err)
			}
			logf("%s: %s: %.2f ms", k.name, r.name, ms)
			if k.name == ours.name {
				figures[i].Ours = ms
			} else {
				figures[i].Peers[k.name] = ms
			}
		}
		if err := k.stop(); err != nil {
			return nil, err
		}
	}
	all := figures[0]
	all.Row, all.Bar = "start to first output", &report.Bar{Factor: 50}
	return append([]report.Row{all}, figures...), nil
}

// asUser is a program of the host that the user runs.
func (h *host) asUser(program string, args ...string) *exec.Cmd {
	c := h.wsl2()
	c.Path, c.Args = program, append([]string{program}, args...)
	return c
}

// handRoot unpacks the distro's archive for the script, whose root it belongs to.
func (h *host) handRoot() error {
	if err := os.WriteFile(byHandPath, fmt.Appendf(nil, byHand, firstID, manyIDs), 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(handRoot, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command(busyboxPath, "tar", "xf", filepath.Join(h.dir, "root.tar"), "-C", handRoot).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack: %w: %s", err, out)
	}
	return filepath.Walk(handRoot, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Lchown(path, firstID, firstID))
	})
}

// plantTree writes the files that git adds.
func (h *host) plantTree(k kind) error {
	if k.tree == nativeTree {
		if err := os.Mkdir(nativeTree, 0o755); err != nil {
			return err
		}
		if err := os.Chown(nativeTree, version1User, version1User); err != nil {
			return err
		}
	}
	script := fmt.Sprintf(`mkdir -p %[1]s && cd %[1]s && i=0 && while [ $i -lt %[2]d ]; do [ $((i %% 100)) != 0 ] || mkdir d$((i / 100)); echo "the content of file $i" >d$((i / 100))/f$i; i=$((i + 1)); done`, k.tree, gitAdded)
	c := k.run(k.bash, "-c", script)
	c.Env = append(c.Env, "PATH=/rig/bin:/bin")
	var errs bytes.Buffer
	c.Stderr, c.WaitDelay = &errs, hangs // what it has started may hold that
	if err := superviseFor(filesHang(), c); err != nil {
		return fmt.Errorf("%w: %s", err, errs.Bytes())
	}
	return nil
}

// several takes the median of the ms to the first byte of a program that prints one; before each, prepare runs.
func (h *host) several(n int, prepare func() error, k kind) (float64, error) {
	var all []float64
	for range n + 1 {
		if err := prepare(); err != nil {
			return 0, err
		}
		ms, err := h.firstByteOf(k.run(k.guest, "hello"))
		if err != nil {
			return 0, err
		}
		all = append(all, ms)
	}
	return median(all[1:]), nil
}

// timedIn takes the ms that a program takes inside, as guestTool there measures.
func (h *host) timedIn(k kind, argv ...string) (float64, error) {
	c := k.run(append([]string{k.guest, "timed"}, argv...)...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr, c.WaitDelay = &out, &errs, hangs
	if err := superviseFor(filesHang(), c); err != nil {
		return 0, fmt.Errorf("%q: %w: %s", argv, err, errs.Bytes())
	}
	ns, err := strconv.ParseFloat(strings.TrimSpace(out.String()), 64)
	return ns / 1e6, err
}
