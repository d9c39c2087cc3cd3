package native

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/launcher/api"
)

func TestParseRanges(t *testing.T) {
	text := "# comment\nroot:100000:65536\nme:165536:1000\n1234:300000:65537\nme:400000:131072:7\nme:-1:5\nme:4294967290:65536\n  me:500000:65536  \nmeme:1:2\nme:1:0\n"
	got, others := parseRanges(text, "me", "1234")
	want := []idRange{{165536, 1000}, {300000, 65537}, {500000, 65536}}
	if !slices.Equal(got, want) {
		t.Errorf("ranges %v, want %v", got, want)
	}
	if want := []line{{"root", idRange{100000, 65536}}, {"meme", idRange{1, 2}}}; !slices.Equal(others, want) {
		t.Errorf("others' ranges %v, want %v", others, want)
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
		own, others := parseRanges(text, "me", "1234")
		for _, l := range others {
			own = append(own, l.ids)
		}
		for _, r := range own {
			if r.count == 0 || uint64(r.first)+uint64(r.count) > 1<<32-1 {
				t.Errorf("%+v is no range", r)
			}
		}
	})
}

// TestMapOf: a distro keeps its IDs, whatever its user gets; when they are his no more he is told which line was there.
func TestMapOf(t *testing.T) {
	root := filepath.Join(t.TempDir(), "rootfs")
	lock, err := Lock(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	u := hostUser{name: "me", uids: ids{path: "/etc/subuid", self: 1234}, gids: ids{path: "/etc/subgid", self: 1234}}
	of := func(ranges ...idRange) (IDMap, error) {
		u.uids.own, u.gids.own = ranges, ranges
		return u.mapOf(root, lock)
	}
	if _, err := of(); err == nil || !strings.Contains(api.AsError(err).Hint, "me:100000:65536") {
		t.Errorf("without a range: %v", err)
	}
	was, err := of(idRange{300000, minIDs})
	if err != nil {
		t.Fatal(err)
	}
	if now, err := of(idRange{300000, minIDs}, idRange{500000, 2 * minIDs}); err != nil || !reflect.DeepEqual(now, was) {
		t.Errorf("with a second, larger range: %v, %v", now, err)
	}
	if _, err := of(idRange{500000, minIDs}); err == nil || !strings.Contains(api.AsError(err).Hint, "/etc/subuid: me:300000:65536") {
		t.Errorf("with another: %v", err)
	}
	u.uids.others = []line{{"near", idRange{300000 + minIDs, 5}}, {"him", idRange{200000, 100001}}}
	if w := u.overlaps(was); len(w) != 1 || !strings.Contains(w[0], "to him") {
		t.Errorf("overlaps: %q", w)
	}
	if free := u.free(u.uids); free != "me:365541:65536" {
		t.Errorf("the next free line is %s", free)
	}
	// The distro's root can write to the lock.
	if err := os.WriteFile(lock.Name(), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if now, err := of(idRange{300000, minIDs}); err != nil || !reflect.DeepEqual(now, was) {
		t.Errorf("with a damaged lock: %v, %v", now, err)
	}
	// One that an earlier version has made has the map in its lock.
	text, err := os.ReadFile(root + idsSuffix)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(lock.Name(), text, 0o600), os.Remove(root+idsSuffix)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if now, err := of(idRange{300000, minIDs}, idRange{500000, 2 * minIDs}); err != nil || !reflect.DeepEqual(now, was) {
			t.Errorf("with the map in the lock: %v, %v", now, err)
		}
		if err := os.Truncate(lock.Name(), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(root+idsSuffix, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := of(idRange{300000, minIDs}); err == nil || !strings.Contains(err.Error(), root+idsSuffix) {
		t.Errorf("a damaged file: %v", err)
	}
}

// TestMapOfRoot: the kernel gives root any map, hence the file is held to root's own ranges.
func TestMapOfRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "rootfs")
	u := hostUser{name: "root", uids: ids{path: "/etc/subuid"}, gids: ids{path: "/etc/subgid"}}
	of := func(kept string) error {
		if err := os.WriteFile(root+idsSuffix, []byte(kept), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := u.mapOf(root, nil)
		return err
	}
	const good = `[{"Inside":0,"Outside":1879048192,"Count":65536}]`
	for _, list := range []string{
		`[{"Inside":0,"Outside":0,"Count":65536}]`, `[{"Inside":1000,"Outside":0,"Count":1}]`,
		`[{"Inside":0,"Outside":1879048192,"Count":65536},{"Inside":1000000,"Outside":0,"Count":1}]`, `[{"Inside":0,"Outside":300000,"Count":65536}]`,
	} {
		for _, kept := range []string{`{"UIDs":` + list + `,"GIDs":` + good + `}`, `{"UIDs":` + good + `,"GIDs":` + list + `}`} {
			if err := of(kept); err == nil {
				t.Errorf("%s is taken", kept)
			}
		}
	}
	if err := of(`{"UIDs":` + good + `,"GIDs":` + good + `}`); err != nil {
		t.Errorf("root's range without a line: %v", err)
	}
	u.uids.own, u.gids.own = []idRange{{300000, minIDs}}, []idRange{{300000, minIDs}}
	if err := of(`{"UIDs":[{"Inside":0,"Outside":300000,"Count":65536}],"GIDs":` + good + `}`); err != nil {
		t.Errorf("with a line: %v", err)
	}
}

// TestAll: all of a user's ranges are mapped, each once.
func TestAll(t *testing.T) {
	u := hostUser{uids: ids{self: 1000, own: []idRange{{100000, 65536}, {165000, 10}, {300000, 5}}}, gids: ids{self: 100}}
	want := IDMap{UIDs: []Extent{{0, 1000, 1}, {1, 100000, 65536}, {65537, 300000, 5}}, GIDs: []Extent{{0, 100, 1}}}
	if m := u.all(); !reflect.DeepEqual(m, want) {
		t.Errorf("%v, want %v", m, want)
	}
}
