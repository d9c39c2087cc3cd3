package testsys

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Entry is one member of an archive. Mode 0 stands for 0755 (0644 for a file
// with content, 0777 for a link).
type Entry struct {
	Name     string
	Type     byte // tar.Type...; 0 is a regular file, or a directory if Name ends in /
	Link     string
	Content  []byte
	Mode     int64
	UID, GID int
	Major    int64
	Minor    int64
	PAX      map[string]string
}

// Tar writes an archive.
func Tar(tb testing.TB, entries ...Entry) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.Name, Typeflag: e.Type, Linkname: e.Link, Size: int64(len(e.Content)), Mode: e.Mode,
			Uid: e.UID, Gid: e.GID, Devmajor: e.Major, Devminor: e.Minor, PAXRecords: e.PAX}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(e.Name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = map[byte]int64{tar.TypeReg: 0o644, tar.TypeSymlink: 0o777}[h.Typeflag]
			if h.Mode == 0 {
				h.Mode = 0o755
			}
		}
		Must(tb, w.WriteHeader(h))
		_, err := w.Write(e.Content)
		Must(tb, err)
	}
	Must(tb, w.Close())
	return b.Bytes()
}

// Busybox are the members of a small distro: a static busybox, the user alice
// (1000) beside root, and the user broken, whose shell does not exist.
func Busybox(tb testing.TB) []Entry {
	tb.Helper()
	exe, err := exec.LookPath("busybox")
	Must(tb, err)
	binary, err := os.ReadFile(exe)
	Must(tb, err)
	list, err := exec.Command(exe, "--list").Output()
	Must(tb, err)
	file := func(name, content string) Entry { return Entry{Name: name, Content: []byte(content)} }
	entries := []Entry{
		{Name: "./"}, {Name: "bin/"}, {Name: "etc/"}, {Name: "dev/"}, {Name: "proc/"}, {Name: "sys/"}, {Name: "run/"},
		{Name: "srv/"}, {Name: "var/"}, {Name: "root/", Mode: 0o700}, {Name: "tmp/", Mode: 0o1777}, {Name: "home/"},
		{Name: "home/alice/", UID: 1000, GID: 1000},
		file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\nbroken:x:1001:1001::/:/no/such/shell\n"),
		file("etc/group", "root:x:0:\nalice:x:1000:\nbroken:x:1001:\nstaff:x:50:alice\n"),
		file("etc/os-release", "ID=small\nPRETTY_NAME=\"Small Linux\"\n"),
		{Name: "bin/busybox", Content: binary, Mode: 0o755},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			entries = append(entries, Entry{Name: "bin/" + applet, Type: tar.TypeSymlink, Link: "busybox"})
		}
	}
	return entries
}

// Compress packs data with the program of a file name's ending: .gz is done
// here, .xz and .zst by xz and zstd.
func Compress(tb testing.TB, ending string, data []byte) []byte {
	tb.Helper()
	var out bytes.Buffer
	switch ending {
	case ".gz":
		w := gzip.NewWriter(&out)
		_, err := w.Write(data)
		Must(tb, err)
		Must(tb, w.Close())
	case ".xz", ".zst":
		cmd := exec.Command(map[string]string{".xz": "xz", ".zst": "zstd"}[ending], "-q", "-c", "-1", "-T0")
		cmd.Stdin, cmd.Stdout = bytes.NewReader(data), &out
		Must(tb, cmd.Run())
	default:
		tb.Fatalf("no compressor for %q", ending)
	}
	return out.Bytes()
}

// File writes a file below the host's directory and returns its path.
func (h *Host) File(name string, content []byte) string {
	h.TB.Helper()
	Must(h.TB, os.WriteFile(h.Path(name), content, 0o644))
	return h.Path(name)
}

// Import gives the host a distro made of these entries.
func (h *Host) Import(name string, entries ...Entry) {
	h.TB.Helper()
	path := h.File(name+".tar", Tar(h.TB, entries...))
	h.Want(h.Run("--import", name, path), 0)
	Must(h.TB, os.Remove(path))
}

