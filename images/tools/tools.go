// Package tools packs the host's e2fsprogs for the guest, where they run: the host
// parses no file system that a guest has made.
package tools

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/wsl2/wsl2/images"
)

// Archive makes a tar of the host's e2fsck and resize2fs with the libraries they
// need, for the guest, where they run: programs at the root, libraries in lib, the
// loader where the programs name it.
func Archive(ctx context.Context) ([]byte, error) {
	files := map[string]string{} // name in the archive: path
	for _, name := range []string{"e2fsck", "resize2fs"} {
		path, err := images.FindTool(name, images.ErrNoE2fsprogs)
		if err != nil {
			return nil, err
		}
		files[name] = path
		loader, err := interpreter(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if loader == "" {
			continue // static
		}
		files[strings.TrimPrefix(loader, "/")] = loader
		libs, err := libraries(ctx, loader, path)
		if err != nil {
			return nil, err
		}
		for _, l := range libs {
			files["lib/"+filepath.Base(l)] = l
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, path := range files {
		if err := addFile(w, name, path); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// interpreter returns the dynamic loader that a program names, "" if none.
func interpreter(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			return string(bytes.TrimRight(b, "\x00")), err
		}
	}
	return "", nil
}

// libraries asks the loader what the program would be loaded with, as ldd(1) does.
// Both are the host's own.
func libraries(ctx context.Context, loader, path string) ([]string, error) {
	cmd := exec.CommandContext(ctx, loader, "--list", path)
	cmd.Env = []string{"LC_ALL=C"}
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("the libraries of %s: %w", path, err)
	}
	var libs []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line) // "libe2p.so.2 => /lib/.../libe2p.so.2 (0x7f...)"
		for i, f := range fields {
			if f == "=>" && i+1 < len(fields) {
				if !filepath.IsAbs(fields[i+1]) {
					return nil, fmt.Errorf("%s lacks a library: %s", path, strings.TrimSpace(line))
				}
				libs = append(libs, fields[i+1])
			}
		}
	}
	return libs, nil
}

func addFile(w *tar.Writer, name, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}
