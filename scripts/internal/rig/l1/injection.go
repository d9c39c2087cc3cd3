package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

const tracing = "/sys/kernel/tracing"

// exitAfterInjection makes every guest of this machine's KVM leave at once, before
// its first instruction, when it is entered with an interrupt to deliver.
//
// QEMU's VMRUN delivers such an interrupt itself and leaves its vector in
// CPUState.exception_index (7.2, helper_vmrun, SVM_EVTINJ_TYPE_INTR; the same in
// later ones). The next #VMEXIT or exception overwrites it; but when the loop of
// cpu_exec is left before, as it is each time the instruction counter runs out or
// another CPU's turn comes, cpu_handle_exception delivers the vector again, to a guest
// whose interrupts are off: handlers then find the locks taken that they hold
// themselves. So nothing may come between the injection and an exit.
//
// The means is an interrupt that is pending for this machine at VMRUN. A probe of
// svm_vcpu_run, which runs with interrupts off, counts entries with an injection as
// perf events that wake a reader after each, and perf wakes readers from an
// interrupt which it sends to its own CPU (irq_work). There is no reader. The guest
// pays one exit for each interrupt, and each entry about half a microsecond.
//
// What it sets up lasts as long as the machine.
func exitAfterInjection() error {
	if err := unix.Mount("tracefs", tracing, "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount tracefs: %w", err)
	}
	const event = "rig/injection"
	probe := "p:" + event + " svm_vcpu_run injected=vcpu->arch.interrupt.injected"
	if err := os.WriteFile(filepath.Join(tracing, "kprobe_events"), []byte(probe), 0); err != nil {
		log, _ := os.ReadFile(filepath.Join(tracing, "error_log"))
		return fmt.Errorf("probe %q, which takes a kernel of 6.6 or later (scripts/rig --update): %w: %s", probe, err, bytes.TrimSpace(log))
	}
	text, err := os.ReadFile(filepath.Join(tracing, "events", event, "id"))
	if err != nil {
		return err
	}
	id, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil {
		return fmt.Errorf("id of event %s: %w", event, err)
	}
	filter, err := unix.BytePtrFromString("injected != 0")
	if err != nil {
		return err
	}
	for cpu := range runtime.NumCPU() {
		fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
			Type: unix.PERF_TYPE_TRACEPOINT, Size: unix.PERF_ATTR_SIZE_VER0, Config: id,
			Sample: 1, Wakeup: 1, // an event for each hit, a wake-up for each event
			Bits: unix.PerfBitDisabled,
		}, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err != nil {
			return fmt.Errorf("perf event %s on CPU %d: %w", event, cpu, err)
		}
		// Only for a buffer are there wake-ups; one that cannot be written here is
		// never full (perf_event_open(2), overwrite mode).
		if _, err := unix.Mmap(fd, 0, 2*os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return fmt.Errorf("buffer of perf event %s: %w", event, err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(filter))); errno != 0 {
			return fmt.Errorf("filter of perf event %s: %w", event, errno)
		}
		if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
			return fmt.Errorf("enable perf event %s: %w", event, err)
		}
	}
	return nil
}
