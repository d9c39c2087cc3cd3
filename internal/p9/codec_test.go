package p9

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// examples returns a message of every type, each field with a value of its own.
func examples() []Message {
	var list []Message
	for t := range 256 {
		if m := newMessage(Type(t)); m != nil {
			n := uint64(t)
			fill(reflect.ValueOf(m).Elem(), &n)
			list = append(list, m)
		}
	}
	return list
}

func fill(v reflect.Value, n *uint64) {
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).Name != "Kind" {
				fill(v.Field(i), n)
			}
		}
	case reflect.String:
		v.SetString(strings.Repeat("s", int(*n%7)))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 3, 3))
		for i := range 3 {
			fill(v.Index(i), n)
		}
	case reflect.Int64:
		v.SetInt(-int64(*n))
	default:
		v.SetUint(*n)
	}
}

// TestRoundTrip: every message is decoded to what it was, and cut short or made
// longer by a byte it is refused.
func TestRoundTrip(t *testing.T) {
	list := examples()
	if len(list) != 28+28 { // every request and answer, and Rlerror in place of Rauth
		t.Errorf("%d types of messages", len(list))
	}
	for _, m := range list {
		b, err := Append([]byte("before"), 7, m, MaxMsize)
		if err != nil {
			t.Fatal(err)
		}
		b = b[len("before"):]
		tag, got, err := Decode(b)
		if err != nil || tag != 7 || !reflect.DeepEqual(got, m) {
			t.Errorf("%T: tag %d, %+v, %v; want %+v", m, tag, got, err, m)
		}
		for n := headerSize; n < len(b); n++ {
			short := append([]byte{byte(n), 0, 0, 0}, b[4:n]...)
			if _, _, err := Decode(short); !errors.Is(err, ErrMalformed) {
				t.Errorf("%T of %d bytes instead of %d: %v", m, n, len(b), err)
			}
		}
		long := append(bytes.Clone(b), 0)
		long[0]++
		if _, _, err := Decode(long); !errors.Is(err, ErrMalformed) {
			t.Errorf("%T with a byte more: %v", m, err)
		}
	}
}

// TestFrames holds the layout to the bytes that v9fs sends and wants.
func TestFrames(t *testing.T) {
	for want, m := range map[string]Message{
		"\x15\x00\x00\x00\x64\xff\xff\x00\x00\x10\x00\x08\x009P2000.L":                                     &Mversion{Kind: TVersion, Msize: MaxMsize, Version: Version},
		"\x17\x00\x00\x00\x6e\xff\xff\x01\x00\x00\x00\x02\x00\x00\x00\x02\x00\x01\x00a\x01\x00b":           &Twalk{FID: 1, NewFID: 2, Names: []string{"a", "b"}},
		"\x0b\x00\x00\x00\x07\xff\xff\x02\x00\x00\x00":                                                     &Rlerror{Errno: 2},
		"\x19\x00\x00\x00\x76\xff\xff\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00hi":   &Twrite{FID: 1, Offset: 1 << 32, Data: []byte("hi")},
		"\x18\x00\x00\x00\x0d\xff\xff\x80\x05\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00": &Ropen{Kind: TLopen + 1, QID: QID{QTDir, 5, 6}, IOUnit: 4096},
	} {
		if got, err := Append(nil, NoTag, m, MaxMsize); err != nil || string(got) != want {
			t.Errorf("%T: %q, %v; want %q", m, got, err, want)
		}
	}
}

// TestTooLong: what the protocol cannot carry is refused, not cut.
func TestTooLong(t *testing.T) {
	for _, m := range []Message{
		&Tsymlink{Target: strings.Repeat("x", 1<<16)},
		&Twrite{Data: make([]byte, MaxMsize)},
	} {
		if b, err := Append([]byte("before"), 1, m, MaxMsize); !errors.Is(err, ErrTooLarge) || string(b) != "before" {
			t.Errorf("%T: %d bytes, %v", m, len(b), err)
		}
	}
}

// FuzzDecode: whatever is decoded is encoded to the same bytes.
func FuzzDecode(f *testing.F) {
	for _, m := range examples() {
		b, _ := Append(nil, 1, m, MaxMsize)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tag, m, err := Decode(b)
		if err != nil {
			return
		}
		if got, err := Append(nil, tag, m, MaxMsize); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%+v: %q, %v; want %q", m, got, err, b)
		}
	})
}

// FuzzDirents: a directory's entries as a hostile server sends them.
func FuzzDirents(f *testing.F) {
	f.Add(AppendDirent(AppendDirent(nil, QID{1, 2, 3}, 4, 8, "name"), QID{}, 5, 4, ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := DecodeDirents(b)
		if err != nil {
			return
		}
		var got []byte
		for _, e := range list {
			got = AppendDirent(got, e.QID, e.Offset, e.Type, e.Name)
		}
		if !bytes.Equal(got, b) {
			t.Errorf("%q, want %q", got, b)
		}
	})
}
