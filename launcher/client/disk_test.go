package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/images/archive"
	"github.com/wsl2/wsl2/internal/wire"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/internal/fakevm"
	"github.com/wsl2/wsl2/launcher/registry"
)

// guestTool does to a disk what the guest would, by the host's e2fsprogs.
func guestTool(disk string, m *wire.Maintain, tools []byte) *wire.Reply {
	fail := func(err error, out []byte) *wire.Reply {
		return &wire.Reply{Code: wire.CodeRefused, Text: fmt.Sprintf("%v: %s", err, out)}
	}
	if m.Task.NeedsTools() && len(tools) == 0 {
		return fail(errors.New("no tools came"), nil)
	}
	run := func(name string, args ...string) ([]byte, error) {
		path, err := images.FindTool(name, images.ErrNoE2fsprogs)
		if err != nil {
			return nil, err
		}
		out, err := exec.Command(path, args...).CombinedOutput()
		var exit *exec.ExitError
		if name == "e2fsck" && errors.As(err, &exit) && exit.ExitCode() <= 1 {
			err = nil
		}
		return out, err
	}
	out, err := run("e2fsck", "-f", "-y", disk)
	if err == nil {
		switch m.Task {
		case wire.TaskGrow:
			out, err = run("resize2fs", disk)
		case wire.TaskShrink:
			out, err = run("resize2fs", disk, fmt.Sprintf("%dK", m.Bytes>>10))
		}
	}
	if err != nil {
		return fail(err, out)
	}
	return &wire.Reply{Text: string(out)}
}

// diskHost is a host with the distro debian on a real, small disk.
func diskHost(t *testing.T, hooks fakevm.Hooks) *host {
	t.Helper()
	if hooks.Maintain == nil {
		hooks.Maintain = guestTool
	}
	h := newHost(t, hooks)
	os.WriteFile(pathsIn(h.dir).ConfigFile, []byte("[wsl2]\ndefaultVhdSize=1GB\n"), 0o600)
	if err := h.doImport("debian", "", tarball(t, 8000)); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) manage(call api.Call) (api.Changed, error) {
	var c api.Changed
	err := h.client().Call(call, &c, true)
	return c, err
}

func (h *host) disk(name string) string {
	h.t.Helper()
	for _, d := range h.list() {
		if d.Name == name {
			return d.Disk
		}
	}
	h.t.Fatalf("no distro %s: %v", name, h.list())
	return ""
}

func (h *host) list() []api.Distro {
	h.t.Helper()
	var l api.List
	if err := h.client().Call(api.Call{Verb: api.VerbList}, &l, true); err != nil {
		h.t.Fatal(err)
	}
	return l.Distros
}

// export exports as the verb does.
func (h *host) export(ctx context.Context, call api.Call, format string, out *os.File, progress images.Progress) error {
	var compress Compressor
	if format != "raw" && format != "vhdx" {
		compress = func(w io.Writer) (io.WriteCloser, error) { return archive.Compressor(w, archive.Format(format)) }
	}
	return h.client().Export(ctx, call, images.DiskFormat(format), compress, out, progress)
}

// code is an error's, "" for none.
func code(err error) api.Code {
	if err == nil {
		return ""
	}
	return api.AsError(err).Code
}

