package host

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

func TestTCPCarriesBytesBothWays(t *testing.T) {
	for _, tso := range []bool{false, true} {
		eachFamily(t, func(t *testing.T, f family) {
			o := pairOptions{}
			o.device.TSO = tso
			a, b := pair(t, o)
			c, s := connected(t, a, b, f)
			for _, d := range []struct{ from, to *Conn }{{c, s}, {s, c}} {
				if _, err := d.from.Write([]byte("hello")); err != nil {
					t.Fatalf("write: %v", err)
				}
				buf := make([]byte, 5)
				if _, err := io.ReadFull(d.to, buf); err != nil || string(buf) != "hello" {
					t.Fatalf("read %q, %v", buf, err)
				}
			}
			if c.LocalAddr().String() != s.RemoteAddr().String() || c.RemoteAddr().String() != s.LocalAddr().String() {
				t.Errorf("client %v–%v, server %v–%v", c.LocalAddr(), c.RemoteAddr(), s.LocalAddr(), s.RemoteAddr())
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatalf("CloseWrite: %v", err)
			}
			if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("read after half-close = %d, %v, want EOF", n, err)
			}
			if _, err := s.Write([]byte("late")); err != nil {
				t.Errorf("write to a half-closed connection: %v", err)
			}
			buf := make([]byte, 4)
			if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "late" {
				t.Errorf("read %q, %v", buf, err)
			}
		})
	}
}

func TestUDPCarriesDatagrams(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		server := b.packets(t, "udp", ":5353")
		c, err := a.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 5353).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		for _, size := range []int{0, 1, 1400, 9000, maxDatagram} {
			if f.v == layers.V6 && size == maxDatagram {
				size -= 20 // what a packet of 65535 bytes leaves
			}
			out := pattern(size, int64(size))
			if n, err := c.Write(out); err != nil || n != size {
				t.Fatalf("write %d bytes: %d, %v", size, n, err)
			}
			buf := make([]byte, 70000)
			n, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil || string(buf[:n]) != string(out) {
				t.Fatalf("%d bytes sent, %d came, %v", size, n, err)
			}
			if _, err := server.WriteToUDPAddrPort(buf[:n], from); err != nil {
				t.Fatalf("reply of %d bytes: %v", n, err)
			}
			if n, err := c.Read(buf); err != nil || string(buf[:n]) != string(out) {
				t.Fatalf("reply to %d bytes: %d, %v", size, n, err)
			}
		}
		if _, err := c.Write(make([]byte, maxDatagram+1)); !errors.Is(err, syscall.EMSGSIZE) {
			t.Errorf("write of %d bytes = %v, want EMSGSIZE", maxDatagram+1, err)
		}
	})
}

func TestUDPClosedPortIsRefused(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, _ := pair(t, pairOptions{})
		c, err := a.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 9).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("read = %v, want ECONNREFUSED", err)
		}
	})
}

func TestBlockedConnectIsRefusedAndSaysWhy(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 8000).String())
		a.add(t, layers.ALEAuthConnect, filter.Filter{Name: "no web", Action: filter.ActionBlock, Conditions: []filter.Condition{remotePort(8000)}})
		_, err := a.DialContext(withTimeout(t), "tcp", l.Addr().String())
		var op *net.OpError
		var blocked *BlockedError
		switch {
		case !errors.Is(err, syscall.ECONNREFUSED):
			t.Fatalf("dial = %v, want ECONNREFUSED", err)
		case !errors.As(err, &op) || op.Op != "dial" || op.Net != "tcp" || op.Addr.String() != l.Addr().String():
			t.Errorf("error %#v is no dial error of %v", err, l.Addr())
		case !errors.As(err, &blocked) || blocked.Decision.FilterName != "no web" || blocked.Layer != layers.ALEAuthConnect.Layer(f.v):
			t.Errorf("error %v does not name the filter", err)
		}
		if got := b.log.indications(layers.InboundIPPacket); len(got) != 0 {
			t.Errorf("%d packets left although the connect was blocked", len(got))
		}
		if r := a.log.recorded(layers.RecordVerdict); len(r) == 0 || r[len(r)-1].Decision.FilterName != "no web" || r[len(r)-1].Decision.Reason != layers.ReasonFilter {
			t.Errorf("records %+v", r)
		}
		if n := a.Stats().Flows; n != 0 {
			t.Errorf("%d flows after a blocked connect", n)
		}
	})
}

func TestBlockedOperations(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name string
			kind layers.Kind
			do   func(a *side) error
			want syscall.Errno
		}{
			{"bind", layers.ALEResourceAssignment, func(a *side) error {
				_, err := a.ListenPacket("udp", netip.AddrPortFrom(f.a, 53).String())
				return err
			}, syscall.EACCES},
			{"listen", layers.ALEAuthListen, func(a *side) error {
				_, err := a.Listen(withTimeout(t), "tcp", netip.AddrPortFrom(f.a, 80).String())
				return err
			}, syscall.EACCES},
			{"datagram", layers.ALEAuthConnect, func(a *side) error {
				c, err := a.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 53).String())
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("x"))
				return err
			}, map[layers.Family]syscall.Errno{layers.V4: syscall.EHOSTUNREACH, layers.V6: syscall.EACCES}[f.v]},
		} {
			t.Run(c.name, func(t *testing.T) {
				a, _ := pair(t, pairOptions{})
				a.add(t, c.kind, filter.Filter{Name: "no " + c.name, Action: filter.ActionBlock})
				err := c.do(a)
				var blocked *BlockedError
				if !errors.Is(err, c.want) || !errors.As(err, &blocked) || blocked.Layer.Kind() != c.kind {
					t.Errorf("%v, want %v of %v", err, c.want, c.kind)
				}
				eventually(t, "sockets are gone", func() bool { return len(a.allSockets(false)) == 0 })
			})
		}
	})
}

