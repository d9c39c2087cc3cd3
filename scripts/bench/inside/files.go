package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

const (
	gitPath       = "/rig/bin/git"
	virtiofsdPath = "/rig/bin/virtiofsd"
	diodPath      = "/rig/bin/diod"
	sshfsPath     = "/rig/bin/sshfs"
	sftpPath      = "/rig/bin/sftp-server"
	dropbearPath  = "/rig/bin/dropbear"
)

// filesPrograms are those that the distro has besides.
var filesPrograms = []string{gitPath, dropbearPath, sftpPath}

// sharedDir is what the host shares, a tmpfs: no server waits for a disk. Each file system that is
// measured has a directory of its own in it.
const sharedDir = "/bench.shared"

const filesShares = "[shares]\nhost = " + sharedDir + "\np9 = " + sharedDir + ", transport=9p\n"

// filesHang is hangs for one job.
func filesHang() time.Duration {
	if *full {
		return 300 * hangs
	}
	return 10 * hangs
}

// Those that are compared, as the rows name them.
const (
	peerExt4      = "ext4 in the guest"
	peerVirtiofsd = "virtiofsd"
	peerNoCache   = "virtiofsd -o cache=none"
	peerQEMU9P    = "QEMU's virtio-9p"
	peerDiod      = "diod"
	peerSSHFS     = "sshfs"
	peerSSHFSAsks = "sshfs -o dir_cache=no" // else it keeps names and attributes for 20 s, whatever the guest does
)

// filesJob is one row: a job of guestTool's.
type filesJob struct {
	name, job, unit string
	count           int
	per             float64 // of the unit, in one of count
	metadata        bool
}

func filesJobs() []filesJob {
	data, names := scaled(160), scaled(1000)
	return []filesJob{
		{"sequential write, 1 MiB", "write", "MB/s", data, 1.048576, false},
		{"sequential read, 1 MiB", "read", "MB/s", data, 1.048576, false},
		{"4 KiB random read", "randread", "/s", names, 1, false},
		{"4 KiB random write", "randwrite", "/s", names, 1, false},
		{"create", "create", "/s", names, 1, true},
		{"stat", "stat", "/s", names, 1, true},
		{"open", "open", "/s", names, 1, true},
		{"readdir", "readdir", "names/s", names, 1, true},
		{"unlink", "unlink", "/s", names, 1, true},
	}
}

// place is a file system that is measured: where, and who runs a program there.
type place struct {
	dir string
	run func(argv ...string) (string, error)
}

// number runs guestTool, which prints one.
func (p place) number(argv ...string) (float64, error) {
	text, err := p.run(argv...)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(text), 64)
}

// measure runs all jobs in the place: a rate for each.
func (p place) measure() (rates []float64, err error) {
	for _, j := range filesJobs() {
		ns, err := p.number(guestTool, "files", p.dir, j.job, strconv.Itoa(j.count))
		if err != nil {
			return nil, err
		}
		rates = append(rates, float64(j.count)*j.per/ns*1e9)
		logf("%s: %s: %s", p.dir, j.job, strconv.FormatFloat(rates[len(rates)-1], 'f', 1, 64))
	}
	return rates, nil
}

// gitStatus is the ms that it takes in a tree where nothing has changed.
func (p place) gitStatus(tree string) (float64, error) {
	ns, err := p.number(guestTool, "timed", "/bin/git", "-c", "safe.directory=*", "-C", tree, "status", "--porcelain")
	logf("%s: git status: %.1f ms", tree, ns/1e6)
	return ns / 1e6, err
}

