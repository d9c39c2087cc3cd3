// Command wsl2-fetch brings distros from elsewhere for `wsl2 --install` and
// `wsl2 --list --online`: it looks names up, pulls images and downloads files. It is a program
// of its own because the libraries for that would cost each wsl2 command a third of
// its time at start.
//
//	wsl2-fetch list URL ALL         prints the catalogue as JSON
//	wsl2-fetch get NAME URL CACHE   writes the archive that NAME means to stdout
//	wsl2-fetch url URL SHA256 CACHE writes the file at URL to stdout
//
// URL is that of a DistributionInfo.json, "" for the default one. What it has to tell, it
// writes to descriptor 3 as JSON, an Event a line; the last may be an error.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/images/blobs"
	"github.com/wsl2/wsl2/images/catalog"
	"github.com/wsl2/wsl2/images/oci"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	syscall.CloseOnExec(3)
	f := &fetcher{events: json.NewEncoder(os.NewFile(3, "events"))}
	if err := f.run(ctx, os.Args[1:]); err != nil {
		f.tell(images.FetchEvent{Error: err.Error()})
		os.Exit(1)
	}
}

type fetcher struct {
	mu     sync.Mutex
	events *json.Encoder
	last   time.Time
}

func (f *fetcher) tell(e images.FetchEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events.Encode(e)
}

// tellEvery is how often progress is told.
const tellEvery = 100 * time.Millisecond

func (f *fetcher) progress(done, total int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); done == total || now.Sub(f.last) >= tellEvery {
		f.last = now
		f.events.Encode(images.FetchEvent{Done: done, Total: total})
	}
}

func (f *fetcher) run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "list":
		return f.list(ctx, args[1], args[2] == "all")
	case len(args) == 4 && args[0] == "get":
		return f.get(ctx, args[1], args[2], cacheIn(args[3]))
	case len(args) == 4 && args[0] == "url":
		f.tell(images.FetchEvent{}) // the archive knows its name
		return f.url(ctx, args[1], args[2], cacheIn(args[3]))
	}
	return errors.New("wsl2-fetch is run by wsl2 --install, not by hand")
}

func cacheIn(dir string) blobs.Cache { return blobs.Cache{Dir: filepath.Join(dir, "blobs")} }

// list prints the list at address, or the default one and what we know ourselves.
func (f *fetcher) list(ctx context.Context, address string, all bool) error {
	l, err := f.load(ctx, address)
	if err != nil {
		return err
	}
	distros := l.Distros
	if !all {
		distros = l.Short()
	}
	return json.NewEncoder(os.Stdout).Encode(distros)
}

// load merges the catalogues, the configured one first. That the default one cannot
// be reached is told, and no error.
func (f *fetcher) load(ctx context.Context, address string) (catalog.List, error) {
	builtIn := catalog.BuiltIn()
	if address != "" {
		l, err := catalog.Load(ctx, address)
		if err != nil {
			return l, err
		}
		l.Distros = append(l.Distros, builtIn.Distros...)
		return l, nil
	}
	l, err := catalog.Load(ctx, catalog.DefaultURL)
	if err != nil {
		f.tell(images.FetchEvent{Notice: err.Error() + "; only what wsl2 knows by itself can be installed by name"})
		return builtIn, nil
	}
	return catalog.List{Distros: append(builtIn.Distros, l.Distros...), Default: builtIn.Default}, nil
}

// get finds what a name means: an entry of a catalogue, or an image of a registry.
func (f *fetcher) get(ctx context.Context, name, address string, cache blobs.Cache) error {
	var d catalog.Distro
	builtIn := catalog.BuiltIn()
	found := false
	if address == "" { // what we know ourselves needs no network to be found
		if name == "" {
			name = builtIn.Default
		}
		d, found = builtIn.Find(name)
	}
	if !found && !strings.ContainsAny(name, "/:@") {
		l, err := f.load(ctx, address)
		if err != nil {
			return err
		}
		if name == "" {
			name = l.Default
		}
		if d, found = l.Find(name); !found {
			return fmt.Errorf("no distro %q is known; `wsl2 --list --online` shows those that are, and an image of a registry is named in full (docker.io/library/%s)", name, strings.ToLower(name))
		}
	}
	switch {
	case !found:
		return f.image(ctx, name, "", cache)
	case d.Image != "":
		err := f.image(ctx, d.Image, d.Name, cache)
		if d.Name == "debian" && unreachable(err) {
			return f.bootstrap(ctx, err)
		}
		return err
	}
	f.tell(images.FetchEvent{Name: d.Name})
	return f.url(ctx, d.URL, d.SHA256, cache)
}

// image pulls an image of a registry. name is the distro's, "" for the image's own.
func (f *fetcher) image(ctx context.Context, reference, name string, cache blobs.Cache) error {
	img, err := oci.Resolve(ctx, reference)
	if err != nil {
		return err
	}
	if name == "" {
		name = img.Name
	}
	f.tell(images.FetchEvent{Name: name, Total: img.Bytes})
	return img.Stream(ctx, os.Stdout, cache, f.progress)
}

// unreachable tells whether an error is that of a network that is not there.
func unreachable(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	return errors.As(err, &op) || errors.As(err, &dns) || os.IsTimeout(err)
}

// url downloads a file with its SHA-256, or copies one from this machine.
func (f *fetcher) url(ctx context.Context, address, sum string, cache blobs.Cache) error {
	path, local := strings.CutPrefix(address, "file://")
	var file *os.File
	var err error
	switch {
	case local && sum == "":
		file, err = os.Open(path)
	case local:
		t := &http.Transport{}
		t.RegisterProtocol("file", http.NewFileTransport(http.Dir("/")))
		file, err = cache.Fetch(ctx, &http.Client{Transport: t}, blobs.Blob{URL: address, SHA256: sum}, nil)
	case sum == "":
		return fmt.Errorf("%s: give its SHA-256 (--sha256), so that it cannot be changed on the way", address)
	default:
		var done int64
		file, err = cache.Fetch(ctx, http.DefaultClient, blobs.Blob{URL: address, SHA256: sum}, func(n int64) {
			done += n
			f.progress(done, 0)
		})
	}
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = io.Copy(os.Stdout, file)
	return err
}

// cleanUpGrace is how long mmdebstrap may take to remove what it has made.
const cleanUpGrace = 20 * time.Second

// bootstrap makes a Debian of the host's package mirrors.
func (f *fetcher) bootstrap(ctx context.Context, why error) error {
	exe, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return fmt.Errorf("%w; and mmdebstrap, which makes a Debian of this host's apt sources, is not installed", why)
	}
	f.tell(images.FetchEvent{Name: "debian", Notice: fmt.Sprintf("no registry is reached (%v); making Debian from this host's apt sources", why)})
	cmd := exec.CommandContext(ctx, exe, "--quiet", "--variant=minbase", "--include=ca-certificates,iproute2,less,procps,sudo,vim-tiny", "--format=tar", debianSuite(), "-")
	cmd.Stdout = os.Stdout
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// It cleans up after SIGTERM, and leaves some hundred megabytes after SIGKILL. Pdeathsig is
	// the end of the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = cleanUpGrace
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// debianSuite is the host's own release if it is Debian.
func debianSuite() string {
	text, _ := os.ReadFile("/etc/os-release")
	debian, suite := false, ""
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"`)
		switch key {
		case "ID":
			debian = value == "debian"
		case "VERSION_CODENAME":
			suite = value
		}
	}
	if debian && suite != "" {
		return suite
	}
	return "stable"
}
