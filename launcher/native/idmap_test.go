package native

import (
	"slices"
	"testing"
)

func TestParseRanges(t *testing.T) {
	text := "# comment\nroot:100000:65536\nme:165536:1000\n1234:300000:65537\nme:400000:131072:7\nme:-1:5\nme:4294967290:65536\n  me:500000:65536  \nmeme:1:2\nme:1:0\n"
	got := parseRanges(text, "me", "1234")
	want := []idRange{{165536, 1000}, {300000, 65537}, {500000, 65536}}
	if !slices.Equal(got, want) {
		t.Errorf("ranges %v, want %v", got, want)
	}
	if r, ok := largest(got); !ok || r != want[1] {
		t.Errorf("the largest is %v, %v", r, ok)
	}
	if r, ok := largest(want[:1]); ok {
		t.Errorf("%v is too small for a distro", r)
	}
}

// TestExtents: every ID of the range is there once, and the user himself.
func TestExtents(t *testing.T) {
	const own, first, count = 1234, 300000, minIDs
	at := map[uint32]uint32{}
	for _, e := range extents(own, idRange{first, count}) {
		for i := range e.Count {
			if _, twice := at[e.Inside+i]; twice {
				t.Fatalf("ID %d is mapped twice", e.Inside+i)
			}
			at[e.Inside+i] = e.Outside + i
		}
	}
	if len(at) != count+1 {
		t.Errorf("%d IDs, want %d", len(at), count+1)
	}
	for inside, want := range map[uint32]uint32{0: first, 999: first + 999, 1000: own, 1001: first + 1000, 65534: first + 65533, 65536: first + 65535} {
		if at[inside] != want {
			t.Errorf("ID %d is the host's %d, want %d", inside, at[inside], want)
		}
	}
}

// TestRootRange: the root of a distro that root runs is nobody that the host knows.
func TestRootRange(t *testing.T) {
	if rootRange.first < 1<<30 || uint64(rootRange.first)+uint64(rootRange.count) > 1<<31-1 {
		t.Errorf("%+v: IDs above 2^31 are negative to some programs, those below are given out", rootRange)
	}
}

func FuzzParseRanges(f *testing.F) {
	f.Add("root:100000:65536\nme:1:2\n")
	f.Add("me:4294967295:4294967295\nme::\n:::\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, r := range parseRanges(text, "me", "1234") {
			if r.count == 0 || uint64(r.first)+uint64(r.count) > 1<<32-1 {
				t.Errorf("%+v is no range", r)
			}
		}
	})
}
