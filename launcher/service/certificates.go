package service

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// anchorDirs is where administrators put certificates of authorities that a system is to trust beside those it came
// with: Debian's and Alpine's, Fedora's, Arch's and SUSE's.
var anchorDirs = []string{
	"/usr/local/share/ca-certificates", "/etc/pki/ca-trust/source/anchors", "/etc/ca-certificates/trust-source/anchors", "/etc/pki/trust/anchors",
}

// Bounds of what distros take over; an administrator adds a few.
const (
	maxCertificates     = 64
	maxCertificateFile  = 256 << 10
	maxCertificate      = 32 << 10
	maxCertificateBytes = 1 << 20 // of all, which go in one message
)

// hostCertificates are the certificates in these directories, as PEM. What cannot be read is not taken over.
func hostCertificates(dirs []string) (list []string) {
	for _, dir := range dirs {
		filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error { //nolint:errcheck // the callback returns none
			if err == nil && !e.IsDir() {
				list = append(list, certificates(readCertificates(path))...)
			}
			return nil
		})
	}
	return bounded(list)
}

// bounded are the first certificates that fit.
func bounded(list []string) (fit []string) {
	size := 0
	for _, c := range list {
		if len(c) <= maxCertificate && size+len(c) <= maxCertificateBytes && len(fit) < maxCertificates {
			fit, size = append(fit, c), size+len(c)
		}
	}
	return fit
}

// readCertificates reads a file or what a link leads to, which may be anything.
func readCertificates(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxCertificateFile {
		return ""
	}
	text, _ := io.ReadAll(io.LimitReader(f, maxCertificateFile))
	return string(text)
}

// certificates are the PEM blocks of certificates in a text (RFC 7468).
func certificates(text string) (list []string) {
	const begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
	for {
		_, rest, ok := strings.Cut(text, begin)
		if !ok {
			return list
		}
		body, rest, ok := strings.Cut(rest, end)
		if !ok {
			return list
		}
		if !strings.Contains(body, "-----") {
			list = append(list, begin+body+end+"\n")
		}
		text = rest
	}
}
