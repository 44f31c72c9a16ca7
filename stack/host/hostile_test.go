package host

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// TestBrokenPacketsAreCountedOnce: what no kernel would take reaches neither a filter above the discard layers nor a socket.
func TestBrokenPacketsAreCountedOnce(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := netip.AddrPortFrom(f.b, 1000), netip.AddrPortFrom(f.a, 80)
		flip := func(b []byte, at int) []byte { b[at] ^= 0x40; return b }
		ip := 20
		if f.v == layers.V6 {
			ip = 40
		}
		trusted := tun.Offload{CsumValid: true}
		for _, c := range []struct {
			name   string
			packet []byte
			off    tun.Offload
			get    func(Stats) uint64
			want   string
		}{
			{"TCP checksum", flip(tcpPacket(src, dst, 1, 0, flagSYN), ip+17), noOffload, func(s Stats) uint64 { return s.BadChecksum }, "inbound_transport_discard"},
			{"UDP checksum", flip(udpPacket(src, dst, []byte("data")), ip+9), noOffload, func(s Stats) uint64 { return s.BadChecksum }, "inbound_transport_discard"},
			{"UDP length", flip(udpPacket(src, dst, []byte("data")), ip+4), trusted, func(s Stats) uint64 { return s.Malformed }, "inbound_transport_discard"},
			{"TCP offset", func() []byte { b := tcpPacket(src, dst, 1, 0, flagSYN); b[ip+12] = 4 << 4; return b }(), trusted, func(s Stats) uint64 { return s.Malformed }, "inbound_transport_discard"},
			{"TCP port 0", tcpPacket(netip.AddrPortFrom(f.b, 0), dst, 1, 0, flagSYN), noOffload, func(s Stats) uint64 { return s.Malformed }, "inbound_transport_discard"},
		} {
			t.Run(c.name, func(t *testing.T) {
				a, _ := pair(t, pairOptions{})
				a.listen(t, "tcp", dst.String())
				a.log.take()
				if err := a.dev.Inject(c.packet, c.off); err != nil {
					t.Fatal(err)
				}
				settle(t, a)
				got := a.log.take()
				same(t, "indications", got, []string{"inbound_ippacket", c.want})
				if n := c.get(a.Stats()); n != 1 {
					t.Errorf("counted %d times: %+v", n, a.Stats())
				}
				if n := a.Stats().Flows; n != 0 {
					t.Errorf("%d flows", n)
				}
			})
		}
		if f.v == layers.V4 {
			a, _ := pair(t, pairOptions{})
			if err := a.dev.Inject(flip(udpPacket(src, dst, []byte("data")), 10), noOffload); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a bad IPv4 header checksum is counted", func() bool { return a.Stats().BadChecksum == 1 })
			if got := a.log.take(); len(got) != 0 {
				t.Errorf("indications %v", got)
			}
		}
	})
}

// TestVouchedChecksumsAreNotVerified: a packet for which the kernel vouches, or whose checksum it left open, is taken as it is.
func TestVouchedChecksumsAreNotVerified(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, _ := pair(t, pairOptions{})
		p := a.packets(t, "udp", netip.AddrPortFrom(f.a, 53).String())
		b := udpPacket(netip.AddrPortFrom(f.b, 1), netip.AddrPortFrom(f.a, 53), []byte("partial"))
		at := len(b) - len("partial") - 2
		b[at], b[at+1] = 0x12, 0x34
		off := tun.Offload{NeedsCsum: true, CsumStart: uint16(at - 6), CsumOffset: 6}
		if err := a.dev.Inject(b, off); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 16)
		if n, _, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != "partial" {
			t.Errorf("read %q, %v", buf[:n], err)
		}
	})
}

// TestSYNFloodIsBounded: half-open connections stop at the limits, are counted, and leave nothing behind.
func TestSYNFloodIsBounded(t *testing.T) {
	o := pairOptions{quiet: true}
	o.host.MaxFlows = 100
	a, _ := pair(t, o)
	f := families[0]
	a.listen(t, "tcp", netip.AddrPortFrom(f.a, 80).String())
	for i := range 1000 {
		p := tcpPacket(netip.AddrPortFrom(f.other, uint16(1000+i)), netip.AddrPortFrom(f.a, 80), uint32(i), 0, flagSYN)
		for errors.Is(a.dev.Inject(p, noOffload), tun.ErrWouldBlock) {
			time.Sleep(time.Millisecond)
		}
	}
	eventually(t, "all were seen", func() bool { s := a.Stats(); return uint64(s.Flows)+s.FlowTableFull == 1000 })
	if n := a.Stats().Flows; n != 100 {
		t.Errorf("%d flows, want 100", n)
	}
}

