package tun_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
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

func TestDeleteUnderLoad(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			q := d.Queues()[0]
			conn, err := net.Dial("udp", "10.9.0.2:9")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var load sync.WaitGroup
			var read, written atomic.Int64
			stop := make(chan struct{})
			// Owner of all three: the test. The reader and the writer end with the device, the sender with stop.
			load.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_, _ = conn.Write(make([]byte, 1000)) // fails once the route is gone
					}
				}
			})
			ends := make(chan error, 2)
			load.Go(func() {
				pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}, {Bufs: [][]byte{make([]byte, 2048)}}}
				for {
					n, err := q.Read(pkts)
					read.Add(int64(n))
					if err != nil {
						ends <- fmt.Errorf("read: %w", err)
						return
					}
				}
			})
			load.Go(func() {
				b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 1000))
				for {
					n, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}, {Bufs: [][]byte{b}}})
					written.Add(int64(n))
					if err != nil && !errors.Is(err, tun.ErrWouldBlock) && !errors.Is(err, tun.ErrDown) {
						ends <- fmt.Errorf("write: %w", err)
						return
					}
				}
			})
			waitFor(t, "packets both ways", func() bool { return read.Load() > 100 && written.Load() > 100 })
			ip(t, "link", "del", d.Name())
			for range 2 {
				wantErr(t, "end", <-ends, tun.ErrGone)
			}
			waitEvent(t, d, tun.EventGone)
			close(stop)
			load.Wait()
			if _, err := q.TryRead(make([]tun.Packet, 1)); !errors.Is(err, tun.ErrGone) {
				t.Errorf("TryRead later: %v, want %v", err, tun.ErrGone)
			}
			if fd := q.FD(); fd >= 0 && !readable(t, fd) {
				t.Error("the descriptor of a deleted device is not readable: an epoll loop would never learn of it")
			}
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

// waitFor waits until cond holds.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}

// readable reports whether fd is, now; an error condition counts, as it does for epoll.
func readable(t testing.TB, fd int) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	}
}

func TestDownUpAndMTU(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			q := d.Queues()[0]
			b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 10))
			write := func() error {
				_, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}})
				return err
			}
			waitEvent(t, d, tun.EventUp)
			for range 3 {
				ip(t, "link", "set", d.Name(), "down")
				waitEvent(t, d, tun.EventDown)
				wantErr(t, "write while down", write(), tun.ErrDown)
				if _, err := q.TryRead([]tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}}); err != nil && !errors.Is(err, tun.ErrWouldBlock) {
					t.Errorf("TryRead while down: %v", err)
				}
				ip(t, "link", "set", d.Name(), "up")
				waitEvent(t, d, tun.EventUp)
				if err := write(); err != nil {
					t.Errorf("write after up: %v", err)
				}
			}
			if got := d.Stats().WriteDrops[tun.DropDown]; got != 3 {
				t.Errorf("%d writes counted as down, want 3", got)
			}
			for _, mtu := range []int{1280, 9000, 65535, 1500} {
				ip(t, "link", "set", d.Name(), "mtu", fmt.Sprint(mtu))
				if e := waitEvent(t, d, tun.EventMTU); e.MTU != mtu || d.MTU() != mtu {
					t.Errorf("event %+v, device says %d, want %d", e, d.MTU(), mtu)
				}
			}
		})
	}
}

func TestRenamedInterfaceIsFollowed(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt"})
	ip(t, "link", "set", "wfpt", "down")
	ip(t, "link", "set", "wfpt", "name", "other0")
	ip(t, "link", "set", "other0", "mtu", "1300")
	if e := waitEvent(t, d, tun.EventMTU); e.MTU != 1300 {
		t.Errorf("event %+v, want MTU 1300", e)
	}
	ip(t, "link", "del", "other0")
	waitEvent(t, d, tun.EventGone)
}

func TestMoveToAnotherNamespaceIsNotTheEnd(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt"})
	waitEvent(t, d, tun.EventUp)
	holder := exec.Command("sleep", "60")
	holder.Path = need.Program(t, "sleep")
	holder.SysProcAttr = newNamespace()
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	ip(t, "link", "set", "wfpt", "netns", fmt.Sprint(holder.Process.Pid))
	waitEvent(t, d, tun.EventDown)
	pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}}
	for {
		_, err := d.Queues()[0].TryRead(pkts)
		if err == nil {
			continue // what was queued before
		}
		wantErr(t, "TryRead of a moved device", err, tun.ErrWouldBlock)
		break
	}
	select {
	case e := <-d.Events():
		t.Errorf("event %+v after the move", e)
	default:
	}
}

