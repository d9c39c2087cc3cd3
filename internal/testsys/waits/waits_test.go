package waits

import (
	"os"
	"os/exec"
	"runtime"
	"slices"
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

// ticks, in the environment, makes this program one that wakes as often.
const ticks = "WAITS_TEST_TICKS"

func TestMain(m *testing.M) {
	if every, err := time.ParseDuration(os.Getenv(ticks)); err == nil {
		for range time.Tick(every) {
		}
	}
	os.Exit(m.Run())
}

// TestUndisturbed: a program that wakes every now and then is never taken for one that waits for nothing.
func TestUndisturbed(t *testing.T) {
	for _, every := range []string{"1ms", "10ms", "100ms"} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), ticks+"="+every)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		look := func() []Thread {
			threads, err := Threads(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			return threads
		}
		before := look()
		for moments, deadline := 0, time.Now().Add(time.Minute); moments < 500; {
			after := look()
			if len(after) > 1 && Undisturbed(before, after) {
				moments++
				if !slices.ContainsFunc(after, func(x Thread) bool { return x.Timed() && !x.Monitor() }) {
					t.Fatalf("%s: nothing waits for time: %+v", every, after)
				}
			}
			if before = after; time.Now().After(deadline) {
				t.Fatalf("%s: %d moments at which nothing ran in a minute", every, moments)
			}
		}
	}
	one, woken := []Thread{{1, 7, ""}}, []Thread{{1, 8, ""}}
	if !Undisturbed(one, one) || Undisturbed(one, woken) || Undisturbed(one, nil) || Undisturbed(one, []Thread{{2, 7, ""}}) {
		t.Error("a thread that was woken, ended or began is a disturbance")
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
		threads := Parse(call + "\nName:\tinit\nPid:\t12\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t4\n")
		if len(threads) != 1 || threads[0] != (Thread{12, 7, call}) {
			t.Fatalf("%+v", threads)
		}
		if got := [2]bool{threads[0].Timed(), threads[0].Monitor()}; got != want {
			t.Errorf("%s: timed, monitor: %v, want %v", call, got, want)
		}
	}
}
