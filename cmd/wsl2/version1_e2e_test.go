//go:build e2e

package main_test

import (
	"testing"
)

// TestVersion1 runs the tests of what both versions have in common once more, with the distro
// small of version 1.
func TestVersion1(t *testing.T) {
	t.Setenv(versionVariable, "1")
	for _, c := range []struct {
		name string
		test func(*testing.T)
	}{
		{"StreamMatrix", TestStreamMatrix}, {"Floods", TestFloods}, {"ShortCommands", TestShortCommands}, {"PeerBugs", TestPeerBugs},
		{"Identity", TestIdentity}, {"Tmux", TestTmux}, {"GoTest", TestGoTest}, {"Sessions", TestSessions}, {"Terminal", TestTerminal},
		{"Tools", TestTools}, {"HostPrograms", TestHostPrograms}, {"Agent", TestAgent}, {"Share", TestShare}, {"ShareSettings", TestShareSettings}, {"Copy", TestCopy},
		{"SSH", TestSSH}, {"WSLConf", TestWSLConf}, {"WSLConfWarns", TestWSLConfWarns}, {"Verbs", TestVerbs}, {"TwoDistros", TestTwoDistros},
	} {
		t.Run(c.name, c.test)
	}
}
