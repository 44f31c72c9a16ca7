package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// echoUDP answers every datagram with itself until the socket is closed.
func echoUDP(t testing.TB, c *net.UDPConn) {
	t.Helper()
	done := make(chan struct{})
	_ = c.SetDeadline(time.Time{})
	// Owner: the test's cleanup, which closes the socket and waits.
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteToUDPAddrPort(buf[:n], from) // the program notices a loss
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
}

func TestDatagramSizesBothWays(t *testing.T) {
	s := newScene(t, sceneOptions{})
	far := newServerSpace(t, 1500)
	eachFamily(t, func(t *testing.T, f family) {
		near := (*space)(nil).listenUDP(t, loopbackOf(f))
		_ = near.SetReadBuffer(1 << 20)
		echoUDP(t, near)
		behind := far.listenUDP(t, netip.AddrPortFrom(f.far, 0))
		_ = behind.SetReadBuffer(1 << 20)
		echoUDP(t, behind)
		for _, row := range []struct {
			name string
			to   netip.AddrPort
		}{{"loopback", portOf(f, near.LocalAddr())}, {"link", netip.MustParseAddrPort(behind.LocalAddr().String())}} {
			t.Run(row.name, func(t *testing.T) {
				c := s.prog.dialUDP(t, row.to)
				_ = c.SetReadBuffer(1 << 20)
				for _, size := range []int{0, 1, 7, 1452, 1472, 1473, 2001, 20000, 65507} {
					data := make([]byte, size)
					fill(data, uint64(size))
					if len(data) > 0 {
						data[len(data)-1] = 0x5a
					}
					if _, err := c.Write(data); err != nil {
						t.Fatalf("write %d bytes: %v", size, err)
					}
					got := make([]byte, 1<<16)
					_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
					n, err := c.Read(got)
					if err != nil || !bytes.Equal(got[:n], data) {
						t.Errorf("%d bytes came back as %d, %v", size, n, err)
					}
				}
			})
		}
	})
}

// TestDatagramBurst: batches of equal and of mixed sizes arrive once, in order.
func TestDatagramBurst(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		server := (*space)(nil).listenUDP(t, loopbackOf(f))
		_ = server.SetReadBuffer(8 << 20)
		c := s.prog.dialUDP(t, portOf(f, server.LocalAddr()))
		buf := make([]byte, 2000)
		next := 0
		for round := range 30 {
			for i := range 40 {
				size := 64
				if round%3 == 1 {
					size = 64 + i%5*100
				}
				msg := make([]byte, size)
				copy(msg, fmt.Sprintf("%d ", round*40+i))
				if _, err := c.Write(msg); err != nil {
					t.Fatal(err)
				}
			}
			for range 40 {
				n, _, err := server.ReadFromUDPAddrPort(buf)
				if err != nil {
					t.Fatalf("after %d datagrams: %v", next, err)
				}
				var got int
				if _, err := fmt.Sscan(string(buf[:n]), &got); err != nil || got != next {
					t.Fatalf("datagram %d is %q, %v", next, bytes.TrimRight(buf[:n], "\x00"), err)
				}
				next++
			}
		}
	})
}

// TestDatagramBurstOverNarrowLink: what the host's kernel cannot send as segments of one goes one by one.
func TestDatagramBurstOverNarrowLink(t *testing.T) {
	s := newScene(t, sceneOptions{mtu: 9000})
	far := newServerSpace(t, 1500)
	eachFamily(t, func(t *testing.T, f family) {
		server := far.listenUDP(t, netip.AddrPortFrom(f.far, 0))
		_ = server.SetReadBuffer(8 << 20)
		c := s.prog.dialUDP(t, netip.MustParseAddrPort(server.LocalAddr().String()))
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		level, opt, mode := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
		if f.v == layers.V6 {
			level, opt, mode = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT
		}
		_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, mode) })
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1<<16)
		for i := range 40 {
			msg := make([]byte, 2000)
			msg[0] = byte(i)
			until(t, "write", func() bool { _, err := c.Write(msg); return err == nil }) // the error of the first is told once
		}
		for i := range 40 {
			_ = server.SetReadDeadline(time.Now().Add(3 * time.Second))
			if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || n != 2000 || buf[0] != byte(i) {
				t.Fatalf("datagram %d: %d bytes, number %d, %v", i, n, buf[0], err)
			}
		}
	})
}

