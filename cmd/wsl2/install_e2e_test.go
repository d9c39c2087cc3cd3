//go:build e2e

package main_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/wsl2/wsl2/internal/testsys"
)

// push makes an image of layers in a registry of the test's own and returns its name.
func push(t *testing.T, layers ...[]byte) string {
	t.Helper()
	return pushTo(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))), layers...)
}

// pushTo makes it in the registry that handler is.
func pushTo(t *testing.T, handler http.Handler, layers ...[]byte) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64"})
	testsys.Must(t, err)
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil })
		testsys.Must(t, err)
		img, err = mutate.AppendLayers(img, layer)
		testsys.Must(t, err)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/library/small:1.0")
	testsys.Must(t, err)
	testsys.Must(t, remote.Write(ref, img))
	return ref.String()
}

// TestInstall makes distros of a registry's image, of a list's entry and of a .wsl
// file, and sets the last one up at its first shell.
func TestInstall(t *testing.T) {
	h := testsys.New(t)
	h.Setenv("DOCKER_CONFIG", h.Path("home"))
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	distro := testsys.Busybox(t)

	image := push(t,
		testsys.Tar(t, append(distro[:len(distro):len(distro)],
			testsys.Entry{Name: "srv/kept", Content: []byte("kept"), UID: 1000, Mode: 0o4755},
			testsys.Entry{Name: "srv/deleted", Content: []byte("x")},
			testsys.Entry{Name: "srv/dir/a", Content: []byte("x")}, testsys.Entry{Name: "srv/dir/b", Content: []byte("x")})...),
		testsys.Tar(t, testsys.Entry{Name: "srv/.wh.deleted"}, testsys.Entry{Name: "srv/dir/.wh..wh..opq"}, testsys.Entry{Name: "srv/dir/c", Content: []byte("new")},
			testsys.Entry{Name: "srv/hard", Type: tar.TypeLink, Link: "srv/kept"}),
	)
	r := h.Run("--install", image)
	h.Want(r, 0, "small is installed")
	if got := inside(h, "small", "ls /srv /srv/dir; cat /srv/hard; stat -c '%a %u %h' /srv/hard"); got != "/srv:\ndir\nhard\nkept\n\n/srv/dir:\nc\nkept4755 1000 2" {
		t.Errorf("the image's files: %q", got)
	}
	h.Refused(h.Run("--install", image), "a distro named small exists", "--unregister small")
	h.OK("--install", image, "--name", "again", "--location", h.Path("data/elsewhere"), "--vhd-size", "1GB") // from the cache
	if d := disks(h)["again"]; d != h.Path("data/elsewhere/disk.ext4") {
		t.Errorf("installed at %s", d)
	}
	missing := strings.Replace(image, "small:1.0", "nosuch:1.0", 1)
	h.Refused(h.Run("--install", missing), "nosuch")

	// A list of one's own, with a .wsl file in it.
	conf := "[oobe]\ncommand = printf 'a question: '; read answer && echo it was $answer >/etc/answer\ndefaultUid = 1000\ndefaultName = Own-1.0\n"
	wsl := testsys.Compress(t, ".gz", testsys.Tar(t, append(distro[:len(distro):len(distro)], testsys.Entry{Name: "etc/wsl-distribution.conf", Content: []byte(conf)})...))
	path := h.File("own.wsl", wsl)
	sum, _ := testsys.SHA256(t, bytes.NewReader(wsl))
	list := func(sum string) {
		t.Helper()
		text, err := json.Marshal(map[string]any{"Default": "Own", "ModernDistributions": map[string]any{"Own": []any{
			map[string]any{"Name": "Listed", "FriendlyName": "One of our own", "Default": true, "Amd64Url": map[string]string{"Url": "file://" + path, "Sha256": "0x" + sum}},
		}}})
		testsys.Must(t, err)
		h.File("DistributionInfo.json", text)
	}
	list(sum)
	h.Config("[wsl2]", "defaultVhdSize=2GB", "[general]", "distributionListUrl=file://"+h.Path("DistributionInfo.json"))
	if out := h.OK("--list", "--online"); !strings.Contains(out, "Listed") || !strings.Contains(out, "One of our own") {
		t.Errorf("--list --online: %q", out)
	}
	if out := h.OK("--list", "--online", "--quiet"); !strings.HasPrefix(out, "Listed\n") {
		t.Errorf("--list --online --quiet: %q", out)
	}
	h.Refused(h.Run("--install", "nosuchdistro"), "nosuchdistro")
	h.OK("--install", "--no-launch") // the list's default
	h.OK("-d", "Listed", "-e", "true")
	list(strings.Repeat("00", 32))
	before := h.Files()
	h.Refused(h.Run("--install", "listed", "--name", "bad"), "SHA-256")
	if after := h.Files(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("left %v, before %v", after, before)
	}
	h.OK("--unregister", "listed")

	// The file itself names its distro.
	h.Refused(h.Run("--install", "--from-file", path, "--sha256", strings.Repeat("00", 32)), "SHA-256")
	h.OK("--install", "--from-file", path, "--sha256", sum)
	if got := strings.TrimSpace(h.OK("-d", "own-1.0", "-e", "id", "-un")); got != "root" {
		t.Errorf("before its first run it is %q", got)
	}
	// One that fails: no shell, and the next one asks again.
	if status, seen := typed(t, h, "Own-1.0", "a question: ", "\x04"); status == 0 || !strings.Contains(seen, "set-up of Own-1.0 ended with status 1") || !strings.Contains(seen, "tries again") {
		t.Errorf("a set-up that fails: status %d, %q", status, seen)
	}
	if got := strings.TrimSpace(h.OK("-d", "own-1.0", "-e", "id", "-un")); got != "root" {
		t.Errorf("after a set-up that failed it is %q", got)
	}
	shell(t, h, "Own-1.0", "a question: ", "forty-two\r", "$ ", "id -un; cat /etc/answer; exit\r", "alice", "", "it was forty-two")
	if got := strings.TrimSpace(h.OK("-d", "own-1.0", "-e", "id", "-un")); got != "alice" {
		t.Errorf("after its first run it is %q", got)
	}
	shell(t, h, "Own-1.0", "$ ", "exit\r") // and never again

	// One that brings no set-up gets ours.
	shell(t, h, "small", "User name: ", "Carol\r", "User name: ", "carol\r", "New password: ", "Quite-9-long\r", "password: ", "Quite-9-long\r", "$ ", "id -un; pwd; exit\r", "carol", "", "/home/carol")
	if got := strings.TrimSpace(h.OK("-d", "small", "-e", "id", "-un")); got != "carol" {
		t.Errorf("after its first run it is %q", got)
	}
	h.Refused(h.Run("--install", "--from-file", h.File("nameless.tar", testsys.Tar(t, distro...))), "--name")
	h.Refused(h.Run("--install", "--from-file", "https://127.0.0.1:1/x.wsl"), "--sha256")
	if left, _ := filepath.Glob(h.Path("cache/wsl2/blobs/*.partial")); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	h.OK("--shutdown")
	h.Fsck(false)
	if _, err := os.Stat(filepath.Join(h.Data(), "distros")); err != nil {
		t.Error(err)
	}
}

