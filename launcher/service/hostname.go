package service

import "os"

// hostname is the host's, which distros take over.
func hostname() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "localhost"
	}
	return name
}