func TestExport(t *testing.T) {
	text := bytes.Repeat([]byte("an archive "), 100000)
	h := diskHost(t, fakevm.Hooks{Export: func(w io.Writer) error { _, err := w.Write(text); return err }})
	for _, format := range archive.ExportFormats {
		path := filepath.Join(t.TempDir(), "out")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		var done int64
		if err := h.export(t.Context(), api.Call{Name: "debian"}, format, f, func(d, _ int64) { done = d }); err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		f.Close()
		switch format {
		case "raw":
			want, _ := os.ReadFile(h.disk("debian"))
			if got, _ := os.ReadFile(path); !bytes.Equal(got, want) {
				t.Errorf("raw: %d bytes, want %d", len(got), len(want))
			}
		case "vhdx":
			if got, err := images.DetectDisk(path); got != images.VHDX || err != nil {
				t.Error(got, err)
			}
		case "tar":
			if got, _ := os.ReadFile(path); !bytes.Equal(got, text) {
				t.Errorf("%d bytes, want %d", len(got), len(text))
			}
			if done != int64(len(text)) {
				t.Errorf("progress ended at %d", done)
			}
		default:
			if st, _ := os.Stat(path); st.Size() == 0 || st.Size() > int64(len(text))/10 {
				t.Errorf("%s: %d bytes", format, st.Size())
			}
		}
	}
	if n := h.fleet.VMs()[0].Disks(); n != 0 {
		t.Errorf("%d disks attached", n)
	}
	f, _ := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	defer f.Close()
	if err := h.export(t.Context(), api.Call{Name: "debian"}, "tar", f, nil); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Error(err)
	}
	if err := h.export(t.Context(), api.Call{Name: "nosuch"}, "tar", f, nil); code(err) != api.CodeNotFound {
		t.Error(err)
	}
	// It is not locked any more.
	if st, err := h.client().Run(RunSpec{Argv: []string{"true"}}, pipes(t, nil).stdio()); st != 0 || err != nil {
		t.Error(st, err)
	}
}

// While a distro is exported nothing else is done to it, and lists show it.
func TestExportLocks(t *testing.T) {
	going, end := make(chan struct{}), make(chan struct{})
	h := diskHost(t, fakevm.Hooks{Export: func(w io.Writer) error {
		w.Write([]byte("x"))
		close(going)
		<-end
		return errors.New("a bad block")
	}})
	out, _ := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	defer out.Close()
	result := make(chan error, 1)
	go func() { result <- h.export(context.Background(), api.Call{Name: "debian"}, "tar", out, nil) }()
	<-going
	if l := h.list(); l[0].State != api.StateExporting {
		t.Errorf("%+v", l)
	}
	for _, call := range []api.Call{
		{Verb: api.VerbExport}, {Verb: api.VerbRename, New: "other"}, {Verb: api.VerbClone, New: "other"}, {Verb: api.VerbUnregister},
		{Verb: api.VerbMove, Dir: t.TempDir() + "/new"}, {Verb: api.VerbResize, Size: 2 << 30}, {Verb: api.VerbCompact}, {Verb: api.VerbRepair},
	} {
		call.Name = "debian"
		if _, err := h.manage(call); code(err) != api.CodeBusy || !strings.Contains(err.Error(), "debian is being exported") {
			t.Errorf("%s: %v", call.Verb, err)
		}
	}
	if _, err := h.client().Run(RunSpec{Argv: []string{"true"}}, pipes(t, nil).stdio()); code(err) != api.CodeBusy {
		t.Error(err)
	}
	close(end)
	if err := <-result; err == nil || !strings.Contains(err.Error(), "a bad block") {
		t.Error(err)
	}
	if l := h.list(); l[0].State != api.StateStopped {
		t.Errorf("%+v", l)
	}
}

// A distro in use is not stopped for it.
func TestManageInUse(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	s := pipes(t, nil)
	r, w, _ := os.Pipe()
	echo, out, _ := os.Pipe()
	defer echo.Close()
	s.in, s.out = r, out
	ended := make(chan error, 1)
	go func() {
		_, err := h.client().Run(RunSpec{Argv: []string{"cat"}}, s.stdio())
		ended <- err
	}()
	w.Write([]byte("x"))
	io.ReadFull(echo, make([]byte, 1)) // it runs
	if _, err := h.manage(api.Call{Verb: api.VerbCompact, Name: "debian"}); code(err) != api.CodeBusy || !strings.Contains(err.Error(), "sessions") || !strings.Contains(err.Error(), "--terminate debian") {
		t.Error(err)
	}
	w.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	h.fleet.VMs()[0].SetBusy("debian", true)
	if _, err := h.manage(api.Call{Verb: api.VerbCompact, Name: "debian"}); code(err) != api.CodeBusy || !strings.Contains(err.Error(), "processes") {
		t.Error(err)
	}
	h.fleet.VMs()[0].SetBusy("debian", false)
	if _, err := h.manage(api.Call{Verb: api.VerbCompact, Name: "debian"}); err != nil {
		t.Error(err)
	}
}

