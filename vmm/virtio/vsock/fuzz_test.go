package vsock

import (
	"bytes"
	"net"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wsl2/wsl2/vmm/virtio/virtiotest"
)

// FuzzPacket cuts a packet into buffers as the driver likes; what comes out is
// the header and the bytes behind it, whatever the cuts.
func FuzzPacket(f *testing.F) {
	valid := func(h header, data string) []byte {
		var raw [headerLen]byte
		h.put(&raw)
		return append(raw[:], data...)
	}
	f.Add([]byte{}, []byte{})
	f.Add(valid(header{op: opRW, len: 5}, "hello"), []byte{headerLen})
	f.Add(valid(header{op: opRW, len: 5}, "hello"), []byte{1, 0, 42, 0, 2, 9})
	f.Add(valid(header{op: opRW, len: 6}, "hello"), []byte{44})
	f.Add(valid(header{op: opRW, len: 1<<32 - 1}, "hello"), []byte{43})
	f.Add(valid(header{op: opRST}, ""), []byte{20})
	f.Fuzz(func(t *testing.T, packet, cuts []byte) {
		var bufs [][]byte
		rest := packet
		for _, n := range cuts {
			n := min(int(n), len(rest))
			bufs = append(bufs, rest[:n])
			rest = rest[n:]
		}
		bufs = append(bufs, rest)
		h, iov, err := parsePacket(bufs, nil)
		if len(packet) < headerLen {
			if err != errShortPacket {
				t.Fatalf("%d bytes: %v", len(packet), err)
			}
			return
		}
		var raw [headerLen]byte
		if h.put(&raw); !bytes.Equal(raw[:], packet[:headerLen]) {
			t.Fatalf("header % x became % x", packet[:headerLen], raw)
		}
		var data []byte
		for _, v := range iov {
			if v.Len == 0 {
				t.Fatal("empty iovec")
			}
			data = append(data, iovecBytes(v)...)
		}
		body := packet[headerLen:]
		if want := uint64(h.len) > uint64(len(body)); (err == errLongData) != want {
			t.Fatalf("length %d of %d: %v", h.len, len(body), err)
		}
		if err == nil {
			body = body[:h.len]
		}
		if !bytes.Equal(data, body) {
			t.Fatalf("data % x, want % x", data, body)
		}
	})
}

// FuzzConnect: the line's parser takes exactly what appendConnect writes, with
// anything behind it.
func FuzzConnect(f *testing.F) {
	for _, s := range []string{"", "CONNECT 1\n", "CONNECT 4294967294\nrest", "CONNECT 0\r\n", "CONNECT x\n", "CONNECT "} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		port, n, err := parseConnect(b)
		if err != nil || n == 0 {
			if n != 0 || port != 0 {
				t.Fatalf("%q: port %d, %d bytes, %v", b, port, n, err)
			}
			return
		}
		line := bytes.TrimRight(b[:n], "\r\n")
		digits := bytes.TrimLeft(line[len("CONNECT "):], "0")
		want := bytes.TrimRight(appendConnect(nil, port), "\n")[len("CONNECT "):]
		if b[n-1] != '\n' || !bytes.Equal(digits, bytes.TrimLeft(want, "0")) {
			t.Fatalf("%q parsed as port %d, %d bytes", b, port, n)
		}
	})
}

