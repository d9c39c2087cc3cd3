package service

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// anchorDir is a directory of authorities that a system is to trust beside those it came with.
type anchorDir struct{ path, suffix string }

// anchorDirs is where administrators put them: Debian's and Alpine's, which look at nothing else there (what is to be
// trusted no longer is renamed), Fedora's, Arch's and SUSE's.
var anchorDirs = []anchorDir{
	{"/usr/local/share/ca-certificates", ".crt"}, {"/etc/pki/ca-trust/source/anchors", ""}, {"/etc/ca-certificates/trust-source/anchors", ""}, {"/etc/pki/trust/anchors", ""},
}

// Bounds of what distros take over; an administrator adds a few.
const (
	maxCertificates     = 64
	maxCertificateFile  = 256 << 10
	maxCertificate      = 32 << 10
	maxCertificateBytes = 1 << 20 // of all, which go in one message
)

// hostCertificates are the certificates in these directories, as PEM, and how many more there are than are taken
// over. What cannot be read is not.
func hostCertificates(dirs []anchorDir) (list []string, dropped int) {
	for _, dir := range dirs {
		for _, path := range filesBelow(dir.path, nil) {
			if strings.HasSuffix(path, dir.suffix) {
				list = append(list, certificates(readCertificates(path))...)
			}
		}
	}
	fit := bounded(list)
	return fit, len(list) - len(fit)
}

// filesBelow are the files in a directory and those in it, linked ones as well, as update-ca-certificates looks
// for them (find -L); but for one that holds itself, being above.
func filesBelow(dir string, above []fs.FileInfo) (paths []string) {
	st, err := os.Stat(dir)
	if err != nil || slices.ContainsFunc(above, func(a fs.FileInfo) bool { return os.SameFile(a, st) }) {
		return nil
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if inner, err := os.Stat(path); err == nil && inner.IsDir() {
			paths = append(paths, filesBelow(path, append(slices.Clip(above), st))...)
		} else {
			paths = append(paths, path)
		}
	}
	return paths
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