func TestRename(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	disk := h.disk("debian")
	if err := h.doImport("alpine", "", tarball(t, 8000)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]api.Code{"alpine": api.CodeExists, "../x": api.CodeBadRequest, "": api.CodeBadRequest, "system": api.CodeBadRequest} {
		if err := h.client().Call(api.Call{Verb: api.VerbRename, Name: "debian", New: name}, nil, true); code(err) != want {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"Debian", "trixie"} { // its own name in other letters is free
		if err := h.client().Call(api.Call{Verb: api.VerbRename, Name: "debian", New: name}, nil, true); err != nil {
			t.Fatal(err)
		}
		if h.disk(name) != disk {
			t.Error("the disk moved")
		}
		if name == "Debian" {
			continue
		}
		if l := h.list(); !l[0].Default || l[0].Name != name {
			t.Errorf("%+v", l)
		}
	}
	// The old name is free although its directory is not.
	if err := h.doImport("debian", "", tarball(t, 8000)); err != nil {
		t.Fatal(err)
	}
	if h.disk("debian") == disk {
		t.Error("two distros have one disk")
	}
}

func TestClone(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	if err := h.client().Call(api.Call{Verb: api.VerbSetUser, Name: "debian", User: "alice"}, nil, true); err != nil {
		t.Fatal(err)
	}
	if _, err := h.manage(api.Call{Verb: api.VerbClone, Name: "debian", New: "copy"}); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(h.disk("debian"))
	b, _ := os.ReadFile(h.disk("copy"))
	if !bytes.Equal(a, b) || h.disk("copy") == h.disk("debian") {
		t.Error("the copy is not one")
	}
	if l := h.list(); len(l) != 2 || l[1].DefaultUser != "alice" || l[1].Default {
		t.Errorf("%+v", l)
	}
	before := len(h.left())
	if _, err := h.manage(api.Call{Verb: api.VerbClone, Name: "debian", New: "COPY"}); code(err) != api.CodeExists {
		t.Error(err)
	}
	if _, err := h.manage(api.Call{Verb: api.VerbClone, Name: "debian", New: "third", Dir: filepath.Dir(h.disk("copy"))}); code(err) != api.CodeExists {
		t.Error(err)
	}
	if _, err := h.manage(api.Call{Verb: api.VerbClone, Name: "debian", New: "third", Dir: "relative"}); code(err) != api.CodeBadRequest {
		t.Error(err)
	}
	if n := len(h.left()); n != before {
		t.Errorf("left: %v", h.left())
	}
	if _, err := h.manage(api.Call{Verb: api.VerbClone, Name: "debian", New: "third", Dir: h.dir + "/elsewhere"}); err != nil || h.disk("third") != h.dir+"/elsewhere/disk.ext4" {
		t.Error(err, h.list())
	}
}

func TestMove(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	old := h.disk("debian")
	want, _ := os.ReadFile(old)
	dir := h.dir + "/elsewhere"
	for range 2 { // to another file system, which /dev/shm is, and to the same one
		if _, err := h.manage(api.Call{Verb: api.VerbMove, Name: "debian", Dir: dir}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(dir + "/disk.ext4"); err != nil || !bytes.Equal(got, want) || h.disk("debian") != dir+"/disk.ext4" {
			t.Errorf("moved to %s: %d bytes, %v; %v", dir, len(got), err, h.list())
		}
		if _, err := os.Stat(filepath.Dir(old)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left %s: %v", filepath.Dir(old), err)
		}
		if st, err := h.client().Run(RunSpec{Argv: []string{"true"}}, pipes(t, nil).stdio()); st != 0 || err != nil {
			t.Error(st, err)
		}
		old = h.disk("debian")
		shm, err := os.MkdirTemp("/dev/shm", "w2")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(shm) })
		dir = shm + "/d"
	}
	if _, err := h.manage(api.Call{Verb: api.VerbMove, Name: "debian", Dir: filepath.Dir(old)}); code(err) != api.CodeBadRequest {
		t.Error(err)
	}
	occupied := t.TempDir()
	os.WriteFile(occupied+"/disk.ext4", []byte("precious"), 0o600)
	if _, err := h.manage(api.Call{Verb: api.VerbMove, Name: "debian", Dir: occupied}); code(err) != api.CodeExists {
		t.Error(err)
	}
	if text, _ := os.ReadFile(occupied + "/disk.ext4"); string(text) != "precious" {
		t.Error("written over")
	}
	if l := h.left(); len(l) != 0 {
		t.Errorf("left %v", l)
	}
}