// files measures the host's directories in the guest, and the guest's on the host.
func files(h *host) ([]report.Row, error) {
	tree, err := prepareShared()
	if err != nil {
		return nil, err
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return nil, err
	}
	rates, status := map[string][]float64{}, map[string]float64{}
	measure := func(name string, p place, tree string) (err error) {
		if !chosen.MatchString(name) {
			return nil
		}
		logf("%s", name)
		if rates[name], err = p.measure(); err == nil && tree != "" {
			status[name], err = p.gitStatus(tree)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return err
	}
	const ours, ours9P, mounted = "virtio-fs", "9P", "host mount"

	if _, err := h.ours(); err != nil {
		return nil, err
	}
	inOurs := func(argv ...string) (string, error) { return h.runFor(filesHang(), argv...) }
	if err := h.unpackTree(tree); err != nil {
		return nil, err
	}
	for _, p := range []struct{ name, dir, tree string }{
		{peerExt4, "/root/ext4", "/root/tree"},
		{ours, "/mnt/host/virtio-fs", "/mnt/host/tree"},
		{ours9P, "/mnt/p9/9p", "/mnt/p9/tree"},
	} {
		if err := measure(p.name, place{p.dir, inOurs}, p.tree); err != nil {
			return nil, err
		}
	}
	path, err := h.run("--fs-path", distroName+":/root/mounted")
	if err != nil {
		return nil, err
	}
	if err := measure(mounted, place{strings.TrimSpace(path), onHost}, ""); err != nil {
		return nil, err
	}
	if err := h.stop(); err != nil {
		return nil, err
	}
	if peers := []string{peerVirtiofsd, peerNoCache, peerQEMU9P, peerDiod, peerSSHFS, peerSSHFSAsks}; slices.ContainsFunc(peers, chosen.MatchString) {
		if err := h.filesPeers(measure, chosen); err != nil {
			return nil, err
		}
	}

	var rows []report.Row
	row := func(name string, peers []string, bar func(j filesJob) *report.Bar) {
		if rates[name] == nil {
			return
		}
		for i, j := range filesJobs() {
			r := report.Row{Row: name + ": " + j.name, Unit: j.unit, Ours: rates[name][i], Peers: map[string]float64{}, Bar: bar(j)}
			for _, p := range peers {
				if rates[p] != nil {
					r.Peers[p] = rates[p][i]
				}
			}
			if r.Bar != nil && rates[r.Bar.Peer] == nil {
				r.Bar = nil
			}
			rows = append(rows, r)
		}
	}
	atLeast := func(factor float64, peer string) *report.Bar {
		return &report.Bar{Peer: peer, Factor: factor, AtLeast: true}
	}
	row(ours, []string{peerExt4, peerVirtiofsd, peerNoCache}, func(filesJob) *report.Bar { return atLeast(1, peerVirtiofsd) })
	row(ours9P, []string{peerExt4, peerQEMU9P, peerDiod}, func(j filesJob) *report.Bar {
		if j.metadata {
			return atLeast(2, peerQEMU9P)
		}
		return nil
	})
	row(mounted, []string{peerSSHFS, peerSSHFSAsks}, func(filesJob) *report.Bar { return atLeast(0.6, peerSSHFS) })
	if status[ours] == 0 {
		return rows, nil
	}
	git := report.Row{Row: fmt.Sprintf("git status, %d files", gitFiles()), Unit: "ms", Ours: status[ours], Peers: map[string]float64{}}
	for name, ms := range status {
		if name != ours {
			git.Peers[name] = ms
		}
	}
	if status[peerExt4] != 0 {
		git.Bar = &report.Bar{Peer: peerExt4, Factor: 3}
	}
	return append(rows, git), nil
}

// filesPeers measures the others, all in one VM of QEMU's.
func (h *host) filesPeers(measure func(name string, p place, tree string) error, chosen *regexp.Regexp) error {
	var devices []string
	devices = append(devices, "-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", memoryMiB), "-machine", "memory-backend=mem",
		"-global", "virtio-mmio.force-legacy=false") // virtiofsd knows no other
	for i, cache := range []string{"auto", "none"} {
		d, stop, err := startVirtiofsd(fmt.Sprintf("virtiofsd%d", i), cache)
		if err != nil {
			return err
		}
		defer stop()
		devices = append(devices, d...)
	}
	devices = append(devices, "-fsdev", "local,id=local,security_model=none,path="+sharedDir, "-device", "virtio-9p-device,fsdev=local,mount_tag=local")
	server, err := startDiod()
	if err != nil {
		return err
	}
	defer server()
	if out, err := exec.Command(busyboxPath, "ifconfig", "lo", "127.0.0.1", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ifconfig lo: %w: %s", err, out)
	}
	net := slirpNet()
	net.args[1] += ",hostfwd=tcp:127.0.0.1:" + sshPort + "-:22"
	q, err := startQEMU(h.disk, net, devices...)
	if err != nil {
		return err
	}
	defer q.kill()
	inPeer := func(argv ...string) (string, error) { return q.outputFor(filesHang(), argv...) }
	const options9P = "version=9p2000.L,access=any,cache=none"
	for _, p := range []struct{ name, kind, source, dir, options string }{
		{peerVirtiofsd, "virtiofs", "virtiofsd0", "/mnt/virtiofsd", ""},
		{peerNoCache, "virtiofs", "virtiofsd1", "/mnt/no-cache", ""},
		{peerQEMU9P, "9p", "local", "/mnt/qemu-9p", options9P + ",trans=virtio,msize=512000"},
		{peerDiod, "9p", fmt.Sprint("vsock:", diodPort), "/mnt/diod", options9P + ",uname=root,msize=1048576,aname=" + sharedDir},
	} {
		if !chosen.MatchString(p.name) {
			continue
		}
		if p.name == peerQEMU9P {
			if _, err := inPeer("sh", "-c", "cd /sys/bus/virtio/drivers/9pnet_virtio"); err != nil {
				fmt.Fprintln(os.Stderr, "bench: the guest's kernel has no 9P over virtio (CONFIG_NET_9P_VIRTIO): QEMU's virtio-9p is not measured")
				continue
			}
		}
		if _, err := inPeer(guestTool, "mount", p.kind, p.source, p.dir, p.options); err != nil {
			return err
		}
		if err := measure(p.name, place{filepath.Join(p.dir, filepath.Base(p.dir)), inPeer}, p.dir+"/tree"); err != nil {
			return err
		}
	}
	if !chosen.MatchString(peerSSHFS) && !chosen.MatchString(peerSSHFSAsks) {
		return nil
	}
	mount, stop, err := h.serveSSH(q)
	if err != nil {
		return err
	}
	defer stop()
	for _, p := range []struct{ name, dir, options string }{{peerSSHFS, "sshfs", "dir_cache=yes"}, {peerSSHFSAsks, "no-cache", "dir_cache=no"}} {
		if !chosen.MatchString(p.name) {
			continue
		}
		dir, unmount, err := mount(p.dir, p.options)
		if err != nil {
			return err
		}
		defer unmount()
		if err := measure(p.name, place{dir, onHost}, ""); err != nil {
			return err
		}
	}
	return nil
}

