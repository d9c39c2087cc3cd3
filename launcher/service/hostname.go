package service

import (
	"os"
	"path/filepath"
	"strings"
)

// hostname is the host's, which distros take over.
func hostname() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "localhost"
	}
	return name
}

// timezone is the host's, which distros take over, by its name in tzdata; "" if the
// host does not say.
func timezone() string { return timezoneIn("/etc") }

func timezoneIn(etc string) string {
	// localtime(5): a link into the database. It may lead over another one.
	if path, err := filepath.EvalSymlinks(filepath.Join(etc, "localtime")); err == nil {
		if _, name, ok := strings.Cut(path, "/zoneinfo/"); ok {
			return strings.TrimPrefix(name, "posix/")
		}
	}
	text, _ := os.ReadFile(filepath.Join(etc, "timezone"))
	return strings.TrimSpace(string(text))
}