func TestResize(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	check := func(size uint64) {
		t.Helper()
		st, err := os.Stat(h.disk("debian"))
		has, ferr := images.Ext4Size(h.disk("debian"))
		if err := errors.Join(err, ferr); err != nil || uint64(st.Size()) != size || has != size {
			t.Errorf("file %d, file system %d bytes, want %d: %v", st.Size(), has, size, err)
		}
		if l := h.left(); len(l) != 1 {
			t.Errorf("left %v", l)
		}
	}
	for _, size := range []uint64{2 << 30, 512 << 20, 512 << 20, 768 << 20} {
		c, err := h.manage(api.Call{Verb: api.VerbResize, Name: "debian", Size: size})
		if err != nil || uint64(c.SizeAfter) != size {
			t.Fatal(size, c, err)
		}
		check(size)
	}
	for _, size := range []uint64{0, 1, 17 << 40, 65 << 20} { // the last is too small for what is there
		if _, err := h.manage(api.Call{Verb: api.VerbResize, Name: "debian", Size: size}); code(err) != api.CodeSize {
			t.Errorf("%d: %v", size, err)
		}
		check(768 << 20)
	}
}

// A guest that cannot grow the file system leaves the disk as it was.
func TestResizeFails(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{Maintain: func(string, *wire.Maintain, []byte) *wire.Reply {
		return &wire.Reply{Code: wire.CodeDisk, Text: "the kernel refuses"}
	}})
	for _, size := range []uint64{2 << 30, 512 << 20} {
		if _, err := h.manage(api.Call{Verb: api.VerbResize, Name: "debian", Size: size}); err == nil || !strings.Contains(err.Error(), "the kernel refuses") {
			t.Error(err)
		}
		if st, err := os.Stat(h.disk("debian")); err != nil || st.Size() != 1<<30 || len(h.left()) != 1 {
			t.Errorf("%v %v %v", st.Size(), err, h.left())
		}
	}
}

func TestRepair(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	if c, err := h.manage(api.Call{Verb: api.VerbRepair, Name: "debian"}); err != nil || !strings.Contains(c.Report, "Pass 5") {
		t.Error(c, err)
	}
}