// TestLossyDevice: a transfer survives losses in both directions.
func TestLossyDevice(t *testing.T) {
	o := pairOptions{quiet: true}
	o.device.Lose = func(n int, _ [][]byte) bool { return n > 50 && n%211 == 0 }
	for _, cc := range []string{"reno", "cubic"} {
		o.host.CongestionControl = cc
		eachFamily(t, func(t *testing.T, f family) {
			a, b := pair(t, o)
			c, s := connected(t, a, b, f)
			data := pattern(2*period, 7)
			copy(data[period:], data[:period])
			transfer(t, c, s, data, 1<<20)
			transfer(t, s, c, data, 1<<20)
			if a.dev.Lost()+b.dev.Lost() == 0 {
				t.Error("nothing was lost")
			}
		})
	}
}

// TestALostTailIsRecoveredInOneTimeout: a burst of segments is lost and nothing follows it. One retransmission timeout finds out, and
// the rest comes at once, not two segments a timeout.
func TestALostTailIsRecoveredInOneTimeout(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		var lossy atomic.Bool
		var lost atomic.Int64
		o := pairOptions{quiet: true}
		o.device.Lose = func(int, [][]byte) bool {
			if lossy.Load() {
				lost.Add(1)
			}
			return lossy.Load()
		}
		a, b := pair(t, o)
		c, s := connected(t, a, b, f)
		done := make(chan error, 1) // the end of the one reader
		go func() { _, err := io.Copy(io.Discard, s); done <- err }()
		chunk := make([]byte, 1000)
		write := func(n int) {
			for range n {
				if _, err := c.Write(chunk); err != nil {
					t.Fatal(err)
				}
			}
		}
		write(2000)
		eventually(t, "all is acknowledged", func() bool { return s.flow.bytesIn.Load() == 2000*1000 })
		lossy.Store(true)
		write(100)
		eventually(t, "the tail is lost", func() bool { return lost.Load() > 0 })
		lossy.Store(false)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		// Were it two segments a timeout, it would be dozens.
		if n := a.stack.Stats().TCP.Timeouts.Value(); n > 5 {
			t.Errorf("%d retransmission timeouts for one burst of %d segments", n, lost.Load())
		}
	})
}

// TestTheSamePortsAgain: a client that connects again from the port of a connection in TIME_WAIT is served, with a new flow.
func TestTheSamePortsAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		o := pairOptions{quiet: true}
		o.host.TimeWait = time.Minute
		a, _ := pair(t, o)
		l := a.listen(t, "tcp", netip.AddrPortFrom(f.a, 80).String())
		src, dst := netip.AddrPortFrom(f.other, 4000), netip.AddrPortFrom(f.a, 80)
		for round, isn := range []uint32{1000, 1_000_000} {
			ch := accept(l)
			var iss uint32
			inject := func(seq, ack uint32, flags byte) {
				if err := a.dev.Inject(tcpPacket(src, dst, seq, ack, flags), noOffload); err != nil {
					t.Fatal(err)
				}
			}
			tp := tuple{proto: protoTCP, local: dst, remote: src}
			inject(isn, 0, flagSYN)
			eventually(t, "the SYN is answered", func() bool {
				fl := a.flows.get(&tp)
				if fl == nil || fl.state.Load() != flowAccepting || fl.next.Load() == 0 {
					return false
				}
				iss = uint32(fl.next.Load())
				return true
			})
			inject(isn+1, iss, flagACK)
			r := <-ch
			if r.err != nil {
				t.Fatalf("round %d: %v", round, r.err)
			}
			// We close first and so wait: FIN, its acknowledgement with the client's FIN, and our last ACK.
			ep := r.c.(*Conn).sock.ep
			if err := r.c.Close(); err != nil {
				t.Fatal(err)
			}
			inject(isn+1, iss+1, flagACK|1)
			eventually(t, "the connection waits", func() bool { return tcp.EndpointState(ep.State()) == tcp.StateTimeWait })
		}
		if n := len(a.log.recorded(layers.RecordFlow)); n != 2 {
			t.Errorf("%d flows, want 2", n)
		}
	})
}

// TestManyAtOnce dials, talks and closes on many goroutines; nothing is left.
func TestManyAtOnce(t *testing.T) {
	n := 400
	if need.Race {
		n = 40
	}
	a, b := pair(t, pairOptions{quiet: true, device: tuntest.Options{QueueLen: 8192}})
	var all sync.WaitGroup
	for _, f := range families {
		l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 7).String())
		// Owner: the test; closing the listener ends it, closing a connection its echo.
		all.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				all.Go(func() { io.Copy(c, c); c.Close() })
			}
		})
		var clients sync.WaitGroup
		for i := range n {
			clients.Go(func() {
				c, err := a.DialContext(context.Background(), "tcp", l.Addr().String())
				if err != nil {
					t.Errorf("dial: %v", err)
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				want := pattern(1000+i, int64(i))
				if _, err := c.Write(want); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != string(want) {
					t.Errorf("echo: %v", err)
				}
			})
		}
		clients.Wait()
		l.Close()
	}
	all.Wait()
	eventually(t, "no socket is left", func() bool { return len(a.allSockets(false))+len(b.allSockets(false)) == 0 })
}

