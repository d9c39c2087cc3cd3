package localfs

import (
	"fmt"
	"os"
	"testing"

	"github.com/wsl2/wsl2/internal/p9"
)

// Over a socket pair, with one request at a time: what each costs on both sides.

func BenchmarkIO(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1<<20 - 64} {
		root, _ := share(b, Config{})
		f := create(b, root, "f", "")
		buf := make([]byte, size)
		b.Run(fmt.Sprint("write-", size), func(b *testing.B) {
			b.SetBytes(int64(size))
			for b.Loop() {
				must(f.WriteAt(b.Context(), buf, 0))(b)
			}
		})
		b.Run(fmt.Sprint("read-", size), func(b *testing.B) {
			b.SetBytes(int64(size))
			for b.Loop() {
				must(f.ReadAt(b.Context(), buf, 0))(b)
			}
		})
	}
}

func BenchmarkMetadata(b *testing.B) {
	root, _ := share(b, Config{})
	create(b, root, "f", "x")
	b.Run("getattr", func(b *testing.B) {
		for b.Loop() {
			must(root.GetAttr(b.Context(), p9.AttrBasic))(b)
		}
	})
	b.Run("walk-clunk", func(b *testing.B) {
		for b.Loop() {
			check(b, must(root.Walk(b.Context(), "f"))(b).Close(b.Context()))
		}
	})
	b.Run("create-unlink", func(b *testing.B) {
		for b.Loop() {
			f := must(root.Walk(b.Context()))(b)
			check(b, f.Create(b.Context(), "new", os.O_RDWR|os.O_EXCL, 0o644, 0))
			check(b, f.Close(b.Context()))
			check(b, root.UnlinkAt(b.Context(), "new", 0))
		}
	})
	for i := range 1000 {
		create(b, root, fmt.Sprint("entry-", i), "").Close(b.Context())
	}
	b.Run("readdir-1000", func(b *testing.B) {
		for b.Loop() {
			names(b, root)
		}
	})
}