func TestBlockedInboundConnection(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, silent := range []bool{false, true} {
			a, b := pair(t, pairOptions{})
			l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 22).String())
			b.add(t, layers.ALEAuthRecvAccept, filter.Filter{Name: "no ssh", Action: filter.ActionBlock, Silent: silent, Conditions: []filter.Condition{localPort(22)}})
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			want := error(syscall.ECONNREFUSED)
			if silent {
				cancel()
				ctx, cancel = context.WithTimeout(context.Background(), 300*time.Millisecond)
				want = context.DeadlineExceeded
			}
			_, err := a.DialContext(ctx, "tcp", l.Addr().String())
			cancel()
			if !errors.Is(err, want) {
				t.Errorf("silent %v: dial = %v, want %v", silent, err, want)
			}
			if n := b.Stats().Flows; n != 0 {
				t.Errorf("silent %v: %d flows", silent, n)
			}
		}
	})
}

func TestBlockedInboundDatagramIsProhibited(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
		b.add(t, layers.ALEAuthRecvAccept, filter.Filter{Name: "no dns", Action: filter.ActionBlock})
		c, err := a.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 53).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		// Netstack has no errno for "prohibited"; the message itself is what other kernels go by.
		want := byte(3)
		if f.v == layers.V6 {
			want = 1
		}
		eventually(t, "an ICMP error comes", func() bool {
			for _, s := range a.log.indications(layers.InboundIPPacket) {
				if h := icmpHeader(s.packet); h != nil && h[0] == want {
					return h[1] == 13 || f.v == layers.V6 && h[1] == 1
				}
			}
			return false
		})
	})
}

// icmpHeader returns the ICMP header of a packet, nil if it is of another protocol.
func icmpHeader(p []byte) []byte {
	switch {
	case len(p) > 28 && p[0]>>4 == 4 && p[9] == 1:
		return p[20:]
	case len(p) > 48 && p[0]>>4 == 6 && p[6] == 58:
		return p[40:]
	default:
		return nil
	}
}

func TestErrorsAreThoseOfPackageNet(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		c, s := connected(t, a, b, f)
		check := func(what string, err, want error) {
			t.Helper()
			var op *net.OpError
			if !errors.Is(err, want) || !errors.As(err, &op) {
				t.Errorf("%s = %v (%T), want a *net.OpError with %v", what, err, err, want)
			}
		}
		c.SetReadDeadline(time.Now().Add(-time.Second))
		_, err := c.Read(make([]byte, 1))
		check("read after its deadline", err, os.ErrDeadlineExceeded)
		var ne net.Error
		if !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%v is no timeout", err)
		}
		c.SetReadDeadline(time.Time{})
		_, err = a.DialContext(withTimeout(t), "tcp", netip.AddrPortFrom(f.b, 1).String())
		check("dial to a closed port", err, syscall.ECONNREFUSED)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, err = a.DialContext(ctx, "tcp", netip.AddrPortFrom(f.b, 1).String())
		check("dial with a cancelled context", err, context.Canceled)
		_, err = b.Listen(context.Background(), "tcp", s.LocalAddr().String())
		check("second listener", err, syscall.EADDRINUSE)
		_, err = a.Listen(context.Background(), "tcp", netip.AddrPortFrom(f.other, 80).String())
		check("listener on another's address", err, syscall.EADDRNOTAVAIL)
		c.SetLinger(0)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		_, err = c.Read(make([]byte, 1))
		check("read after Close", err, net.ErrClosed)
		_, err = c.Write(make([]byte, 1))
		check("write after Close", err, net.ErrClosed)
		check("second Close", c.Close(), net.ErrClosed)
		_, err = s.Read(make([]byte, 1))
		check("read after a reset", err, syscall.ECONNRESET)
		l := b.listen(t, "tcp", ":0")
		ch := accept(l)
		l.Close()
		check("Accept after Close", (<-ch).err, net.ErrClosed)
	})
}

func TestCloseUnblocksEverything(t *testing.T) {
	a, b := pair(t, pairOptions{})
	f := families[0]
	c, _ := connected(t, a, b, f)
	l := a.listen(t, "tcp", ":0")
	p := a.packets(t, "udp", ":0")
	errs := make(chan error, 4) // one for each goroutine below
	go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := l.Accept(); errs <- err }()
	go func() { _, _, err := p.ReadFrom(make([]byte, 1)); errs <- err }()
	go func() {
		_, err := a.DialContext(context.Background(), "tcp", netip.AddrPortFrom(f.other, 80).String())
		errs <- err
	}()
	eventually(t, "the connect is under way", func() bool { return a.Stats().Flows >= 2 })
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := <-errs; err == nil {
			t.Error("a call returned without an error although the stack was closed")
		}
	}
	if _, err := a.DialContext(context.Background(), "tcp", "198.18.0.2:80"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial after Close = %v, want net.ErrClosed", err)
	}
}

// pattern returns bytes that tell their position.
func pattern(n int, seed int64) []byte {
	b := make([]byte, n)
	for i := range b {
		x := uint64(i+1)*0x9e3779b97f4a7c15 + uint64(seed)
		b[i] = byte(x >> 56)
	}
	return b
}