func TestCloseWakesReaders(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			inNamespace(t)
			d := open(t, path.opts)
			ends := make(chan error, 1)
			started := make(chan struct{})
			// Owner: the test, which receives its result.
			go func() {
				close(started)
				_, err := d.Queues()[0].Read([]tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}})
				ends <- err
			}()
			<-started
			if err := d.Close(); err != nil {
				t.Fatalf("Close: %v", err)
			}
			wantErr(t, "Read", <-ends, tun.ErrClosed)
			if exists(d.Name()) {
				t.Errorf("%s is still there after Close", d.Name())
			}
			if err := d.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			_, err := d.Queues()[0].Write([]tun.Packet{{Bufs: [][]byte{make([]byte, 100)}}})
			wantErr(t, "Write after Close", err, tun.ErrClosed)
			for range d.Events() { // ends: Close closed it
			}
		})
	}
}

func TestMultiQueueKeepsFlowsApart(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt", Queues: 2})
	queues := d.Queues()
	if len(queues) != 2 {
		t.Fatalf("%d queues, want 2", len(queues))
	}
	for i, q := range queues {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer := netip.AddrPortFrom(netip.MustParseAddr("10.9.0.2"), uint16(5000+i))
		// The kernel sends a flow to the queue that last wrote it; writing teaches it which.
		b := udpPacket(peer, conn.LocalAddr().(*net.UDPAddr).AddrPort(), []byte("hello"))
		for range 3 {
			if n, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}}); n != 1 || err != nil {
				t.Fatalf("queue %d: Write: %d, %v", i, n, err)
			}
		}
		buf := make([]byte, 100)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(buf); err != nil {
			t.Fatalf("queue %d: %v", i, err)
		}
		if _, err := conn.WriteToUDPAddrPort([]byte("answer"), peer); err != nil {
			t.Fatal(err)
		}
		readMatching(t, d, isUDPTo(peer.Port()))
	}
	if s := d.Stats(); s.WrittenPackets != 6 || s.ReadPackets < 2 {
		t.Errorf("stats %+v: want 6 written and at least 2 read over both queues", s)
	}
}

func TestTakeover(t *testing.T) {
	const name = "wfpt"
	leftover := func(o tun.Options) func(testing.TB) {
		return func(t testing.TB) {
			o.Name, o.Persist = name, true
			if err := open(t, o).Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	admin := func(args ...string) func(testing.TB) {
		return func(t testing.TB) { ip(t, args...) }
	}
	for _, row := range []struct {
		name   string
		before func(testing.TB)
		open   tun.Options
		want   error  // of Open
		cure   string // in its text
		stays  bool   // after Close
	}{
		{"left by one of ours", leftover(tun.Options{}), tun.Options{}, nil, "", false},
		{"left, and to be left again", leftover(tun.Options{}), tun.Options{Persist: true}, nil, "", true},
		{"left by the portable path", leftover(tun.Options{NoOffload: true}), tun.Options{}, nil, "", false},
		{"left by the fast path", leftover(tun.Options{}), tun.Options{NoOffload: true}, nil, "", false},
		{"left with several queues, one wanted", leftover(tun.Options{Queues: 4}), tun.Options{}, nil, "", false},
		{"left with several queues, portable wanted", leftover(tun.Options{Queues: 4}), tun.Options{NoOffload: true}, nil, "", false},
		{"left with several queues, several wanted", leftover(tun.Options{Queues: 4}), tun.Options{Queues: 2}, nil, "", false},
		{"left with one queue, several wanted", leftover(tun.Options{}), tun.Options{Queues: 2}, tun.ErrKind, "ip link delete wfpt", true},
		{"an administrator's", admin("tuntap", "add", "dev", name, "mode", "tun"), tun.Options{}, nil, "", true},
		{"a TAP", admin("tuntap", "add", "dev", name, "mode", "tap"), tun.Options{}, tun.ErrKind, "ip link delete wfpt", true},
		{"not a TUN at all", admin("link", "add", name, "type", "veth"), tun.Options{}, tun.ErrKind, "ip link delete wfpt", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			inNamespace(t)
			row.before(t)
			if !exists(name) {
				t.Fatal("nothing was left to take over")
			}
			row.open.Name, row.open.MTU = name, 1400
			d, err := tun.Open(row.open)
			if row.want != nil {
				wantErr(t, "Open", err, row.want)
				if !strings.Contains(err.Error(), row.cure) {
					t.Errorf("error %q does not name the cure %q", err, row.cure)
				}
			} else if err != nil {
				t.Fatalf("Open: %v", err)
			} else {
				if d.MTU() != 1400 {
					t.Errorf("MTU %d, want 1400", d.MTU())
				}
				checkEcho(t, d)
				d.Close()
			}
			if got := exists(name); got != row.stays {
				t.Errorf("interface there after Close: %v, want %v", got, row.stays)
			}
		})
	}
}

// checkEcho sees that a datagram of the kernel comes out of the device.
func checkEcho(t *testing.T, d tun.Device) {
	t.Helper()
	if err := tun.Configure(d.Name(), tun.Config{Up: true, Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("udp", "10.9.0.2:99")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if b := readMatching(t, d, isUDPTo(99)); string(b[28:]) != "hello" {
		t.Errorf("read %q", b[28:])
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
