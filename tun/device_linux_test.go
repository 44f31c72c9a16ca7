package tun_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/tun"
)

// paths are the two ways to a kernel's device.
var paths = []struct {
	name string
	opts tun.Options
}{
	{"fast", tun.Options{Name: "wfpt"}},
	{"portable", tun.Options{Name: "wfpt", NoOffload: true}},
}

// families are the addresses that a test's device has and the peer that its tests talk to, who is this program.
var families = []struct {
	name        string
	prefix      string
	local, peer netip.Addr
}{
	{"v4", "10.9.0.1/24", netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2")},
	{"v6", "fd99::1/64", netip.MustParseAddr("fd99::1"), netip.MustParseAddr("fd99::2")},
}

// configured opens a device in a namespace of the test's own, with addresses, up.
func configured(t testing.TB, o tun.Options) tun.Device {
	t.Helper()
	inNamespace(t)
	d := open(t, o)
	c := tun.Config{Up: true, Default: true}
	for _, f := range families {
		c.Addresses = append(c.Addresses, netip.MustParsePrefix(f.prefix))
	}
	if err := tun.Configure(d.Name(), c); err != nil {
		t.Fatalf("Configure: %v", err)
	}
	return d
}

// isUDPTo returns a match for datagrams to port.
func isUDPTo(port uint16) func([]byte) bool {
	return func(b []byte) bool {
		at := ipHeaderLen(b)
		return protocolOf(b) == 17 && len(b) >= at+8 && uint16(b[at+2])<<8|uint16(b[at+3]) == port
	}
}

// payload returns size bytes that depend on seed.
func payload(size, seed int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i*7 + seed + i>>8)
	}
	return b
}

func TestDatagramsThroughDevice(t *testing.T) {
	for _, path := range paths {
		for _, family := range families {
			t.Run(path.name+" "+family.name, func(t *testing.T) {
				o := path.opts
				o.MTU = 65520
				d := configured(t, o)
				conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(family.local, 0)))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
				peer := netip.AddrPortFrom(family.peer, 4321)
				for i, size := range []int{0, 1, 2, 3, 100, 107, 108, 109, 1400, 2047, 2048, 2049, 9000, 65000, 65472} {
					want := payload(size, i)
					if _, err := conn.WriteToUDPAddrPort(want, peer); err != nil {
						t.Fatalf("size %d: send: %v", size, err)
					}
					got := readDatagram(t, d, peer.Port(), local, peer)
					if string(got) != string(want) {
						t.Fatalf("size %d: the device gave %d other bytes", size, len(got))
					}
					answer := payload(size, i+100)
					writeDatagram(t, d, udpPacket(peer, local, answer), i%2 == 0)
					buf := make([]byte, 65536)
					conn.SetReadDeadline(time.Now().Add(10 * time.Second))
					n, from, err := conn.ReadFromUDPAddrPort(buf)
					if err != nil {
						t.Fatalf("size %d: receive: %v", size, err)
					}
					if from != peer || string(buf[:n]) != string(answer) {
						t.Fatalf("size %d: received %d other bytes from %v", size, n, from)
					}
				}
			})
		}
	}
}

