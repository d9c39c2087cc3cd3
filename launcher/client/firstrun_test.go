package client

import (
	"os/exec"
	"testing"
)

func TestAskUID(t *testing.T) {
	// The script on this host: root is always there, the last uid is not.
	for uid, want := range map[string]string{"0": "0\n", "4294967290": "", "": ""} {
		out, err := exec.Command("/bin/sh", "-c", askUID, "sh", uid).Output()
		if err != nil || string(out) != want {
			t.Errorf("%q: %q, %v", uid, out, err)
		}
	}
	if out, err := exec.Command("/bin/sh", "-n", "-c", ownSetUp).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
