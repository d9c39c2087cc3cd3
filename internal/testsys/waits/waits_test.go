package waits

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestThreads: threads of this process that wait with and without a timeout.
func TestThreads(t *testing.T) {
	for _, c := range []struct {
		name    string
		timeout int // ms
		timed   bool
	}{{"for ever", -1, false}, {"an hour", 3600_000, true}} {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		tid, done := make(chan int), make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			tid <- unix.Gettid()
			var err error = unix.EINTR
			for err == unix.EINTR {
				_, err = unix.Poll([]unix.PollFd{{Fd: int32(pipe[0]), Events: unix.POLLIN}}, c.timeout) // ppoll(2)
			}
		}()
		id, found := <-tid, Thread{}
		for deadline := time.Now().Add(time.Minute); !strings.HasPrefix(found.Call, "271 ") && time.Now().Before(deadline); {
			threads, err := Threads(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range threads {
				if x.TID == id {
					found = x
				}
			}
		}
		if found.Wakeups == 0 || found.Timed() != c.timed || found.Monitor() {
			t.Errorf("%s: %+v: timed %v, monitor %v", c.name, found, found.Timed(), found.Monitor())
		}
		unix.Close(pipe[1])
		<-done
		unix.Close(pipe[0])
	}
}

// TestParse are lines of the kernel's.
func TestParse(t *testing.T) {
	for call, want := range map[string][2]bool{ // timed, monitor
		"running":                    {true, false},
		"-1 0x7ffc7d07f8b8 0x48c443": {true, false},
		"202 0x94bd38 0x80 0x0 0x0 0x0 0x0 0x7ffc7d07f8b8 0x48c443":                      {false, false},
		"202 0x94cc60 0x80 0x0 0x3b58a8759ea0 0x0 0x0 0x3b58a8759e68 0x48c443":           {true, true},
		"281 0x7 0x3b58a87856fc 0x80 0xffffffffffffffff 0x0 0x0 0x3b58a8785668 0x40a88e": {false, false},
		"281 0x7 0x3b58a87856fc 0x80 0x2710 0x0 0x0 0x3b58a8785668 0x40a88e":             {true, false},
		"271 0x16818580aed8 0x1 0x0 0x0 0x0 0x0 0x16818580acc0 0x40a88e":                 {false, false},
		"35 0x3b58a8759ea0 0x0 0x0 0x0 0x0 0x0 0x3b58a8759e68 0x48c443":                  {true, false},
		"0 0x0 0x3b58a8878000 0x1000 0x0 0x0 0x0 0x3b58a8768d68 0x40a88e":                {false, false},
	} {
		threads := Parse("Name:\tinit\nPid:\t12\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t4\n" + call + "\n")
		if len(threads) != 1 || threads[0] != (Thread{12, 7, call}) {
			t.Fatalf("%+v", threads)
		}
		if got := [2]bool{threads[0].Timed(), threads[0].Monitor()}; got != want {
			t.Errorf("%s: timed, monitor: %v, want %v", call, got, want)
		}
	}
}