// readDatagram reads a datagram from the device, and checks addresses, lengths and checksum.
func readDatagram(t *testing.T, d tun.Device, port uint16, src, dst netip.AddrPort) []byte {
	t.Helper()
	q := d.Queues()[0]
	pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 128), make([]byte, 2048), make([]byte, 16384), make([]byte, 65536)}}}
	for {
		if _, err := q.Read(pkts); err != nil {
			t.Fatalf("Read: %v", err)
		}
		p := &pkts[0]
		var b []byte
		for _, piece := range head(nil, p.Bufs, p.Size) {
			b = append(b, piece...)
		}
		if !isUDPTo(port)(b) {
			continue // the kernel's own, such as multicast reports
		}
		from, to := addrsOf(b)
		at := ipHeaderLen(b)
		if from != src.Addr() || to != dst.Addr() {
			t.Fatalf("packet from %v to %v, want %v to %v", from, to, src, dst)
		}
		sum := foldSum(pseudoSum(b, at) + byteSum(b[at:]))
		if o := p.Offload; o.NeedsCsum {
			if int(o.CsumStart) != at || o.CsumOffset != 6 {
				t.Fatalf("checksum at %d+%d, want %d+6", o.CsumStart, o.CsumOffset, at)
			}
			// The field holds the pseudo-header's sum, so the sum from the transport header on completes it.
			sum = ^foldSum(byteSum(b[at:]))
			rest := append([]byte(nil), b[at:]...)
			rest[6], rest[7] = byte(sum>>8), byte(sum)
			sum = foldSum(pseudoSum(b, at) + byteSum(rest))
		}
		if sum != 0xffff {
			t.Fatalf("checksum does not add up: %#x (offload %+v)", sum, p.Offload)
		}
		return b[at+8:]
	}
}

// writeDatagram writes a complete datagram; with partial it leaves the checksum to the kernel, where the device has it.
func writeDatagram(t *testing.T, d tun.Device, b []byte, partial bool) {
	t.Helper()
	p := tun.Packet{Bufs: [][]byte{b[:10], nil, b[10:25], b[25:]}}
	if partial && d.Offloads().Checksum {
		at := ipHeaderLen(b)
		sum := foldSum(pseudoSum(b, at))
		b[at+6], b[at+7] = byte(sum>>8), byte(sum)
		p.Offload = tun.Offload{NeedsCsum: true, CsumStart: uint16(at), CsumOffset: 6}
	}
	if n, err := d.Queues()[0].Write([]tun.Packet{p}); n != 1 || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
}

func TestWriteUDPSuperPacket(t *testing.T) {
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			d := configured(t, tun.Options{Name: "wfpt"})
			conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(family.local, 0)))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
			whole := payload(5*1200+17, 1)
			b := udpPacket(netip.AddrPortFrom(family.peer, 4321), local, whole)
			at := ipHeaderLen(b)
			sum := foldSum(pseudoSum(b, at))
			b[at+6], b[at+7] = byte(sum>>8), byte(sum)
			n, err := d.Queues()[0].Write([]tun.Packet{{Bufs: [][]byte{b}, Offload: tun.Offload{
				GSO: tun.GSOUDP, NeedsCsum: true, CsumStart: uint16(at), CsumOffset: 6, HdrLen: uint16(at + 8), GSOSize: 1200,
			}}})
			if n != 1 || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
			var got []byte
			buf := make([]byte, 65536)
			conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			for i := range 6 {
				n, err := conn.Read(buf)
				if err != nil {
					t.Fatalf("datagram %d: %v", i, err)
				}
				if want := min(1200, len(whole)-len(got)); n != want {
					t.Fatalf("datagram %d: %d bytes, want %d", i, n, want)
				}
				got = append(got, buf[:n]...)
			}
			if string(got) != string(whole) {
				t.Fatal("other bytes")
			}
		})
	}
}

