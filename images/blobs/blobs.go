// Package blobs fetches files whose SHA-256 is known, by HTTP, into a cache: what
// was cut off is resumed, what is not what it should be is thrown away.
package blobs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrDigest says that what came is not what its digest says.
var ErrDigest = errors.New("the SHA-256 does not match: the file was changed or damaged; nothing of it is kept")

// Cache is a directory of files by their SHA-256. Several processes may use it.
type Cache struct{ Dir string }

// Blob is a file to be fetched.
type Blob struct {
	URL    string
	SHA256 string // hexadecimal
	// Size in bytes, 0 if it is not known.
	Size int64
}

const (
	// attempts is how often in a row a transfer may end without a byte.
	attempts = 4
	// pause is doubled between them; a server that answers at all is asked again at once.
	pause = time.Second
	// stall is how long a server may send nothing.
	stall = time.Minute
)

// path is where the blob is, or will be.
func (c Cache) path(sum string) string { return filepath.Join(c.Dir, "sha256-"+sum) }

// Fetch returns the blob's file, open at its beginning, from the cache or by the
// client. received, if not nil, is told of each piece that came.
func (c Cache) Fetch(ctx context.Context, client *http.Client, b Blob, received func(n int64)) (*os.File, error) {
	if raw, err := hex.DecodeString(b.SHA256); err != nil || len(raw) != sha256.Size {
		return nil, fmt.Errorf("%s: %q is no SHA-256", b.URL, b.SHA256)
	}
	b.SHA256 = strings.ToLower(b.SHA256)
	if received == nil {
		received = func(int64) {}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	if f, err := os.Open(c.path(b.SHA256)); err == nil {
		if verify(f, b.SHA256) == nil {
			st, err := f.Stat()
			if err == nil {
				received(st.Size())
			}
			return f, err
		}
		f.Close()
		os.Remove(c.path(b.SHA256)) // damaged on the disk: fetch it anew
	}
	partial := c.path(b.SHA256) + ".partial"
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := fetch(ctx, client, b, f, received); err != nil {
		f.Close()
		if errors.Is(err, ErrDigest) {
			os.Remove(partial)
		}
		return nil, err
	}
	err = f.Sync()
	if err == nil {
		err = os.Rename(partial, c.path(b.SHA256))
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// verify compares a file with its digest and goes back to its beginning.
func verify(f *os.File, sum string) error {
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != sum {
		return ErrDigest
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// fetch fills the partial file, which another process may be filling as well: one
// of them at a time.
func fetch(ctx context.Context, client *http.Client, b Blob, f *os.File, received func(int64)) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s is being fetched by another command (%w); try again when it is done", b.URL, err)
	}
	h := sha256.New()
	have, err := io.Copy(h, f) // of an attempt before
	if err != nil {
		return err
	}
	received(have)
	var last error
	for failures := 0; failures < attempts; {
		if failures > 0 {
			select {
			case <-time.After(pause << failures):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		n, restart, err := piece(ctx, client, b, have, io.MultiWriter(f, h), received)
		if restart {
			// The server does not resume: from the beginning, once more.
			if err := f.Truncate(0); err != nil {
				return err
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return err
			}
			h.Reset()
			received(-have)
			have = 0
			if n, _, err = piece(ctx, client, b, 0, io.MultiWriter(f, h), received); err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
		}
		have += n
		switch {
		case err == nil:
			if hex.EncodeToString(h.Sum(nil)) != b.SHA256 {
				return fmt.Errorf("%s: %w", b.URL, ErrDigest)
			}
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errFinal), errors.Is(err, unix.ENOSPC):
			return fmt.Errorf("%s: %w", b.URL, err)
		}
		last = err
		if failures++; n > 0 {
			failures = 1
		}
	}
	return fmt.Errorf("%s: %w; what came is kept: the same command goes on from there", b.URL, last)
}

// errFinal is an answer that the next attempt would get as well.
var errFinal = errors.New("refused by the server")

// piece transfers what follows the first have bytes. restart says that the server
// sends from the beginning only.
func piece(ctx context.Context, client *http.Client, b Blob, have int64, w io.Writer, received func(int64)) (n int64, restart bool, err error) {
	if b.Size > 0 && have >= b.Size {
		return 0, have > b.Size, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := fmt.Errorf("the server has sent nothing for %v", stall)
	watchdog := time.AfterFunc(stall, func() { cancel(silent) })
	defer watchdog.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.URL, nil)
	if err != nil {
		return 0, false, fmt.Errorf("%w: %w", errFinal, err)
	}
	if have > 0 {
		end := ""
		if b.Size > 0 {
			end = fmt.Sprint(b.Size - 1)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%s", have, end))
	}
	resp, err := client.Do(req)
	if err != nil {
		if context.Cause(ctx) == silent {
			err = silent
		}
		return 0, false, err
	}
	defer resp.Body.Close()
	switch {
	case have > 0 && (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusRequestedRangeNotSatisfiable):
		return 0, true, nil
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent:
	case resp.StatusCode >= 500, resp.StatusCode == http.StatusTooManyRequests:
		return 0, false, fmt.Errorf("the server answers %s", resp.Status)
	default:
		return 0, false, fmt.Errorf("%w: %s", errFinal, resp.Status)
	}
	body := io.Reader(resp.Body)
	if b.Size > 0 { // a server that sends without end
		body = io.LimitReader(body, b.Size-have+1)
	}
	buf := make([]byte, 128<<10)
	for {
		m, err := body.Read(buf)
		watchdog.Reset(stall)
		if m > 0 {
			if _, err := w.Write(buf[:m]); err != nil {
				return n, false, err
			}
			n += int64(m)
			received(int64(m))
		}
		if err == io.EOF {
			if b.Size > 0 && have+n < b.Size {
				return n, false, io.ErrUnexpectedEOF
			}
			return n, false, nil
		}
		if err != nil {
			if context.Cause(ctx) == silent {
				err = silent
			}
			return n, false, err
		}
	}
}
