package microvm

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

// Guest memory is aligned to huge pages, asks for them and stays out of core
// dumps: they would hold the guest's secrets, gigabytes of them.
func TestMapRAM(t *testing.T) {
	const size = 6 << 20
	b, unmap, err := mapRAM(size)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) != size {
		t.Errorf("%d bytes", len(b))
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	if start%hugePage != 0 {
		t.Errorf("mapped at %#x", start)
	}
	_, err = os.Stat("/sys/kernel/mm/transparent_hugepage")
	if flags := vmFlags(t, start); !flags["dd"] || flags["hg"] != (err == nil) {
		t.Errorf("flags %v, want dd (no dump) and, where this kernel has them, hg (huge pages)", flags)
	}
	if err := unmap(); err != nil {
		t.Fatal(err)
	}
	if flags := vmFlags(t, start); flags["dd"] {
		t.Errorf("still mapped: %v", flags)
	}
}

// vmFlags returns the VmFlags (proc_pid_smaps(5)) of the mapping that begins at
// start; nil if there is none.
func vmFlags(t *testing.T, start uintptr) map[string]bool {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, at, ok := strings.Cut("\n"+string(smaps), fmt.Sprintf("\n%08x-", start))
	if !ok {
		return nil
	}
	_, line, _ := strings.Cut(at, "\nVmFlags:")
	line, _, _ = strings.Cut(line, "\n")
	flags := map[string]bool{}
	for _, f := range strings.Fields(line) {
		flags[f] = true
	}
	return flags
}
