package vsock

import (
	"bytes"
	"errors"
	"strconv"
)

// maxLine bounds the CONNECT line, its end included; the longest meaningful
// one has 20 bytes.
const maxLine = 32

var errBadLine = errors.New(`vsock: not a line "CONNECT PORT\n"`)

func appendConnect(b []byte, port uint32) []byte {
	b = append(b, "CONNECT "...)
	b = strconv.AppendUint(b, uint64(port), 10)
	return append(b, '\n')
}

// parseConnect reads the line "CONNECT PORT\n" (or "\r\n") at b's start. n is the
// number of bytes it takes; 0 without an error if its end is not there yet.
func parseConnect(b []byte) (port uint32, n int, err error) {
	end := bytes.IndexByte(b[:min(len(b), maxLine)], '\n')
	if end < 0 {
		if len(b) >= maxLine {
			return 0, 0, errBadLine
		}
		return 0, 0, nil
	}
	digits, ok := bytes.CutPrefix(bytes.TrimSuffix(b[:end], []byte("\r")), []byte("CONNECT "))
	if !ok || len(digits) == 0 || len(digits) > 10 {
		return 0, 0, errBadLine
	}
	var v uint64
	for _, d := range digits {
		if d < '0' || d > '9' {
			return 0, 0, errBadLine
		}
		v = v*10 + uint64(d-'0')
	}
	// VMADDR_PORT_ANY names no port.
	if v >= 1<<32-1 {
		return 0, 0, errBadLine
	}
	return uint32(v), end + 1, nil
}