// onHost runs guestTool on the host itself.
func onHost(argv ...string) (string, error) {
	var out, errs bytes.Buffer
	c := exec.Command(guestPath, argv[1:]...)
	c.Stdout, c.Stderr = &out, &errs
	if err := superviseFor(filesHang(), c); err != nil {
		return "", fmt.Errorf("%q: %w: %s", argv, err, errs.Bytes())
	}
	return out.String(), nil
}

// gitFiles is how many files there are in the tree of git's, a hundred in each directory.
func gitFiles() int {
	if *full {
		return 50000
	}
	return 400 // each costs a share three requests, and a request the rig a while
}

// prepareShared makes the shared directory with the tree, and returns an archive of that.
func prepareShared() (archive []byte, err error) {
	if err := os.MkdirAll(sharedDir, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", sharedDir, "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs: %w", err)
	}
	for _, d := range []string{"virtio-fs", "9p", "virtiofsd", "no-cache", "qemu-9p", "diod", "tree"} {
		if err := os.Mkdir(filepath.Join(sharedDir, d), 0o755); err != nil {
			return nil, err
		}
	}
	tree := filepath.Join(sharedDir, "tree")
	var commit bytes.Buffer
	commit.WriteString("commit refs/heads/master\ncommitter bench <bench@localhost> 0 +0000\ndata 0\n")
	for i := range gitFiles() {
		content := fmt.Sprintf("the content of file %d\n", i)
		fmt.Fprintf(&commit, "M 644 inline d%03d/f%05d\ndata %d\n%s", i/100, i, len(content), content)
	}
	git := func(stdin io.Reader, argv ...string) error {
		c := exec.Command(gitPath, append([]string{"-C", tree}, argv...)...)
		c.Stdin, c.Env = stdin, []string{"HOME=/"}
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("git %s: %w: %s", argv[0], err, out)
		}
		return nil
	}
	if err := errors.Join(git(nil, "init", "-q", "-b", "master"), git(&commit, "fast-import", "--quiet"), git(nil, "reset", "-q", "--hard")); err != nil {
		return nil, err
	}
	// Older than the index, as in most trees: of what is as old git reads the content each time.
	old := time.Unix(1e9, 0)
	for i := range gitFiles() {
		if err := os.Chtimes(fmt.Sprintf("%s/d%03d/f%05d", tree, i/100, i), old, old); err != nil {
			return nil, err
		}
	}
	if err := git(nil, "update-index", "-q", "--refresh"); err != nil {
		return nil, err
	}
	return exec.Command(busyboxPath, "tar", "cf", "-", "-C", sharedDir, "tree").Output()
}

