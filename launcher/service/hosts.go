package service

import (
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// maxHosts bounds what distros take over of hosts(5): lists of thousands of blocked
// names are one file on the host, and would be sent and written at each start.
const maxHosts = 256 << 10

// hostEntries are the lines of the host's /etc/hosts that distros take over; hostname
// is the host's. What cannot be read is not taken over.
func hostEntries(path, hostname string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxHosts))
	if err != nil {
		return ""
	}
	text := string(b)
	if len(b) == maxHosts { // perhaps in the middle of a line
		text = text[:strings.LastIndexByte(text, '\n')+1]
	}
	return parseHosts(text, hostname)
}

// parseHosts leaves out what each system says of itself, and what is no entry.
func parseHosts(text, hostname string) string {
	short, _, _ := strings.Cut(hostname, ".")
	own := func(name string) bool {
		name = strings.ToLower(name)
		return name == "localhost" || strings.HasPrefix(name, "localhost.") || strings.HasPrefix(name, "localhost4") || strings.HasPrefix(name, "localhost6") ||
			strings.HasPrefix(name, "ip6-") || name == "broadcasthost" || strings.EqualFold(name, hostname) || strings.EqualFold(name, short)
	}
	var out strings.Builder
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		if _, err := netip.ParseAddr(f[0]); err != nil {
			continue
		}
		if names := slices.DeleteFunc(f[1:], own); len(names) > 0 {
			out.WriteString(f[0] + "\t" + strings.Join(names, " ") + "\n")
		}
	}
	return out.String()
}
