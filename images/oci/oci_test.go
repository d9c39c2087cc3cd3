package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/wsl2/wsl2/images/blobs"
)

// layer is one with a file that does not compress.
func layer(t *testing.T, file string, size int) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: file, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(size)})
	seed := uint32(len(file))
	for i := range size {
		seed = seed*1664525 + 1013904223
		w.Write([]byte{byte(seed>>24) + byte(i>>16)})
	}
	w.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// server is a registry with what may go wrong on the way to it.
type server struct {
	*httptest.Server
	host   string
	blobs  atomic.Int32 // requests
	ranges atomic.Int32 // those that resumed
	// wrap changes the answer to a request for a blob.
	wrap atomic.Pointer[func(http.ResponseWriter, *http.Request, http.Handler)]
}

func newServer(t *testing.T) *server {
	t.Helper()
	// A user's own settings are none of the test's.
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := &server{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:") {
			s.blobs.Add(1)
			if r.Header.Get("Range") != "" {
				s.ranges.Add(1)
			}
			if f := s.wrap.Load(); f != nil {
				(*f)(w, r, inner)
				return
			}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	s.host = strings.TrimPrefix(s.URL, "http://")
	return s
}

func (s *server) onBlob(f func(http.ResponseWriter, *http.Request, http.Handler)) { s.wrap.Store(&f) }

// push puts an image into the registry and returns its reference.
func (s *server) push(t *testing.T, layers ...v1.Layer) string {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err == nil {
		img, err = mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "amd64"})
	}
	if err == nil {
		img, err = mutate.AppendLayers(img, layers[0]) // one layer is there twice
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.write(t, img)
}

func (s *server) write(t *testing.T, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(s.host + "/some/small:1.0")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// want is the stream of the layers.
func want(t *testing.T, layers ...v1.Layer) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, l := range layers {
		sum, _ := l.Digest()
		mark := tar.NewWriter(&b)
		mark.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "layer", PAXRecords: map[string]string{LayerRecord: sum.Hex}})
		mark.Flush()
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(&b, r)
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func pull(ref, cache string) ([]byte, int64, error) {
	img, err := Resolve(context.Background(), ref)
	if err != nil {
		return nil, 0, err
	}
	var b bytes.Buffer
	var last int64
	err = img.Stream(context.Background(), &b, blobs.Cache{Dir: cache}, func(done, total int64) { last = done })
	return b.Bytes(), last, err
}

func TestPull(t *testing.T) {
	s := newServer(t)
	a, b := layer(t, "a", 300000), layer(t, "b", 1000)
	ref := s.push(t, a, b)
	cache := t.TempDir()
	got, _, err := pull(ref, cache)
	if err != nil || !bytes.Equal(got, want(t, a, b, a)) {
		t.Fatalf("%d bytes, want %d: %v", len(got), len(want(t, a, b, a)), err)
	}
	if n := s.blobs.Load(); n != 3 { // and the configuration
		t.Errorf("%d blobs were asked for", n)
	}
	// From the cache, now.
	if got, _, err := pull(ref, cache); err != nil || !bytes.Equal(got, want(t, a, b, a)) {
		t.Error(len(got), err)
	}
	if n := s.blobs.Load(); n != 4 {
		t.Errorf("%d blobs were asked for, the second time as well", n)
	}
	// A file of the cache that was damaged is fetched anew.
	files, _ := filepath.Glob(cache + "/sha256-*")
	for _, f := range files {
		if err := os.WriteFile(f, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, _, err := pull(ref, cache); err != nil || !bytes.Equal(got, want(t, a, b, a)) {
		t.Error(len(got), err)
	}
	if files, _ := filepath.Glob(cache + "/*.partial"); len(files) != 0 {
		t.Errorf("left %q", files)
	}
}

// The connection breaks off again and again: it goes on where it was.
func TestPullResumes(t *testing.T) {
	s := newServer(t)
	a := layer(t, "a", 300000)
	ref := s.push(t, a)
	size, _ := a.Size()
	s.onBlob(func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		rec := httptest.NewRecorder()
		inner.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		body := rec.Body.Bytes()
		if len(body) > 100000 { // more than that does not come through
			w.Write(body[:100000])
			panic(http.ErrAbortHandler)
		}
		w.Write(body)
	})
	cache := t.TempDir()
	if got, done, err := pull(ref, cache); err != nil || !bytes.Equal(got, want(t, a, a)) || done < size {
		t.Fatalf("%d bytes, progress %d of %d: %v", len(got), done, size, err)
	}
	if s.ranges.Load() < 2 {
		t.Errorf("%d requests resumed", s.ranges.Load())
	}
}

// A server that is lost for good: an error, and the next command goes on.
func TestPullLost(t *testing.T) {
	s := newServer(t)
	a := layer(t, "a", 300000)
	ref := s.push(t, a)
	cut := true
	s.onBlob(func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		rec := httptest.NewRecorder()
		inner.ServeHTTP(rec, r)
		if rec.Body.Len() < 10000 || !cut {
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			w.Write(rec.Body.Bytes())
			return
		}
		cut = false
		w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes()[:50000])
		w.(http.Flusher).Flush()
		s.onBlob(func(w http.ResponseWriter, r *http.Request, _ http.Handler) { w.WriteHeader(http.StatusForbidden) })
		panic(http.ErrAbortHandler)
	})
	cache := t.TempDir()
	if _, _, err := pull(ref, cache); err == nil || !strings.Contains(err.Error(), "403") {
		t.Fatal(err)
	}
	s.wrap.Store(nil)
	s.ranges.Store(0)
	if got, _, err := pull(ref, cache); err != nil || !bytes.Equal(got, want(t, a, a)) || s.ranges.Load() != 1 {
		t.Errorf("%d bytes, %d resumed: %v", len(got), s.ranges.Load(), err)
	}
}

