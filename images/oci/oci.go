// Package oci pulls images from registries (OCI Distribution Specification) as the
// stream of layers that an import takes: each layer's own tar behind a mark, in
// their order. The layers are parsed by the guest alone (guest/untar, layer.go).
//
// It costs a process's start more than a command may take, so that only wsl2-fetch
// links it.
package oci

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"github.com/wsl2/wsl2/images"
	"github.com/wsl2/wsl2/images/archive"
	"github.com/wsl2/wsl2/images/blobs"
)

const (
	// LayerRecord is untar's mark of a layer: a PAX record of a global header.
	LayerRecord = "WSL2.layer"
	// parallel is how many layers are fetched at once.
	parallel = 4
	// maxLayers is more than any builder makes.
	maxLayers = 1000
)

// Image is an image of a registry, resolved but not yet fetched.
type Image struct {
	// Name is the last part of its repository: "alpine" of docker.io/library/alpine:3.20.
	Name   string
	Digest string
	// Bytes is the size of its layers, compressed.
	Bytes int64

	client *http.Client
	layers []blobs.Blob
}

// Resolve asks the registry for the image, for this machine's kind, with the user's
// docker credentials.
func Resolve(ctx context.Context, reference string) (*Image, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return nil, fmt.Errorf("%q is no name of an image: %w", reference, err)
	}
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	if config.OS != "" && config.OS != "linux" || config.Architecture != "" && config.Architecture != "amd64" {
		return nil, fmt.Errorf("image %s is for %s on %s, and this machine runs linux on amd64", ref, config.OS, config.Architecture)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	if n := len(manifest.Layers); n == 0 || n > maxLayers {
		return nil, fmt.Errorf("image %s has %d layers; from 1 to %d are possible", ref, n, maxLayers)
	}
	repo := ref.Context()
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, repo)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", repo.Registry, err)
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, remote.DefaultTransport, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, fmt.Errorf("registry %s: %w", repo.Registry, err)
	}
	m := &Image{Name: lastPart(repo.RepositoryStr()), Digest: digest.String(), client: &http.Client{Transport: rt}}
	for _, l := range manifest.Layers {
		if l.Digest.Algorithm != "sha256" || !l.MediaType.IsLayer() || !l.MediaType.IsDistributable() {
			return nil, fmt.Errorf("image %s: layer %s of type %s is none that can be unpacked", ref, l.Digest, l.MediaType)
		}
		m.layers = append(m.layers, blobs.Blob{
			URL:    fmt.Sprintf("%s://%s/v2/%s/blobs/%s", repo.Registry.Scheme(), repo.RegistryStr(), repo.RepositoryStr(), l.Digest),
			SHA256: l.Digest.Hex, Size: l.Size,
		})
		m.Bytes += l.Size
	}
	return m, nil
}

func lastPart(repository string) string {
	for i := len(repository) - 1; i >= 0; i-- {
		if repository[i] == '/' {
			return repository[i+1:]
		}
	}
	return repository
}

// Stream fetches the layers, several at once, into the cache, and writes them to w,
// each as soon as it is whole and verified. progress, if not nil, may be called by
// several goroutines, not at the same time.
func (m *Image) Stream(ctx context.Context, w io.Writer, cache blobs.Cache, progress images.Progress) error {
	fetched := make([]chan *os.File, len(m.layers))
	for i := range fetched {
		fetched[i] = make(chan *os.File, 1)
	}
	group, ctx := errgroup.WithContext(ctx)
	defer func() { // those that were not written
		for _, ch := range fetched {
			select {
			case f := <-ch:
				f.Close()
			default:
			}
		}
	}()
	received := counter(m.Bytes, progress)
	group.Go(func() error {
		fetchers, ctx := errgroup.WithContext(ctx)
		fetchers.SetLimit(parallel)
		first := map[string]int{} // a layer may be there twice
		for i, l := range m.layers {
			if _, again := first[l.SHA256]; again {
				continue
			}
			first[l.SHA256] = i
			fetchers.Go(func() error {
				f, err := cache.Fetch(ctx, m.client, l, received)
				if err == nil {
					fetched[i] <- f
				}
				return err
			})
		}
		return fetchers.Wait()
	})
	group.Go(func() error {
		done := map[string]bool{}
		for i, l := range m.layers {
			var f *os.File
			if done[l.SHA256] {
				var err error
				if f, err = cache.Fetch(ctx, m.client, l, nil); err != nil {
					return err
				}
			} else {
				select {
				case f = <-fetched[i]:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			done[l.SHA256] = true
			err := writeLayer(w, f, l.SHA256)
			f.Close()
			if err != nil {
				return err
			}
		}
		_, err := w.Write(make([]byte, 1024)) // the end mark that a layer may lack
		return err
	})
	return group.Wait()
}

// counter adds up what several goroutines receive.
func counter(total int64, progress images.Progress) func(int64) {
	if progress == nil {
		return nil
	}
	turn := make(chan int64, 1)
	turn <- 0
	return func(n int64) {
		done := <-turn + n
		progress(done, total)
		turn <- done
	}
}

// writeLayer writes a layer's mark and its tar, uncompressed.
func writeLayer(w io.Writer, f *os.File, sum string) error {
	var mark bytes.Buffer
	t := tar.NewWriter(&mark)
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "layer", PAXRecords: map[string]string{LayerRecord: sum}}); err != nil {
		return err
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if _, err := w.Write(mark.Bytes()); err != nil {
		return err
	}
	tarball, release, err := archive.Decompress(bufio.NewReaderSize(f, 256<<10))
	if err != nil {
		return fmt.Errorf("layer %s: %w", sum, err)
	}
	defer release()
	// Layers are made of whole blocks; one that is not would shift the next.
	n, err := io.Copy(w, tarball)
	if err == nil && n%512 != 0 {
		_, err = w.Write(make([]byte, 512-n%512))
	}
	if err != nil && !errors.Is(err, io.ErrClosedPipe) {
		err = fmt.Errorf("layer %s: %w", sum, err)
	}
	return err
}