func TestImportImage(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	disk := h.disk("debian")
	want, _ := os.ReadFile(disk)
	vhdx := filepath.Join(t.TempDir(), "ext4.vhdx")
	f, _ := os.Create(vhdx)
	if err := h.export(t.Context(), api.Call{Name: "debian"}, "vhdx", f, nil); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for name, image := range map[string]string{"fromvhdx": vhdx, "fromraw": disk} {
		if err := h.client().ImportImage(api.Call{Name: name, Image: image}); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(h.disk(name)); !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d", name, len(got), len(want))
		}
	}
	before := len(h.left())
	text := filepath.Join(t.TempDir(), "text")
	os.WriteFile(text, bytes.Repeat([]byte("text"), 4096), 0o600)
	cut, _ := os.ReadFile(vhdx)
	os.WriteFile(text+".vhdx", cut[:len(cut)/2], 0o600)
	for _, image := range []string{text, text + ".vhdx", "/no/such/file", t.TempDir()} {
		if err := h.client().ImportImage(api.Call{Name: "bad", Image: image}); err == nil || !strings.Contains(err.Error(), image) {
			t.Errorf("%s: %v", image, err)
		}
	}
	if n := len(h.left()); n != before {
		t.Errorf("left %v", h.left())
	}
}

func TestImportInPlace(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	inPlace := func(name, path string) error {
		return h.client().Call(api.Call{Verb: api.VerbInPlace, Name: name, Image: path}, nil, true)
	}
	path := h.dir + "/mine.img"
	if _, err := images.CopyDisk(t.Context(), h.disk("debian"), path, nil); err != nil {
		t.Fatal(err)
	}
	if err := inPlace("mine", path); err != nil || h.disk("mine") != path {
		t.Fatal(err)
	}
	if err := inPlace("again", path); code(err) != api.CodeExists || !strings.Contains(err.Error(), "mine") {
		t.Error(err)
	}
	if err := inPlace("link", h.dir+"/no"); err == nil {
		t.Error("what is not there was registered")
	}
	if err := inPlace("relative", "mine.img"); code(err) != api.CodeBadRequest {
		t.Error(err)
	}
	vhdx := h.dir + "/d.vhdx"
	f, _ := os.Create(vhdx)
	if err := h.export(t.Context(), api.Call{Name: "mine"}, "vhdx", f, nil); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := inPlace("vhdx", vhdx); code(err) != api.CodeArchive || !strings.Contains(err.Error(), "--import vhdx --vhd "+vhdx) {
		t.Error(err)
	}
	if len(h.list()) != 2 {
		t.Error(h.list())
	}
}

// A service that is killed in the middle of a change leaves what the next makes whole.
func TestChangeCutOff(t *testing.T) {
	dir := shortDir(t)
	p := pathsIn(dir)
	disk := filepath.Join(dir, "d", "disk.ext4")
	os.MkdirAll(filepath.Dir(disk), 0o700)
	os.MkdirAll(p.Distros(), 0o700)
	os.WriteFile(disk, []byte("old"), 0o600)
	os.WriteFile(disk+".partial", []byte("half of it"), 0o600)
	text, _ := json.Marshal(map[string]any{"name": "d", "make": []string{disk + ".partial"}})
	os.WriteFile(p.Distros()+"/.change-d", text, 0o600)
	r, _ := registry.Open(p.Registry())
	if err := r.Add(registry.Distro{Name: "d", Disk: disk}); err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir, fleet: &fakevm.Fleet{}}
	h.serve()
	if text, err := os.ReadFile(disk); string(text) != "old" || err != nil {
		t.Error(string(text), err)
	}
	for _, path := range []string{disk + ".partial", p.Distros() + "/.change-d"} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("left", path)
		}
	}
}

// TestRegistryDamaged: a service that finds a damaged registry makes it anew by the
// disks, says so once, and goes on.
func TestRegistryDamaged(t *testing.T) {
	h := diskHost(t, fakevm.Hooks{})
	for _, call := range []api.Call{
		{Verb: api.VerbClone, Name: "debian", New: "copy"},
		{Verb: api.VerbMove, Name: "copy", Dir: filepath.Join(h.dir, "elsewhere")},
		{Verb: api.VerbResize, Name: "debian", Size: 512 << 20}, // its file is another one then
		{Verb: api.VerbRename, Name: "debian", New: "renamed"},
	} {
		if _, err := h.manage(call); err != nil {
			t.Fatalf("%+v: %v", call, err)
		}
	}
	before := h.list()
	h.stop()
	path := pathsIn(h.dir).Registry()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(path, text[:len(text)-10], 0o600)
	h.serve()
	var said []string
	c := h.client()
	c.Notice = func(text string) { said = append(said, text) }
	for range 2 {
		if err := c.Call(api.Call{Verb: api.VerbStatus}, nil, true); err != nil {
			t.Fatal(err)
		}
	}
	if len(said) != 1 || !strings.Contains(said[0], "2 disks") || !strings.Contains(said[0], path+".damaged") {
		t.Errorf("said %q", said)
	}
	if got := h.list(); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("rebuilt\n%v\nwant\n%v", got, before)
	}
}