// TestInstallKilled: the client is killed while a layer comes. What fetches it ends as
// well, nothing of the distro is there, and the next --install makes it.
func TestInstallKilled(t *testing.T) {
	h := testsys.New(t)
	h.Setenv("DOCKER_CONFIG", h.Path("home"))
	h.Config("[wsl2]", "defaultVhdSize=2GB")
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var stuck atomic.Bool
	var config string // the blob that is asked for before the layers
	asked, left := make(chan struct{}, 1), make(chan struct{}, 1)
	image := pushTo(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !stuck.Load() || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") || strings.HasSuffix(r.URL.Path, config) {
			images.ServeHTTP(w, r)
			return
		}
		whole := httptest.NewRecorder()
		images.ServeHTTP(whole, r)
		w.Header().Set("Content-Length", strconv.Itoa(whole.Body.Len()))
		w.Write(whole.Body.Bytes()[:whole.Body.Len()/2]) // which the next --install goes on from
		http.NewResponseController(w).Flush()
		select {
		case asked <- struct{}{}:
		default:
		}
		<-r.Context().Done()
		select {
		case left <- struct{}{}:
		default:
		}
	}), testsys.Tar(t, testsys.Busybox(t)...))
	ref, err := name.ParseReference(image)
	testsys.Must(t, err)
	pushed, err := remote.Image(ref)
	testsys.Must(t, err)
	digest, err := pushed.ConfigName()
	testsys.Must(t, err)
	config = "/" + digest.String()

	stuck.Store(true)
	l := h.Start("--install", image)
	await := func(what string, event <-chan struct{}) {
		t.Helper()
		select {
		case <-event:
		case <-time.After(testsys.Deadline):
			t.Fatalf("%s: not after %v", what, testsys.Deadline)
		}
	}
	await("the registry is asked for a layer", asked)
	l.Kill()
	await("the blob's connection ends", left)
	if got := disks(h); len(got) != 0 {
		t.Errorf("distros %v", got)
	}
	for _, f := range h.Files() {
		if f != "registry.json" {
			t.Errorf("left %s", f)
		}
	}
	stuck.Store(false)
	h.OK("--install", image)
	h.OK("-d", "small", "-e", "true")
	h.OK("--shutdown")
	h.Fsck(false)
}

// shell opens a distro's login shell on a terminal, and types each second word when
// the first one has been printed.
func shell(t *testing.T, h *testsys.Host, distro string, dialogue ...string) {
	t.Helper()
	if status, seen := typed(t, h, distro, dialogue...); status != 0 {
		t.Errorf("%s: status %d: %s", distro, status, seen)
	}
}

// typed is shell for one that may fail: its status, and all that was printed.
func typed(t *testing.T, h *testsys.Host, distro string, dialogue ...string) (status int, printed string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := h.Cmd(ctx, "-d", distro)
	f, err := pty.Start(cmd)
	testsys.Must(t, err)
	defer f.Close()
	context.AfterFunc(ctx, func() { f.Close() })
	var seen []byte
	b := make([]byte, 1)
	for i := 0; i < len(dialogue); i += 2 {
		for from := len(seen); !strings.Contains(string(seen[from:]), dialogue[i]); {
			if _, err := f.Read(b); err != nil {
				t.Fatalf("%s: waiting for %q: %v; it printed %q", distro, dialogue[i], err, seen)
			}
			seen = append(seen, b[0])
		}
		if i+1 < len(dialogue) {
			_, err := io.WriteString(f, dialogue[i+1])
			testsys.Must(t, err)
		}
	}
	rest, _ := io.ReadAll(f) // EIO at its end
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), string(append(seen, rest...))
}