func TestWritesRefused(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt"})
	q := d.Queues()[0]
	good := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 100))
	notIP := append([]byte{0x70}, good[1:]...)
	for _, row := range []struct {
		name   string
		p      tun.Packet
		want   error
		reason tun.DropReason
	}{
		{"too long", tun.Packet{Bufs: [][]byte{make([]byte, tun.MaxPacket+1)}}, tun.ErrTooLong, tun.DropTooLong},
		{"empty", tun.Packet{}, tun.ErrShort, tun.DropShort},
		{"too short", tun.Packet{Bufs: [][]byte{good[:19]}}, tun.ErrShort, tun.DropShort},
		{"no segment size", tun.Packet{Bufs: [][]byte{good}, Offload: tun.Offload{GSO: tun.GSOTCPv4}}, tun.ErrOffload, tun.DropGSOSize},
		{"header past the end", tun.Packet{Bufs: [][]byte{good}, Offload: tun.Offload{HdrLen: 500}}, tun.ErrOffload, tun.DropHdrLen},
		{"checksum past the end", tun.Packet{Bufs: [][]byte{good}, Offload: tun.Offload{NeedsCsum: true, CsumStart: 120, CsumOffset: 16}}, tun.ErrOffload, tun.DropCsum},
		{"unknown GSO", tun.Packet{Bufs: [][]byte{good}, Offload: tun.Offload{GSO: 77, GSOSize: 1}}, tun.ErrOffload, tun.DropGSOType},
		{"neither IPv4 nor IPv6", tun.Packet{Bufs: [][]byte{notIP}}, tun.ErrInvalid, tun.DropInvalid},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := d.Stats()
			n, err := q.Write([]tun.Packet{{Bufs: [][]byte{good}}, row.p, {Bufs: [][]byte{good}}})
			if n != 1 {
				t.Errorf("accepted %d, want 1: the one before", n)
			}
			wantErr(t, "Write", err, row.want)
			after := d.Stats()
			if after.WrittenPackets != before.WrittenPackets+1 {
				t.Errorf("counted %d written, want 1", after.WrittenPackets-before.WrittenPackets)
			}
			for reason := range after.WriteDrops {
				want := before.WriteDrops[reason]
				if tun.DropReason(reason) == row.reason {
					want++
				}
				if after.WriteDrops[reason] != want {
					t.Errorf("%v counted %d, want %d", tun.DropReason(reason), after.WriteDrops[reason], want)
				}
			}
		})
	}
}

func TestPacketInThousandsOfPieces(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt", MTU: 9000})
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	want := payload(3000, 5)
	b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), conn.LocalAddr().(*net.UDPAddr).AddrPort(), want)
	var p tun.Packet
	for i := range b {
		p.Bufs = append(p.Bufs, b[i:i+1])
	}
	if n, err := d.Queues()[0].Write([]tun.Packet{p}); n != 1 || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	buf := make([]byte, 9000)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != string(want) {
		t.Fatalf("received %d bytes, %v", n, err)
	}
}

func TestReadIntoTooSmallBuffers(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			conn, err := net.Dial("udp", "10.9.0.2:9")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, size := range []int{500, 473, 472, 100} { // 472 + 28 fill the buffers to the byte
				if _, err := conn.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
			}
			q := d.Queues()[0]
			pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 128), make([]byte, 372)}}}
			var sizes []int
			for len(sizes) < 2 {
				if _, err := q.Read(pkts); err != nil {
					t.Fatal(err)
				}
				if b := pkts[0].Bufs[0]; b[0]>>4 == 4 && b[9] == 17 {
					sizes = append(sizes, pkts[0].Size)
				}
			}
			if sizes[0] != 500 || sizes[1] != 128 {
				t.Errorf("read packets of %v bytes, want 500 and 128", sizes)
			}
			if got := d.Stats().ReadDrops[tun.DropTooLong]; got != 2 {
				t.Errorf("%d packets counted as too long, want 2", got)
			}
		})
	}
}

func TestPortablePathCountsOverflow(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt", NoOffload: true})
	conn := rawSender(t)
	waitFor(t, "overflow", func() bool {
		for range 200 {
			if err := unix.Send(conn, make([]byte, 100), 0); err != nil {
				t.Fatal(err)
			}
		}
		return d.Stats().ReadDrops[tun.DropOverflow] > 0
	})
	s := d.Stats()
	if s.Waiting != s.Limit {
		t.Errorf("dropped with %d of %d waiting", s.Waiting, s.Limit)
	}
	if n := readAll(t, d.Queues()[0], batch(16)); n < s.Limit {
		t.Errorf("read %d packets, want at least the %d that waited", n, s.Limit)
	}
}