// TestIdleDatagramFlowsEnd, and the next packet is a first one again.
func TestIdleDatagramFlowsEnd(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	o := pairOptions{}
	o.host.Clock = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	a, b := pair(t, o)
	f := families[0]
	server := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
	c := a.packets(t, "udp", ":0")
	for round := range 2 {
		if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(f.b, 53)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := server.ReadFrom(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if n := len(a.log.indications(layers.ALEAuthConnect)); n != round+1 {
			t.Errorf("round %d: %d connects", round, n)
		}
		mu.Lock()
		now = now.Add(defaultDatagramIdle + time.Second)
		mu.Unlock()
		eventually(t, "the flows end", func() bool { return a.Stats().Flows+b.Stats().Flows == 0 })
	}
	if n := len(b.log.recorded(layers.RecordFlowEnd)); n != 2 {
		t.Errorf("%d ends of flows, want 2", n)
	}
}

// TestOptionsAreChecked: what cannot be is refused with the cure.
func TestOptionsAreChecked(t *testing.T) {
	dev := tuntest.New(tuntest.Options{})
	defer dev.Close()
	s := newSide(t, tuntest.New(tuntest.Options{}), pairOptions{}, 0)
	for _, c := range []struct {
		o    Options
		want error
	}{
		{Options{}, ErrNoAddress},
		{Options{Addresses: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}, layers.ErrInvalid},
		{Options{Addresses: []netip.Prefix{netip.MustParsePrefix("224.0.0.1/32")}}, layers.ErrInvalid},
		{Options{Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}, CongestionControl: "bbr"}, layers.ErrInvalid},
	} {
		if _, err := New(dev, s.engine, c.o); !errors.Is(err, c.want) {
			t.Errorf("New(%+v) = %v, want %v", c.o, err, c.want)
		}
	}
	if _, err := New(dev, nil, Options{}); !errors.Is(err, ErrNoEngine) {
		t.Errorf("New without an engine = %v", err)
	}
}

// TestSilentConnectTimesOut: a silent block is what a peer that does not answer is.
func TestSilentConnectTimesOut(t *testing.T) {
	o := pairOptions{}
	o.host.ConnectTimeout = 100 * time.Millisecond
	a, _ := pair(t, o)
	a.add(t, layers.ALEAuthConnect, silentBlock(80))
	for _, port := range []uint16{80, 81} {
		_, err := a.DialContext(withTimeout(t), "tcp", netip.AddrPortFrom(families[0].other, port).String())
		var blocked *BlockedError
		if !errors.Is(err, syscall.ETIMEDOUT) || errors.As(err, &blocked) != (port == 80) {
			t.Errorf("port %d: dial = %v, want ETIMEDOUT", port, err)
		}
	}
}

// TestASecondSYNIsAuthorisedAgain: a client that gave up while its SYN was answered, and comes again with another sequence number,
// is another connection; the same SYN again is not.
func TestASecondSYNIsAuthorisedAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, _ := pair(t, pairOptions{})
		l := a.listen(t, "tcp", netip.AddrPortFrom(f.a, 80).String())
		src, dst := netip.AddrPortFrom(f.other, 4000), netip.AddrPortFrom(f.a, 80)
		inject := func(seq, ack uint32, flags byte) {
			if err := a.dev.Inject(tcpPacket(src, dst, seq, ack, flags), noOffload); err != nil {
				t.Fatal(err)
			}
			settle(t, a)
		}
		asked := func() int { return len(a.log.indications(layers.ALEAuthRecvAccept)) }
		inject(1000, 0, flagSYN)
		inject(1000, 0, flagSYN)
		if n := asked(); n != 1 {
			t.Errorf("asked %d times about one SYN", n)
		}
		inject(1001, 0, flagRST)
		tp := tuple{proto: protoTCP, local: dst, remote: src}
		eventually(t, "netstack forgets the connection", func() bool { return a.reusable(&tp) })
		inject(5000, 0, flagSYN)
		if n := asked(); n != 2 {
			t.Errorf("asked %d times about two SYNs", n)
		}
		if n := a.Stats().Flows; n != 1 {
			t.Errorf("%d flows, want 1", n)
		}
		l.Close()
		if n := a.Stats().Flows; n != 0 {
			t.Errorf("%d flows after the listener was closed", n)
		}
	})
}
