package api

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"testing"

	"github.com/wsl2/wsl2/internal/hostpath"
)

func TestOpenRoundTrip(t *testing.T) {
	id := Identity{Protocol, "1.2", "abc"}
	in := Open{Distro: "debian", System: true, DebugShell: true, VM: VMOptions{Accel: "tcg", Kernel: "/k"}}
	kind, body, err := Read(bytes.NewReader(AppendOpen(nil, id, &in)))
	if err != nil || kind != KindOpen {
		t.Fatal(kind, err)
	}
	gotID, rest, err := DecodeRequest(body)
	if err != nil || gotID != id {
		t.Fatal(gotID, err)
	}
	if got, err := DecodeOpen(rest); err != nil || got != in {
		t.Fatal(got, err)
	}
}

func TestOpenedRoundTrip(t *testing.T) {
	in := Opened{"debian", "/run/v", 1025, "me", true, "/setup --now", "1000",
		hostpath.Table{{Host: "/home/me", Guest: "/mnt/host"}, {Host: "/srv", Guest: "/mnt/srv"}}, true}
	kind, body, err := Read(bytes.NewReader(AppendOpened(nil, &in)))
	if err != nil || kind != KindOpened {
		t.Fatal(kind, err)
	}
	if got, err := DecodeOpened(body); err != nil || !reflect.DeepEqual(got, in) {
		t.Fatal(got, err)
	}
	for i := range body {
		if _, err := DecodeOpened(body[:i]); !errors.Is(err, ErrMalformed) {
			t.Errorf("cut at %d: %v", i, err)
		}
	}
	if _, err := DecodeOpened(append(body, 0)); !errors.Is(err, ErrMalformed) {
		t.Errorf("trailing byte: %v", err)
	}
}

func TestRead(t *testing.T) {
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":   {nil, io.EOF},
		"header":    {[]byte{1, 0}, io.ErrUnexpectedEOF},
		"body":      {[]byte{3, 0, 0, 0, 1, 9}, io.ErrUnexpectedEOF},
		"no body":   {[]byte{3, 0, 0, 0, 1}, io.ErrUnexpectedEOF},
		"length 0":  {[]byte{0, 0, 0, 0, 1}, nil},
		"too large": {[]byte{0, 0, 0, 1, 1}, nil},
	} {
		_, _, err := Read(bytes.NewReader(c.in))
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestErrors(t *testing.T) {
	e := Errorf(CodeBusy, "do that", "no %d", 1)
	if e.Error() != "no 1; do that" || AsError(e) != e {
		t.Error(e)
	}
	if got := AsError(io.EOF); got.Code != CodeFailed || got.Text != "EOF" {
		t.Error(got)
	}
	if got := DecodeError([]byte("{")); got.Text == "" {
		t.Error("an undecodable error says nothing")
	}
}

func TestSelf(t *testing.T) {
	if a, b := Self(), Self(); a != b || a.Build == "" {
		t.Error(a, b)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(AppendOpen(nil, Self(), &Open{Distro: "d"})[5:])
	f.Add(AppendOpened(nil, &Opened{Distro: "d"})[5:])
	f.Fuzz(func(t *testing.T, body []byte) {
		if id, rest, err := DecodeRequest(body); err == nil {
			if o, err := DecodeOpen(rest); err == nil {
				again := AppendOpen(nil, id, &o)[5:]
				if _, rest, err := DecodeRequest(again); err != nil {
					t.Fatal(err)
				} else if p, err := DecodeOpen(rest); err != nil || p != o {
					t.Fatal(p, err)
				}
			}
		}
		DecodeOpened(body)
	})
}