func TestErrnoOfDatagrams(t *testing.T) {
	s := newScene(t, sceneOptions{})
	addRefusals(t)
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenUDP(t, loopbackOf(f))
		closed := portOf(f, l.LocalAddr())
		l.Close()
		prohibited := syscall.EHOSTUNREACH
		if f.v == layers.V6 {
			prohibited = syscall.EACCES
		}
		blocked := netip.AddrPortFrom(f.far, 99)
		s.block(f, layers.ALEAuthConnect, filter.Condition{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(99)})
		for _, row := range []struct {
			name   string
			remote netip.AddrPort
			want   syscall.Errno
		}{
			{"port unreachable", closed, syscall.ECONNREFUSED},
			{"no route", netip.AddrPortFrom(f.nowhere, 80), syscall.ENETUNREACH},
			{"unreachable", netip.AddrPortFrom(f.off, 80), syscall.EHOSTUNREACH},
			{"prohibited", netip.AddrPortFrom(f.forbid, 80), prohibited},
			{"blocked", blocked, prohibited},
		} {
			t.Run(row.name, func(t *testing.T) {
				c := s.prog.dialUDP(t, row.remote)
				recvErrors(t, f, c) // without it Linux tells a UDP socket of closed ports only
				mustWrite(t, c, "anybody there?")
				_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
				if n, err := c.Read(make([]byte, 1)); errnoOf(err) != row.want {
					t.Errorf("read: %d, %v, want %v", n, err, row.want)
				}
			})
		}
	})
}

// TestDatagramAfterErrorIsNotLost: an error of an earlier datagram must not swallow the next.
func TestDatagramAfterErrorIsNotLost(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenUDP(t, loopbackOf(f))
		at := netip.MustParseAddrPort(l.LocalAddr().String())
		l.Close()
		c := s.prog.dialUDP(t, netip.AddrPortFrom(f.stack, at.Port()))
		for range 5 {
			mustWrite(t, c, "to nobody")
			if _, err := c.Read(make([]byte, 1)); errnoOf(err) != syscall.ECONNREFUSED {
				t.Fatalf("read: %v, want ECONNREFUSED", err)
			}
			l = (*space)(nil).listenUDP(t, at)
			mustWrite(t, c, "to somebody")
			got := make([]byte, 100)
			_ = l.SetReadDeadline(time.Now().Add(3 * time.Second))
			if n, err := l.Read(got); err != nil || string(got[:n]) != "to somebody" {
				t.Fatalf("server read %q, %v", got[:n], err)
			}
			l.Close()
		}
	})
}

// TestFragmentationNeeded: a link of 1280 bytes on the host side; the program learns of it as from a router.
func TestFragmentationNeeded(t *testing.T) {
	s := newScene(t, sceneOptions{})
	far := newServerSpace(t, 1280)
	eachFamily(t, func(t *testing.T, f family) {
		server := far.listenUDP(t, netip.AddrPortFrom(f.far, 0))
		c := s.prog.dialUDP(t, netip.MustParseAddrPort(server.LocalAddr().String()))
		level, discover, mode, opt := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO, unix.IP_MTU
		if f.v == layers.V6 {
			level, discover, mode, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO, unix.IPV6_MTU
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, discover, mode) })
		if err != nil {
			t.Fatal(err)
		}
		big := make([]byte, 1400)
		if _, err := c.Write(big); err != nil {
			t.Fatalf("first write: %v", err)
		}
		until(t, "EMSGSIZE", func() bool { _, err := c.Write(big); return errnoOf(err) == syscall.EMSGSIZE })
		mtu := 0
		_ = raw.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), level, opt) })
		if err != nil || mtu != 1280 {
			t.Errorf("the program's path MTU: %d, %v, want 1280", mtu, err)
		}
		// What fits arrives, and what the program's kernel fragments now too.
		mode = unix.IP_PMTUDISC_WANT
		_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, discover, mode) })
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{1200, 1400, 9000} {
			// A second of the big datagrams may have been under way: its error is told to the next write.
			until(t, "write", func() bool { _, err := c.Write(make([]byte, size)); return err == nil })
			got := make([]byte, 1<<16)
			_ = server.SetReadDeadline(time.Now().Add(3 * time.Second))
			if n, _, err := server.ReadFromUDPAddrPort(got); err != nil || n != size {
				t.Errorf("%d bytes arrived as %d, %v", size, n, err)
			}
		}
	})
}