// unpackTree puts the tree on the distro's own disk, and makes what is measured there.
func (h *host) unpackTree(archive []byte) error {
	c := h.wsl2("-d", distroName, "-e", "sh", "-c", "mkdir /root/ext4 /root/mounted /root/sshfs /root/no-cache && tar x -C /root")
	var errs bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(archive), &errs
	if err := superviseFor(filesHang(), c); err != nil {
		return fmt.Errorf("unpack the tree: %w: %s", err, errs.Bytes())
	}
	return nil
}

// runFor is output with a limit of its own.
func (h *host) runFor(limit time.Duration, argv ...string) (string, error) {
	var out, errs bytes.Buffer
	c := h.wsl2(append([]string{"-d", distroName, "-e"}, argv...)...)
	c.Stdout, c.Stderr = &out, &errs
	if err := superviseFor(limit, c); err != nil {
		return "", fmt.Errorf("%q: %w: %s", argv, err, errs.Bytes())
	}
	return out.String(), nil
}

// outputFor is output with a limit of its own.
func (q *qemu) outputFor(limit time.Duration, argv ...string) (string, error) {
	s, err := startSession(q.dial, false, argv...)
	if err != nil {
		return "", err
	}
	defer s.close()
	if err := errors.Join(setTimeoutsTo(int(s.stdout), limit), setTimeoutsTo(int(s.control), limit)); err != nil {
		return "", err
	}
	out, err := io.ReadAll(s.stdout)
	if err == nil {
		err = s.wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %q: %w", peerQEMU, argv, err)
	}
	return string(out), err
}

// startVirtiofsd starts a server and returns the device of QEMU's that it serves.
func startVirtiofsd(tag, cache string) (device []string, stop func(), err error) {
	path := "/run/" + tag
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(l)
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: path}), unix.Listen(l, 1)); err != nil {
		return nil, nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	c := exec.Command(virtiofsdPath, "--fd=3", "-o", "source="+sharedDir, "-o", "cache="+cache)
	c.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(l)), path)}
	c.Stderr = os.Stderr
	if !*verbose {
		c.Stderr = nil
	}
	if err := c.Start(); err != nil {
		return nil, nil, err
	}
	c.ExtraFiles[0].Close()
	stop = func() { c.Process.Kill(); c.Wait() }
	return []string{"-chardev", "socket,id=" + tag + ",path=" + path, "-device", "vhost-user-fs-device,chardev=" + tag + ",tag=" + tag}, stop, nil
}

func dup(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		panic(err) // no descriptors are left
	}
	return n
}

// diodPort is where the guest finds diod.
const diodPort = 5640

