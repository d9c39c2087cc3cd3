package tools

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/images"
)

// The tools' archive holds the programs, their loader and libraries.
func TestArchive(t *testing.T) {
	b, err := Archive(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]int64{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names[h.Name] = h.Size
	}
	if names["e2fsck"] == 0 || names["resize2fs"] == 0 {
		t.Errorf("%v", names)
	}
	path, _ := images.FindTool("e2fsck", images.ErrNoE2fsprogs)
	loader, err := interpreter(path)
	if err != nil || loader != "" && names[strings.TrimPrefix(loader, "/")] == 0 {
		t.Errorf("loader %q, %v: %v", loader, err, names)
	}
	t.Setenv("PATH", "")
	if _, err := images.FindTool("no-such-tool", images.ErrNoE2fsprogs); !errors.Is(err, images.ErrNoE2fsprogs) {
		t.Error(err)
	}
}
