package wire

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestProtocolPage: the page's table of types, its limit and its version are
// those of the code.
func TestProtocolPage(t *testing.T) {
	page, err := os.ReadFile("PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \| (\w+) \| (launcher|guest) →`).FindAllStringSubmatch(string(page), -1) {
		listed[m[1]] = m[2]
	}
	for i := range 256 {
		want := ""
		if newMessage(Type(i)) != nil {
			want = Type(i).String()
		}
		if got := listed[fmt.Sprint(i)]; got != want {
			t.Errorf("type %d is %q in PROTOCOL.md, %q in the code", i, got, want)
		}
	}
	for _, text := range []string{
		fmt.Sprintf("\nVersion %d.", Version),
		fmt.Sprintf("\n| %d |", Version),
		fmt.Sprintf("host port %d", PortControl),
		thousands(MaxFrame),
	} {
		if !strings.Contains(string(page), text) {
			t.Errorf("PROTOCOL.md lacks %q", text)
		}
	}
}

// thousands formats n as the page does: 4,194,304.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
