package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/scripts/bench/report"
)

const tracing = "/sys/kernel/tracing"

// event is a line of the kernel's trace.
type event struct {
	comm string
	pid  int
	ms   float64
	name string
	rest string
}

func (e event) String() string {
	return fmt.Sprintf("%9.3f %s-%d %s %s", e.ms, e.comm, e.pid, e.name, e.rest)
}

var traceLine = regexp.MustCompile(`^ *(.+)-(\d+) +\[\d+\] +\S+ +(\d+\.\d+): ([\w]+)(?:\(|: ?)(.*)$`)

// traced records kernel events (group/name, with an optional filter behind a
// blank) while f runs.
func traced(events []string, f func() error) ([]event, error) {
	write := func(name, value string) error {
		return os.WriteFile(filepath.Join(tracing, name), []byte(value), 0)
	}
	if err := write("trace_clock", "mono"); err != nil {
		return nil, err
	}
	if err := write("buffer_size_kb", "65536"); err != nil {
		return nil, err
	}
	for _, e := range events {
		name, filter, _ := strings.Cut(e, " ")
		if filter != "" {
			if err := write("events/"+name+"/filter", filter); err != nil {
				return nil, err
			}
		}
		if err := write("events/"+name+"/enable", "1"); err != nil {
			return nil, err
		}
		defer write("events/"+name+"/enable", "0")
	}
	if err := write("trace", ""); err != nil {
		return nil, err
	}
	ferr := f()
	if err := write("tracing_on", "0"); err != nil {
		return nil, err
	}
	defer write("tracing_on", "1")
	text, err := os.ReadFile(filepath.Join(tracing, "trace"))
	if ferr != nil || err != nil {
		return nil, fmt.Errorf("trace: %w", errors.Join(ferr, err))
	}
	var list []event
	for line := range strings.Lines(string(text)) {
		m := traceLine.FindStringSubmatch(strings.TrimRight(line, "\n"))
		if m == nil {
			continue
		}
		e := event{comm: strings.TrimSpace(m[1]), name: m[4], rest: m[5]}
		e.pid, _ = strconv.Atoi(m[2])
		s, _ := strconv.ParseFloat(m[3], 64)
		e.ms = s * 1e3
		list = append(list, e)
	}
	return list, nil
}

// bootEvents are enough to tell a boot's phases apart.
var bootEvents = []string{
	"sched/sched_process_exec",
	"syscalls/sys_enter_connect", "syscalls/sys_enter_accept4", "syscalls/sys_exit_accept4", "syscalls/sys_enter_write",
	"syscalls/sys_enter_ioctl cmd==0xae01", // KVM_CREATE_VM
	"kvm/kvm_entry",
}

// phases runs a cold boot once more, traced, and returns what its time went
// into. Tracing costs time as well: the sum is larger than the boot's figure.
func (h *host) phases(argv []string) ([]report.Row, error) {
	var start, total float64
	events, err := traced(bootEvents, func() (err error) {
		start = monotonic()
		total, err = h.firstByte(argv)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, e := range events {
		if e.name != "kvm_entry" {
			logf("%v", e)
		}
	}
	rows, err := splitPhases(events, start, total)
	if err != nil {
		return nil, err
	}
	return rows, h.stop()
}

// monotonic is the trace's clock in ms.
func monotonic() float64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) //nolint:errcheck // it cannot fail
	return float64(t.Nano()) / 1e6
}

// splitPhases finds the boot's milestones among the events.
func splitPhases(events []event, start, total float64) ([]report.Row, error) {
	type milestone struct {
		phase string // what ends here
		is    func(e event) bool
	}
	execs := func(n int) func(event) bool {
		return func(e event) bool {
			if e.name == "sched_process_exec" {
				n--
			}
			return n == 0
		}
	}
	vm := 0
	list := []milestone{
		{"phase: fork and exec of the launcher", execs(1)},
		{"phase: launcher, until it has started the service", execs(1)},
		{"phase: service, until it has started the VM's process", func(e event) bool {
			if e.name == "sched_process_exec" {
				vm = e.pid
				return true
			}
			return false
		}},
		// KVM was probed by an earlier one: there is no other machine.
		{"phase: VM process until the machine is created", func(e event) bool { return e.name == "sys_ioctl" }},
		{"phase: create and load, until the kernel runs", func(e event) bool { return e.name == "kvm_entry" }},
		{"phase: kernel and /init, until it connects", func(e event) bool { return e.name == "sys_connect" && e.comm != "" && isThreadOf(events, e, vm) }},
		{"phase: distro, until the client's session connects", func(e event) bool { return e.name == "sys_connect" && !isThreadOf(events, e, vm) }},
	}
	var rows []report.Row
	at := start
	for _, e := range events {
		if len(list) == 0 {
			break
		}
		if list[0].is(e) {
			rows = append(rows, report.Row{Row: list[0].phase, Unit: "ms", Ours: e.ms - at})
			at, list = e.ms, list[1:]
		}
	}
	if len(list) > 0 {
		return nil, fmt.Errorf("the trace of a boot shows no end of %q", list[0].phase)
	}
	return append(rows, report.Row{Row: "phase: session, until the first byte", Unit: "ms", Ours: start + total - at}), nil
}

// isThreadOf tells whether an event is of the process, whose threads have its name.
func isThreadOf(events []event, e event, pid int) bool { return e.pid == pid || threads(pid)[e.pid] }

// threads are those of a process that still runs.
func threads(pid int) map[int]bool {
	found, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	m := map[int]bool{}
	for _, f := range found {
		if n, err := strconv.Atoi(filepath.Base(f)); err == nil {
			m[n] = true
		}
	}
	return m
}