// FuzzDevice plays a driver and host programs that do anything in any order:
// mostly valid packets on few ports, so that the state machine is really
// entered. Nothing may panic or hang; at the end the device still answers.
//
// Each step is 4 bytes: what, port, and two for lengths and numbers.
func FuzzDevice(f *testing.F) {
	step := func(steps ...[4]byte) (b []byte) {
		for _, s := range steps {
			b = append(b, s[:]...)
		}
		return b
	}
	rx := [4]byte{16, 0, 0, 32}
	f.Add(step(rx, [4]byte{opRequest, 0, 255, 255}, [4]byte{opRW, 0, 100, 10}, [4]byte{opShutdown, 0, 3, 0}, [4]byte{opRST, 0, 0, 0}))
	f.Add(step(rx, [4]byte{opRequest, 0, 0, 0}, [4]byte{20, 0, 200, 1}, [4]byte{opCreditUpdate, 0, 10, 0}, [4]byte{21, 0, 0, 0}))
	f.Add(step([4]byte{18, 3, 0, 0}, rx, [4]byte{opResponse, 0x13, 255, 1}, [4]byte{20, 0, 255, 255}, [4]byte{22, 0, 0, 0}))
	f.Add(step(rx, [4]byte{opRequest, 0, 255, 0}, [4]byte{opRequest, 0, 255, 0}, [4]byte{9, 0, 0, 0}, [4]byte{opCreditRequest, 0, 0, 0}))
	f.Add(bytes.Repeat(step([4]byte{opRequest, 1, 255, 0}, [4]byte{opRW, 1, 255, 255}), 20))
	f.Fuzz(func(t *testing.T, steps []byte) {
		d := newDevice(t, Config{MaxConns: 8})
		l := hostListen(t, d, "0")
		var mu sync.Mutex
		var hosts []net.Conn
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				hosts = append(hosts, c)
				mu.Unlock()
			}
		})
		g := virtiotest.Start(t, d, virtiotest.Options{MemoryBytes: 2 << 20})
		defer func() {
			g.Stop()
			l.Close()
			wg.Wait()
			for _, c := range hosts {
				c.Close()
			}
		}()
		tx, rx := g.Ring(queueTX), g.Ring(queueRX)
		var offered []*virtiotest.Request // rx buffers, oldest first
		data := make([]byte, 1<<16)
		for n := 0; len(steps) >= 4 && n < 100; n++ {
			what, port, x, y := steps[0], steps[1], steps[2], steps[3]
			steps = steps[4:]
			mu.Lock()
			var host net.Conn
			if len(hosts) > 0 {
				host = hosts[int(port)%len(hosts)]
			}
			mu.Unlock()
			switch what {
			case 16: // offer rx buffers
				for range y % 8 {
					if len(offered) < int(rx.Size)/2 {
						offered = append(offered, rx.Send(t, nil, headerLen+1+int(x)*16))
					}
				}
			case 17: // cut into pieces
				h := header{srcCID: guestCID, dstCID: hostCID, srcPort: uint32(port & 3), typ: typeStream, op: opRW, len: uint32(x)}
				var raw [headerLen]byte
				h.put(&raw)
				tx.Do(t, [][]byte{raw[:y%44], raw[y%44:], data[:x]})
			case 18: // a host program connects
				if c, err := net.Dial("unix", d.cfg.Path); err == nil {
					c.Write(append(appendConnect(nil, uint32(port&3)), data[:int(x)*8]...))
					mu.Lock()
					hosts = append(hosts, c)
					mu.Unlock()
				}
			case 20:
				if host != nil {
					if rc, err := host.(*net.UnixConn).SyscallConn(); err == nil {
						rc.Write(func(fd uintptr) bool { // not to wait for room
							unix.Write(int(fd), data[:int(x)*int(y)])
							return true
						})
					}
				}
			case 21:
				if host != nil {
					host.Close()
				}
			case 22:
				if host != nil {
					host.(*net.UnixConn).CloseWrite()
				}
			default: // a packet; host port 0 listens, those from firstHostPort on are clients
				h := header{
					srcCID: guestCID, dstCID: hostCID, srcPort: uint32(port & 3), typ: typeStream,
					op: uint16(what), flags: uint32(x), bufAlloc: uint32(x) << 8, fwdCnt: uint32(y),
				}
				if port&0x10 != 0 {
					h.dstPort = firstHostPort + uint32(port>>5)
				}
				if what == opRW {
					h.len = uint32(x) * uint32(y)
				}
				if what > 100 {
					h.op = opRequest
					h.srcCID ^= uint64(x)
					h.dstCID ^= uint64(y)
				}
				var raw [headerLen]byte
				h.put(&raw)
				tx.Do(t, [][]byte{raw[:], data[:min(len(data), int(h.len))]})
			}
		}
		// Still there? Enough buffers for what is owed, then a question of ours.
		ask := header{srcCID: guestCID, dstCID: hostCID, srcPort: 77, dstPort: 77, typ: typeStream, op: opRequest}
		var raw [headerLen]byte
		ask.put(&raw)
		asked := tx.Send(t, [][]byte{raw[:]})
		for {
			select {
			case err := <-g.Failed:
				t.Fatal(err)
			default:
			}
			if len(offered) == 0 {
				offered = append(offered, rx.Send(t, nil, linuxRXBuf))
			}
			r := offered[0]
			offered = offered[1:]
			_, b := r.Wait(t)
			h := parseHeader((*[headerLen]byte)(b))
			r.Free()
			if h.dstPort == 77 {
				break
			}
		}
		asked.Wait(t)
	})
}