// Seed is the data directory of a host that was shut down, with its distros, to
// begin other hosts with: an import takes seconds, a copy does not.
type Seed struct {
	dir    string
	origin string // the data directory that its registry names
}

// NewSeed keeps the host's distros in dir. The host is shut down.
func (h *Host) NewSeed(dir string) Seed {
	h.TB.Helper()
	h.OK("--shutdown")
	copyTree(h.TB, h.Data(), dir)
	return Seed{dir: dir, origin: h.Data()}
}

// Plant gives a new host the distros of a seed.
func (h *Host) Plant(s Seed) {
	h.TB.Helper()
	copyTree(h.TB, s.dir, h.Data())
	// The registry holds the disks' absolute paths.
	registry := filepath.Join(h.Data(), "registry.json")
	text, err := os.ReadFile(registry)
	Must(h.TB, err)
	Must(h.TB, os.WriteFile(registry, bytes.ReplaceAll(text, []byte(s.origin), []byte(h.Data())), 0o600))
}

// copyTree copies files, holes as holes.
func copyTree(tb testing.TB, from, to string) {
	tb.Helper()
	Must(tb, os.MkdirAll(to, 0o700))
	Must(tb, filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		return copySparse(path, filepath.Join(to, rel))
	}))
}

func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, st.Mode().Perm())
	if err != nil {
		return err
	}
	defer out.Close()
	const seekData, seekHole = 3, 4 // lseek(2)
	for at := int64(0); at < st.Size(); {
		start, err := in.Seek(at, seekData)
		if err != nil { // ENXIO: nothing but a hole is left
			break
		}
		end, err := in.Seek(start, seekHole)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start)); err != nil {
			return err
		}
		at = end
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	return out.Close()
}

// Disks lists the ext4 images below the host's data directory.
func (h *Host) Disks() []string {
	h.TB.Helper()
	var disks []string
	for _, rel := range h.Files() {
		f, err := os.Open(filepath.Join(h.Data(), rel))
		Must(h.TB, err)
		magic := make([]byte, 2)
		if _, err := f.ReadAt(magic, 1024+56); err == nil && magic[0] == 0x53 && magic[1] == 0xef {
			disks = append(disks, f.Name())
		}
		f.Close()
	}
	return disks
}

// Fsck checks every disk. After a crash, the journal is replayed first, on a copy:
// the host's own next mount has to do that for itself. No VM may run.
func (h *Host) Fsck(crashed bool) {
	h.TB.Helper()
	disks := h.Disks()
	if len(disks) == 0 {
		h.TB.Fatalf("no disks in %s: %v", h.Data(), h.Files())
	}
	for _, disk := range disks {
		if crashed {
			replayed := h.Path("replayed.img")
			Must(h.TB, copySparse(disk, replayed))
			h.e2fsck(replayed, 1, "-p") // 1: errors corrected, which a replay counts as
			disk = replayed
		}
		h.e2fsck(disk, 0, "-f", "-n")
		if crashed {
			Must(h.TB, os.Remove(disk))
		}
	}
}

func (h *Host) e2fsck(disk string, worst int, flags ...string) {
	h.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	out, err := exec.CommandContext(ctx, "e2fsck", append(flags, disk)...).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() <= worst {
		err = nil
	}
	if err != nil {
		h.TB.Fatalf("e2fsck %s: %v\n%s", strings.Join(flags, " "), err, out)
	}
}

// Pattern is n bytes that do not compress and are the same every time.
func Pattern(n int64) io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{}), n) }

// PatternBytes is Pattern in memory, as a file's content for archives.
func PatternBytes(tb testing.TB, n int64) []byte {
	tb.Helper()
	b, err := io.ReadAll(Pattern(n))
	Must(tb, err)
	return b
}

// SHA256 reads r to its end and returns the hash in hexadecimal, as sha256sum
// prints it, and the length.
func SHA256(tb testing.TB, r io.Reader) (string, int64) {
	tb.Helper()
	h := sha256.New()
	n, err := io.Copy(h, r)
	Must(tb, err)
	return hex.EncodeToString(h.Sum(nil)), n
}