// TestOwnVM: a distro with `vm = own` shares no VM, and is listed, locked and stopped
// like any other.
func TestOwnVM(t *testing.T) {
	h := newHost(t, fakevm.Hooks{})
	config := pathsIn(h.dir).ConfigFile
	os.WriteFile(config, []byte("[distro.Own]\nvm = own\n"), 0o600)
	h.stop()
	h.addDistro("shared")
	h.addDistro("own")
	h.serve()
	run := func(distro string) {
		t.Helper()
		if status, err := h.client().Run(RunSpec{Open: api.Open{Distro: distro}, Argv: []string{"true"}}, pipes(t, nil).stdio()); status != 0 || err != nil {
			t.Fatal(distro, status, err)
		}
	}
	run("shared")
	run("own")
	run("own")
	vms := h.fleet.VMs()
	if len(vms) != 2 || vms[0].Starts() != 1 || vms[1].Starts() != 1 || vms[0].Config.VsockPath == vms[1].Config.VsockPath {
		t.Fatalf("%d VMs", len(vms))
	}
	states := func() string {
		text := ""
		for _, d := range h.list() {
			text += fmt.Sprint(d.Name, " ", d.State, " ", d.OwnVM, "\n")
		}
		return text
	}
	if got := states(); got != "shared Running false\nown Running true\n" {
		t.Errorf("list: %s", got)
	}
	var st api.Status
	if err := h.client().Call(api.Call{Verb: api.VerbStatus}, &st, true); err != nil || st.Running != 2 || st.VM == nil || len(st.OwnVMs) != 1 || st.OwnVMs[0].Distro != "own" {
		t.Errorf("status: %+v, %v", st, err)
	}

	// wslconfig counts at the next start.
	os.WriteFile(config, nil, 0o600)
	run("own")
	if n := len(h.fleet.VMs()); n != 2 {
		t.Errorf("%d VMs after wslconfig has changed", n)
	}
	if err := h.client().Call(api.Call{Verb: api.VerbTerminate, Name: "own"}, nil, true); err != nil {
		t.Fatal(err)
	}
	if got := states(); got != "shared Running false\nown Stopped false\n" {
		t.Errorf("after --terminate: %s", got)
	}
	run("own")
	if n := vms[0].Starts(); n != 2 {
		t.Errorf("%d starts in the shared VM", n)
	}
	if err := h.client().Call(api.Call{Verb: api.VerbTerminate, Name: "own"}, nil, true); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(config, []byte("[distro.own]\nvm = OWN\n"), 0o600)
	run("own")

	// A verb that needs the disk stops the distro in its VM.
	if err := h.client().Call(api.Call{Verb: api.VerbRename, Name: "own", New: "renamed"}, nil, true); err != nil {
		t.Fatal(err)
	}
	if got := states(); got != "shared Running false\nrenamed Stopped false\n" {
		t.Errorf("after --rename: %s", got)
	}
	vms = h.fleet.VMs()
	if err := h.client().Call(api.Call{Verb: api.VerbShutdown}, nil, true); err != nil {
		t.Fatal(err)
	}
	for i, vm := range vms {
		select {
		case <-vm.Done():
		default:
			t.Errorf("VM %d runs after --shutdown", i)
		}
	}
}
