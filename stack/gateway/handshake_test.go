package gateway

import (
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// segment waits for the next TCP segment of one of some kinds, whatever comes in between.
func (b *bench) segment(t testing.TB, want header.TCPFlags) (wire.Header, header.TCP) {
	t.Helper()
	for {
		p := b.next()
		if p == nil {
			t.Fatalf("no segment with flags %v", want)
		}
		h, err := wire.Parse(p)
		if err == nil && h.Protocol == wire.TCP && header.TCP(p[h.TransportStart:]).Flags().Contains(want) {
			return h, header.TCP(p[h.TransportStart:])
		}
	}
}

// TestHandshakeThatIsAbandoned: the program's SYN was answered, and then it begins anew, resets, or says nothing more.
func TestHandshakeThatIsAbandoned(t *testing.T) {
	b := newBench(t, Options{HostLoopback: true})
	need.Root(t)
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		src, dst := addrPort(f.prog, 4444), portOf(f, l.Addr())
		server := func() *net.TCPConn {
			t.Helper()
			c, err := l.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			return c
		}
		const synAck = header.TCPFlagSyn | header.TCPFlagAck
		b.inject(tcpPacket(src, dst, header.TCPFlagSyn, 1000, 0, nil))
		first := server()
		if _, seg := b.segment(t, synAck); seg.AckNumber() != 1001 {
			t.Errorf("the answer acknowledges %d, want 1001", seg.AckNumber())
		}
		// Anew, with another sequence number: the server's side of the first is reset, the second is answered at once.
		b.inject(tcpPacket(src, dst, header.TCPFlagSyn, 900_000, 0, nil))
		second := server()
		for {
			if _, seg := b.segment(t, synAck); seg.AckNumber() == 900_001 {
				break
			}
		}
		if n, err := first.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("the server of the abandoned connect read %d, %v, want a reset", n, err)
		}
		first.Close()
		// A reset ends it.
		b.inject(tcpPacket(src, dst, header.TCPFlagRst, 900_001, 0, nil))
		if n, err := second.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("the server of the reset connect read %d, %v, want a reset", n, err)
		}
		second.Close()
		until(t, "end of the flow", func() bool { return b.g.Stats().Embryonic == 0 })
		// Silence ends it too.
		b.inject(tcpPacket(src, dst, header.TCPFlagSyn, 2000, 0, nil))
		third := server()
		b.segment(t, synAck)
		b.clk.ahead.Add(int64(handshakeTimeout + time.Second))
		b.settle()
		if n, err := third.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("the server of the silent connect read %d, %v, want a reset", n, err)
		}
		third.Close()
		if st := b.g.Stats(); st.Flows != 0 || st.Embryonic != 0 {
			t.Errorf("left: %+v", st)
		}
		if n := b.log.count(layers.RecordFlow); n != 0 {
			t.Errorf("%d flows were established", n)
		}
	})
}

// TestDataWithTheLastAcknowledgement: the handshake's last segment carries the request, and is not lost.
func TestDataWithTheLastAcknowledgement(t *testing.T) {
	b := newBench(t, Options{HostLoopback: true})
	need.Root(t)
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		src, dst := addrPort(f.prog, 4445), portOf(f, l.Addr())
		b.inject(tcpPacket(src, dst, header.TCPFlagSyn, 1000, 0, nil))
		_, seg := b.segment(t, header.TCPFlagSyn|header.TCPFlagAck)
		b.inject(tcpPacket(src, dst, header.TCPFlagAck|header.TCPFlagPsh|header.TCPFlagFin, 1001, seg.SequenceNumber()+1, []byte("request")))
		c, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if got, err := io.ReadAll(c); err != nil || string(got) != "request" {
			t.Errorf("the server read %q, %v", got, err)
		}
	})
}

// TestServerThatResetsAtOnce: accepted and reset before the gateway looked; the program is connected and then reset.
func TestServerThatResetsAtOnce(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		done := make(chan struct{})
		// Owner: this test, which closes the listener and waits.
		go func() {
			defer close(done)
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte("banner"))
				_ = c.SetLinger(0)
				c.Close()
			}
		}()
		for range 100 {
			c, err := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr())).wait(patience)
			if errnoOf(err) == syscall.ECONNRESET {
				continue // the reset came before we looked at the connect
			}
			if err != nil {
				t.Fatalf("connect: %v, want it to succeed: the server answered", err)
			}
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if got, err := io.ReadAll(c); err == nil {
				t.Errorf("read %q and EOF, want a reset", got)
			}
			c.Close()
		}
		l.Close()
		<-done
	})
}

// TestStormOfConnectsAndBlocks: a callout comes and goes while programs connect and give up; nothing is left of any (INS-16).
func TestStormOfConnectsAndBlocks(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		done := make(chan struct{})
		// Owner: this test, which closes the listener and waits.
		go func() {
			defer close(done)
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		h := &holder{}
		h.verdict.Store(uint32(layers.Permit))
		for i := range 40 {
			reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
			var dials []*pendingDial
			for range 10 {
				dials = append(dials, s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr())))
			}
			s.remove(t, reg)
			h.mu.Lock()
			for _, op := range h.ops {
				_ = op.Complete(nil) // may have been completed in the last round
			}
			h.ops = nil
			h.mu.Unlock()
			for j, d := range dials {
				if i%4 == j%4 {
					d.giveUp()
					continue
				}
				if c, err := d.wait(patience); err == nil {
					c.Close()
				}
			}
		}
		h.mu.Lock()
		for _, op := range h.ops {
			_ = op.Complete(nil)
		}
		h.mu.Unlock()
		until(t, "end of all flows", func() bool { st := s.g.Stats(); return st.Flows == 0 && st.Embryonic == 0 && st.Pended == 0 })
		l.Close()
		<-done
	})
}