// TestTimeExceeded: a hop limit that ends on the way, as traceroute sends it.
func TestTimeExceeded(t *testing.T) {
	s := newScene(t, sceneOptions{})
	router := newServerSpace(t, 1500)
	for _, n := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		router.must(t, func() error { return os.WriteFile("/proc/sys/"+n, []byte("1"), 0) })
	}
	eachFamily(t, func(t *testing.T, f family) {
		beyond := f.off
		routeVia(t, beyond, f.far)
		router.must(t, func() error { routeVia(t, beyond, f.near); return nil })
		c := s.prog.dialUDP(t, netip.AddrPortFrom(beyond, 33434))
		level, ttl, recvErr := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_RECVERR
		if f.v == layers.V6 {
			level, ttl, recvErr = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		recvErrors(t, f, c)
		_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, ttl, 1) })
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, c, "probe")
		var from netip.Addr
		var typ byte
		until(t, "queued ICMP error", func() bool {
			_ = raw.Control(func(fd uintptr) {
				oob := make([]byte, 512)
				_, n, _, _, rerr := unix.Recvmsg(int(fd), make([]byte, 512), oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
				if rerr != nil {
					return
				}
				msgs, _ := unix.ParseSocketControlMessage(oob[:n])
				for _, m := range msgs {
					if len(m.Data) > 16 && int(m.Header.Type) == recvErr {
						typ, from = m.Data[5], offender(m.Data[16:])
					}
				}
			})
			return from.IsValid()
		})
		want := byte(11) // time exceeded
		if f.v == layers.V6 {
			want = 3
		}
		if typ != want || from != f.far {
			t.Errorf("the program's error queue: type %d from %v, want %d from %v", typ, from, want, f.far)
		}
	})
}

func TestDatagramIdleTime(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		server := (*space)(nil).listenUDP(t, loopbackOf(f))
		echoUDP(t, server)
		c := s.prog.dialUDP(t, portOf(f, server.LocalAddr()))
		talk := func() {
			t.Helper()
			mustWrite(t, c, "x")
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		talk()
		s.advance(idleOther - time.Second)
		talk() // starts the time anew
		s.advance(idleOther - time.Second)
		if n := s.g.Stats().DatagramFlows; n != 1 {
			t.Fatalf("%d flows before the idle time, want 1", n)
		}
		s.advance(2 * time.Second)
		until(t, "end of the idle flow", func() bool { return s.g.Stats().DatagramFlows == 0 })
		talk() // a new flow
	})
	for _, row := range []struct {
		proto uint8
		port  uint16
		want  time.Duration
	}{{unix.IPPROTO_UDP, 53, idleDNS}, {unix.IPPROTO_UDP, 123, idleDNS}, {unix.IPPROTO_UDP, 500, idleService}, {unix.IPPROTO_UDP, 443, idleOther},
		{unix.IPPROTO_UDP, 40000, idleOther}, {unix.IPPROTO_ICMP, 0, idleEcho}, {unix.IPPROTO_ICMPV6, 0, idleEcho}} {
		if got := idleTime(row.proto, row.port); got != row.want {
			t.Errorf("idle time of protocol %d, port %d: %v, want %v", row.proto, row.port, got, row.want)
		}
	}
}

func TestDatagramFlowBound(t *testing.T) {
	s := newScene(t, sceneOptions{Options: Options{MaxDatagramFlows: 8}})
	f := families[0]
	server := (*space)(nil).listenUDP(t, loopbackOf(f))
	var conns []*net.UDPConn
	buf := make([]byte, 10)
	for range 20 {
		c := s.prog.dialUDP(t, portOf(f, server.LocalAddr()))
		conns = append(conns, c)
		mustWrite(t, c, "x")
		if _, err := server.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	st := s.g.Stats()
	if st.DatagramFlows != 8 || st.Drops["table_full"] != 12 {
		t.Errorf("%d flows, %d made room, want 8 and 12", st.DatagramFlows, st.Drops["table_full"])
	}
	// The one used longest ago has gone; it comes back as a new flow.
	mustWrite(t, conns[0], "y")
	if n, err := server.Read(buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("server read %q, %v", buf[:n], err)
	}
}

// TestPendedDatagrams: the callout clones what comes while it decides, and injects it afterwards (INS-6).
func TestPendedDatagrams(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		server := (*space)(nil).listenUDP(t, loopbackOf(f))
		for _, row := range []struct {
			name    string
			verdict layers.Action
			jump    time.Duration
		}{{"permit", layers.Permit, 0}, {"permit after four minutes", layers.Permit, 4 * time.Minute}, {"deny", layers.Block, 0}} {
			t.Run(row.name, func(t *testing.T) {
				h := &holder{}
				h.verdict.Store(uint32(row.verdict))
				reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
				defer s.remove(t, reg)
				inj, err := layers.NewInjector("test", s.g)
				if err != nil {
					t.Fatal(err)
				}
				defer inj.Close()
				c := s.prog.dialUDP(t, portOf(f, server.LocalAddr()))
				for i := range 10 {
					mustWrite(t, c, fmt.Sprint(i))
				}
				until(t, "ten indications", func() bool { asked, _, _ := h.counts(); return asked == 10 })
				s.advance(row.jump)
				op := h.op(0)
				if h.op(1) != nil {
					t.Error("a second operation for the same flow")
				}
				if err := op.Complete(nil); err != nil {
					t.Fatalf("Complete: %v", err)
				}
				clones := h.take()
				if row.verdict == layers.Block {
					for _, c := range clones {
						c.Release()
					}
					until(t, "end of the flow", func() bool { return s.g.Stats().DatagramFlows == 0 })
					return
				}
				done := make(chan error, len(clones)) // one completion of each
				for _, c := range clones {
					if err := inj.Send(c, func(err error) { done <- err }); err != nil {
						t.Fatal(err)
					}
				}
				buf := make([]byte, 10)
				for i := range 10 {
					if err := <-done; err != nil {
						t.Errorf("completion %d: %v", i, err)
					}
					_ = server.SetReadDeadline(time.Now().Add(3 * time.Second))
					if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != fmt.Sprint(i) {
						t.Errorf("datagram %d: %q, %v", i, buf[:n], err)
					}
				}
				asked, again, _ := h.counts()
				if asked != 10 || again != 1 {
					t.Errorf("asked %d times, %d after completion, want 10 and 1", asked, again)
				}
				s.onLoop(func() {
					for _, f := range s.g.datagrams.flows {
						f.end("")
					}
				})
			})
		}
	})
}