// startDiod serves the first guest that connects.
func startDiod() (stop func(), err error) {
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	if err := errors.Join(unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: diodPort}), unix.Listen(l, 1)); err != nil {
		unix.Close(l)
		return nil, fmt.Errorf("listen on vsock port %d: %w", diodPort, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		fd, _, err := unix.Accept(l)
		if err != nil {
			return // stopped
		}
		conn := os.NewFile(uintptr(fd), "vsock")
		c := exec.Command(diodPath, "-f", "-n", "-N", "-c", "/dev/null", "--rfdno=3", "--wfdno=3", "-e", sharedDir, "-L", "stderr")
		c.ExtraFiles, c.Stderr = []*os.File{conn}, os.Stderr
		if err := c.Start(); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			conn.Close()
			return
		}
		conn.Close()
		c.Wait() //nolint:errcheck // it ends with the guest
	}()
	return func() {
		unix.Shutdown(l, unix.SHUT_RDWR) //nolint:errcheck // Accept returns
		unix.Close(l)
		select {
		case <-ended:
		case <-time.After(hangs):
		}
	}, nil
}

// serveSSH starts dropbear and OpenSSH's sftp-server in the guest. mount mounts a directory of root's there, as sshfs does.
func (h *host) serveSSH(q *qemu) (mount func(name, options string) (dir string, unmount func(), err error), stop func(), err error) {
	keys := filepath.Join(h.dir, "ssh")
	key := filepath.Join(keys, "key")
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile("/etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644); err != nil { // ssh wants a name
		return nil, nil, err
	}
	if out, err := exec.Command("/rig/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	// Not made by dropbear when it is first asked for, which the connection would wait for.
	hostKey := filepath.Join(keys, "host")
	if out, err := exec.Command("/rig/bin/dropbearkey", "-t", "ed25519", "-f", hostKey).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("dropbearkey: %w: %s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		return nil, nil, err
	}
	private, err := os.ReadFile(hostKey)
	if err != nil {
		return nil, nil, err
	}
	// Our guests' cards ask nobody for an address, for ours answers to any. QEMU's does not.
	const setUp = `set -e; ifconfig eth0 arp; mkdir -p /root/.ssh /usr/lib/openssh; echo "$0" >/root/.ssh/authorized_keys; chmod 700 /root /root/.ssh; echo /bin/sh >/etc/shells
ln -s /bin/sftp-server /usr/lib/sftp-server; ln -s /bin/sftp-server /usr/lib/openssh/sftp-server; mkdir -p /etc/dropbear; printf "$1" >/etc/dropbear/host`
	var octal strings.Builder
	for _, c := range private {
		fmt.Fprintf(&octal, "\\%03o", c)
	}
	if _, err := q.output("sh", "-c", setUp, strings.TrimSpace(string(public)), octal.String()); err != nil {
		return nil, nil, err
	}
	s, err := startSession(q.dial, false, "sh", "-c", "exec dropbear -F -E -r /etc/dropbear/host -s -p 22 2>&1")
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := firstLine(s.stdout); err != nil {
		return nil, nil, fmt.Errorf("dropbear: %w", err)
	}
	mount = func(name, options string) (dir string, unmount func(), err error) {
		dir = "/bench." + name
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", nil, err
		}
		// sshfs keeps for itself what its ssh says.
		log := filepath.Join(keys, name)
		c := exec.Command(sshfsPath, "root@127.0.0.1:/root/"+name, dir, "-p", sshPort, "-o", options, "-o", "ssh_command=/rig/bin/ssh -E "+log+" -F /dev/null -i "+key,
			"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
		c.Env = h.env
		if err := superviseFor(filesHang(), c); err != nil {
			text, _ := os.ReadFile(log) //nolint:errcheck // what there is of it
			return "", nil, fmt.Errorf("sshfs: %w: %s", err, text)
		}
		return dir, func() { unix.Unmount(dir, unix.MNT_DETACH) }, nil //nolint:errcheck // the rig ends with it
	}
	return mount, s.close, nil
}
