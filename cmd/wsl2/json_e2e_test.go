//go:build e2e

package main_test

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/internal/testsys"
)

// TestJSON: every verb that has --json prints one document and nothing else, with the
// keys that programs know.
func TestJSON(t *testing.T) {
	h := newHost(t)
	disk := diskFile(h, "data.img")
	rootfs := h.File("root.tar", testsys.Tar(t, testsys.Busybox(t)...))
	lists := h.File("list.json", []byte(`{"Default":"Own","ModernDistributions":{"Own":[{"Name":"Listed","FriendlyName":"One","Amd64Url":{"Url":"file:///nowhere","Sha256":"`+strings.Repeat("00", 32)+`"}}]}}`))
	h.Config("[wsl2]", "defaultVhdSize=2GB", "[general]", "distributionListUrl=file://"+lists)
	first := h.Start("-d", "small", "-e", "sh", "-c", "echo ready; cat")
	first.Expect("ready\n")
	h.OK("--import", "native", rootfs, "--version", "1") // whose processes ps lists
	second := h.Start("-d", "native", "-e", "sh", "-c", "echo ready; cat")
	second.Expect("ready\n")

	const listed = ".distros[].default .distros[].disk .distros[].name .distros[].sessions .distros[].sizeBytes .distros[].state .distros[].usedBytes .distros[].version"
	tested := map[string]bool{}
	for _, c := range []struct{ line, keys string }{
		{"--list", listed},
		{"--list --all", listed},
		{"--list --running", listed},
		{"--list --online", "[].friendlyName [].name"},
		{"--version", ".version"},
		{"doctor", ".accel .checks[].detail .checks[].name .checks[].ok .usable .version1"},
		{"doctor --kvm", ".detail .name .ok"},
		{"ports", ".ports .rules .serial"},
		{"ports --publish small:8080", ".ports .rules[].distro .serial"}, // nobody serves it: nothing listens
		{"ports --unpublish small:8080", ".ports .rules .serial"},
		{"ps", "[].command [].distro [].hostPid [].hostUid [].pid"},
		{"--mount " + disk + " --name data", ".disk .mounts[].at .mounts[].name"},
		{"--status", ".default .defaultVersion .disks[].disk .disks[].mounts[].at .distros .kvm.name .kvm.ok .pid .running .sessions .version .vm.accel .vm.cpus .vm.kernel .vm.kernelRelease .vm.memoryBytes .vm.pid"},
		{"--install --from-file " + rootfs + " --name second", ".name"},
		{"--manage second --resize 3GB", ".sizeAfter .sizeBefore .usedAfter .usedBefore"},
		{"--manage second --compact", ".sizeAfter .sizeBefore .usedAfter .usedBefore"},
		{"--manage second --repair", ".report .sizeBefore"},
		{"--manage second --rename third", ".usedAfter"},
	} {
		args := append(strings.Fields(c.line), "--json")
		tested[args[0]] = true
		r := h.Run(args...)
		if r.Status != 0 && args[0] != "doctor" { // where KVM is unusable, that says so
			t.Errorf("%s: %v", c.line, r)
			continue
		}
		var document any
		if err := json.Unmarshal([]byte(r.Stdout), &document); err != nil {
			t.Errorf("%s: %v: %q", c.line, err, r.Stdout)
			continue
		}
		keys := map[string]bool{}
		keysOf(document, "", keys)
		for _, k := range strings.Fields(c.keys) {
			if !keys[k] {
				t.Errorf("%s: no %s in %s, which has %q", c.line, k, r.Stdout, slices.Sorted(maps.Keys(keys)))
			}
		}
	}
	for _, v := range cmdline.Verbs {
		if slices.ContainsFunc(v.Options, func(o cmdline.Option) bool { return o.Long == "json" }) && !tested[v.Long] {
			t.Errorf("%s --json is not in this test", v.Long)
		}
	}

	// An error is none, on its own stream.
	for _, line := range []string{"--install --from-file /no/such/file --name x", "--manage nosuch --compact", "--mount /no/such/file", "ps nosuch"} {
		r := h.Run(append(strings.Fields(line), "--json")...)
		h.Refused(r)
		if r.Stdout != "" {
			t.Errorf("%s: on stdout %q", line, r.Stdout)
		}
	}
	h.OK("--unmount")
	for _, l := range []*testsys.Live{first, second} {
		l.Stdin.Close()
		h.Want(l.Wait(), 0)
	}
}

// keysOf collects the keys of a document with the way to them: .a, .a.b, .a[].b.
func keysOf(document any, at string, keys map[string]bool) {
	switch v := document.(type) {
	case map[string]any:
		for k, inner := range v {
			keys[at+"."+k] = true
			keysOf(inner, at+"."+k, keys)
		}
	case []any:
		keys[at+"[]"] = true
		for _, inner := range v {
			keysOf(inner, at+"[]", keys)
		}
	}
}