// TestPendedDatagramDeadline: the operation of a flow that nobody decides ends, and leaves no timer behind.
func TestPendedDatagramDeadline(t *testing.T) {
	s := newScene(t, sceneOptions{Options: Options{PendDeadline: 5 * time.Minute}})
	f := families[0]
	h := &holder{}
	s.callout(f, "hold", h, layers.ALEAuthConnect)
	c := s.prog.dialUDP(t, netip.AddrPortFrom(f.far, 53))
	mustWrite(t, c, "question")
	op := h.waitOp(t, 0)
	s.advance(4 * time.Minute)
	if op.Cause() != layers.PendOutstanding {
		t.Errorf("after four minutes: %v, want it outstanding", op.Cause())
	}
	s.advance(time.Minute)
	until(t, "deadline", func() bool { return op.Cause() == layers.PendDeadline })
	until(t, "end of the flow", func() bool { return s.g.Stats().DatagramFlows == 0 })
	s.onLoop(func() {
		if n := s.g.loop.timers.Len(); n != 0 {
			t.Errorf("%d timers left", n)
		}
	})
	for _, c := range h.take() {
		c.Release()
	}
}

func TestPing(t *testing.T) {
	path := need.Program(t, "ping")
	s := newScene(t, sceneOptions{})
	far := newServerSpace(t, 1500)
	_ = far
	allowPing(t, "0 0")
	eachFamily(t, func(t *testing.T, f family) {
		for _, row := range []struct {
			name string
			to   netip.Addr
			args []string
		}{
			{"server", f.far, []string{"-c", "3", "-i", "0.05"}},
			{"server, empty", f.far, []string{"-c", "1", "-s", "0"}},
			{"server, fragments", f.far, []string{"-c", "2", "-i", "0.05", "-s", "5000"}},
			{"server, 65000 bytes", f.far, []string{"-c", "2", "-i", "0.05", "-s", "65000"}},
			{"gateway", f.stack, []string{"-c", "2", "-i", "0.05"}},
			{"gateway, fragments", f.stack, []string{"-c", "1", "-s", "5000"}},
		} {
			t.Run(row.name, func(t *testing.T) {
				out, err := s.command(path, append(row.args, "-W", "3", row.to.String())...)
				if err != nil || !bytes.Contains(out, []byte(" 0% packet loss")) {
					t.Errorf("ping: %v\n%s", err, out)
				}
			})
		}
	})
}

// TestPingProhibited: where the host allows no echo request, the program is told so. It is never answered on the server's behalf.
func TestPingProhibited(t *testing.T) {
	path := need.Program(t, "ping")
	s := newScene(t, sceneOptions{})
	newServerSpace(t, 1500)
	need.AllGroups(t)
	allowPing(t, "1 0")
	eachFamily(t, func(t *testing.T, f family) {
		s.block(f, layers.ALEAuthConnect)
		out, err := s.command(path, "-c", "1", "-W", "2", f.far.String())
		if err == nil || !(bytes.Contains(out, []byte("iltered")) || bytes.Contains(out, []byte("rohibited"))) {
			t.Errorf("ping: %v, want it told that this is prohibited\n%s", err, out)
		}
	})
}

// recvErrors makes the program's socket tell of every ICMP error.
func recvErrors(t testing.TB, f family, c *net.UDPConn) {
	t.Helper()
	level, opt := unix.IPPROTO_IP, unix.IP_RECVERR
	if f.v == layers.V6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, 1) })
	if err != nil {
		t.Fatal(err)
	}
}
