package blk

import (
	"fmt"
	"testing"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// From the driver's submission to its completion, on a file in the page cache.
func BenchmarkBlk(b *testing.B) {
	const size = 64 << 20
	for _, op := range []struct {
		name string
		typ  uint32
	}{{"read", typeIn}, {"write", typeOut}} {
		for _, n := range []int{4 << 10, 1 << 20} {
			for _, depth := range []int{1, 32} {
				if n*depth > 8<<20 {
					depth = 8
				}
				b.Run(fmt.Sprintf("%s/%dKiB/depth %d", op.name, n>>10, depth), func(b *testing.B) {
					_, disk := image(b, size)
					_, g := start(b, Config{Disk: disk}, virtiotest.Options{MemoryBytes: 64 << 20})
					var segs []int
					var data [][]byte
					for left := n; left > 0; left -= 4096 {
						segs, data = append(segs, 4096), append(data, make([]byte, 4096))
					}
					reqs := make([]*virtiotest.Request, depth)
					for i := range reqs {
						h := header(op.typ, uint64(i*n/SectorSize))
						if op.typ == typeIn {
							reqs[i] = g.Ring(0).Prepare(b, [][]byte{h}, append(segs, 1)...)
						} else {
							reqs[i] = g.Ring(0).Prepare(b, append([][]byte{h}, data...), 1)
						}
						do(b, g, append([][]byte{header(typeOut, uint64(i*n/SectorSize))}, data...))
					}
					b.SetBytes(int64(n * depth))
					b.ReportAllocs()
					for b.Loop() {
						g.Ring(0).SubmitAll(reqs...)
						for _, q := range reqs {
							<-q.Done()
						}
					}
				})
			}
		}
	}
}
