package tools

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/internal/hostpath"
)

// run is wslpath with its output and error text.
func run(t *testing.T, shares hostpath.Table, args ...string) (out, errOut string, status int) {
	t.Helper()
	var o, e strings.Builder
	status = wslpath(args, shares, &o, &e)
	return o.String(), e.String(), status
}

func TestWslpath(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"share/sub", "own"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"own/in": dir + "/share/sub", "share/out": dir + "/own"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(dir, "share"))
	shares := hostpath.Table{{Host: "/home/me", Guest: dir + "/share"}}
	for _, c := range []struct {
		args string
		want string // D stands for dir; "" is an error
	}{
		{"/home/me/x", "D/share/x"},
		{"-u /home/me/x/", "D/share/x/"},
		{"-u /home/me", "D/share"},
		{"-au /home/me/x", "D/share/x"},
		{"-u -a sub", "D/share/sub"},
		{"-u sub/x", "sub/x"},
		{"-u /etc/passwd", ""},
		{"-w D/share/sub", "/home/me/sub"},
		{"-m D/share/sub/", "/home/me/sub/"},
		{"-w D/own/in", "/home/me/sub"},
		{"-w D/own/in/new/file", "/home/me/sub/new/file"},
		{"-w D/share/out/x", ""}, // leads out of the share
		{"-w sub", "sub"},
		{"-aw sub", "/home/me/sub"},
		{"-wa sub/../new", "/home/me/new"},
		{"-w D/own", ""},
		{"-w -- -x", "-x"},
		{"-w ../own", ""},
		{"-u", ""},
		{"", ""},
		{"-uw x", ""},
		{"-x x", ""},
		{"a b", ""},
	} {
		args := strings.Fields(strings.ReplaceAll(c.args, "D", dir))
		out, errOut, status := run(t, shares, args...)
		want := strings.ReplaceAll(c.want, "D", dir)
		if want != "" {
			want += "\n"
		}
		if out != want || (status == 0) != (want != "") || (errOut == "") != (want != "") {
			t.Errorf("wslpath %s: %q, %q, status %d; want %q", c.args, out, errOut, status, want)
		}
	}
	if _, errOut, _ := run(t, nil, "-w", "/no/share"); errOut != "wslpath: /no/share: Invalid argument\n" {
		t.Errorf("%q", errOut)
	}
	if out, _, status := run(t, nil, "--help"); status != 0 || !strings.Contains(out, "usage") {
		t.Errorf("--help: %d, %q", status, out)
	}
}

// FuzzWslpath: whatever is asked, the answer is an error or, of an absolute path, one that
// lies in a share.
func FuzzWslpath(f *testing.F) {
	f.Add("-w", "/mnt/host/x")
	f.Add("-u", "/home/me/../x")
	f.Add("-aw", "sub/")
	f.Fuzz(func(t *testing.T, flag, p string) {
		shares := hostpath.Table{{Host: "/home/me", Guest: "/mnt/host"}}
		out, errOut, status := run(t, shares, flag, "--", p)
		if (status == 0) == (errOut != "") {
			t.Fatalf("wslpath %q %q: status %d, %q, %q", flag, p, status, out, errOut)
		}
		if status != 0 || strings.Contains(flag, "h") || !filepath.IsAbs(p) {
			return
		}
		root := shares[0].Guest
		if strings.ContainsAny(flag, "wm") {
			root = shares[0].Host
		}
		if out != root+"\n" && !strings.HasPrefix(out, root+"/") || strings.Contains(strings.TrimSuffix(out, "\n")+"/", "/../") {
			t.Fatalf("wslpath %q %q: %q is not in %s", flag, p, out, root)
		}
	})
}

func TestWslinfo(t *testing.T) {
	for args, want := range map[string]string{"--version": Version + "\n", "-n --version": Version, "--version -n": Version} {
		var out, errOut strings.Builder
		if st := wslinfo(strings.Fields(args), &out, &errOut); st != 0 || out.String() != want || errOut.Len() > 0 {
			t.Errorf("%s: %d, %q, %q", args, st, out.String(), errOut.String())
		}
	}
	for _, args := range []string{"", "-x", "--version --vm-id", "--msal-proxy-path"} {
		var out, errOut strings.Builder
		if st := wslinfo(strings.Fields(args), &out, &errOut); st != 1 || out.Len() > 0 || errOut.Len() == 0 {
			t.Errorf("%s: %d, %q, %q", args, st, out.String(), errOut.String())
		}
	}
	var out strings.Builder
	if st := wslinfo([]string{"--vm-id"}, &out, &out); st != 0 || len(out.String()) != 37 {
		t.Errorf("--vm-id: %d, %q", st, out.String())
	}
	out.Reset()
	if st := wslinfo([]string{"--networking-mode"}, &out, &out); st != 0 || out.String() != "nat\n" && out.String() != "none\n" {
		t.Errorf("--networking-mode: %d, %q", st, out.String())
	}
}
