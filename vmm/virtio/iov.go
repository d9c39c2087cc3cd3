package virtio

// Len returns the number of bytes in bufs.
func Len(bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

// Gather copies from the start of bufs to dst and returns the number of bytes
// copied: the smaller of the two lengths.
func Gather(dst []byte, bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		if n == len(dst) {
			break
		}
		n += copy(dst[n:], b)
	}
	return n
}

// Scatter copies src to the start of bufs and returns the number of bytes
// copied: the smaller of the two lengths.
func Scatter(bufs [][]byte, src []byte) int {
	n := 0
	for _, b := range bufs {
		if n == len(src) {
			break
		}
		n += copy(b, src[n:])
	}
	return n
}

// Drop returns bufs without its first n bytes, or nothing if it has no more
// than n. It changes an element of bufs in place instead of copying the list.
func Drop(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 && len(bufs) > 0 {
		bufs[0] = bufs[0][n:]
	}
	return bufs
}

// Cut returns the first n bytes of bufs, or all of it if it has no more. Like
// Drop it changes an element of bufs in place.
func Cut(bufs [][]byte, n int) [][]byte {
	for i := range bufs {
		if n <= len(bufs[i]) {
			if n == 0 {
				return bufs[:i]
			}
			bufs[i] = bufs[i][:n]
			return bufs[:i+1]
		}
		n -= len(bufs[i])
	}
	return bufs
}