// What is not what its digest says is refused, and nothing of it is kept.
func TestPullDigest(t *testing.T) {
	s := newServer(t)
	a := layer(t, "a", 20000)
	ref := s.push(t, a)
	s.onBlob(func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		rec := httptest.NewRecorder()
		inner.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		if len(body) > 10000 {
			body[5000] ^= 1
		}
		w.WriteHeader(rec.Code)
		w.Write(body)
	})
	cache := t.TempDir()
	if _, _, err := pull(ref, cache); !errors.Is(err, blobs.ErrDigest) {
		t.Fatal(err)
	}
	if files, _ := filepath.Glob(cache + "/*"); len(files) != 0 {
		t.Errorf("kept %q", files)
	}
}

func TestResolveRefuses(t *testing.T) {
	s := newServer(t)
	other, err := mutate.AppendLayers(empty.Image, layer(t, "a", 10))
	if err == nil {
		other, err = mutate.ConfigFile(other, &v1.ConfigFile{OS: "linux", Architecture: "s390x"})
	}
	if err != nil {
		t.Fatal(err)
	}
	foreign := s.write(t, other)
	for ref, says := range map[string]string{
		foreign:                   "s390x",
		s.host + "/no/such:image": "no/such",
		"UPPER/case":              "no name of an image",
		"":                        "no name of an image",
	} {
		if _, err := Resolve(context.Background(), ref); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	s.write(t, empty.Image)
	if _, err := Resolve(context.Background(), s.host+"/some/small:1.0"); err == nil || !strings.Contains(err.Error(), "0 layers") {
		t.Error(err)
	}
}

// An index has an image for each kind of machine: ours is taken.
func TestResolvePlatform(t *testing.T) {
	s := newServer(t)
	index := v1.ImageIndex(empty.Index)
	for _, arch := range []string{"arm64", "amd64"} {
		img, err := mutate.AppendLayers(empty.Image, layer(t, arch, 100))
		if err == nil {
			img, err = mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: arch})
		}
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	ref, _ := name.ParseReference(s.host + "/some/index")
	if err := remote.WriteIndex(ref, mutate.IndexMediaType(index, types.OCIImageIndex)); err != nil {
		t.Fatal(err)
	}
	got, _, err := pull(ref.String(), t.TempDir())
	if err != nil || !bytes.Contains(got, []byte("amd64\x00")) || bytes.Contains(got, []byte("arm64\x00")) {
		t.Error(err)
	}
}

// The user's docker credentials are used.
func TestCredentials(t *testing.T) {
	s := newServer(t)
	a := layer(t, "a", 100)
	ref := s.push(t, a)
	authorized := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.Config.Handler.ServeHTTP(w, r)
	}))
	defer authorized.Close()
	host := strings.TrimPrefix(authorized.URL, "http://")
	ref = strings.Replace(ref, s.host, host, 1)
	if _, _, err := pull(ref, t.TempDir()); err == nil || !strings.Contains(err.Error(), "UNAUTHORIZED") && !strings.Contains(err.Error(), "401") {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("me:secret")))
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/config.json", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
	if _, err := authn.Resolve(context.Background(), authn.DefaultKeychain, mustRegistry(t, host)); err != nil {
		t.Fatal(err)
	}
	if got, _, err := pull(ref, t.TempDir()); err != nil || !bytes.Equal(got, want(t, a, a)) {
		t.Error(len(got), err)
	}
}

func mustRegistry(t *testing.T, host string) name.Registry {
	t.Helper()
	r, err := name.NewRegistry(host)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A layer that is no gzip after all.
func TestLayerDamaged(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	z.Write(bytes.Repeat([]byte("x"), 100000))
	z.Flush() // no end
	f.Seek(0, io.SeekStart)
	if err := writeLayer(io.Discard, f, "sum"); err == nil || !strings.Contains(err.Error(), "layer sum") {
		t.Error(err)
	}
}
