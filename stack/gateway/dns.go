package gateway

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/wfpstack/wfpstack/internal/wire"
)

// The stack's own addresses answer DNS. A look-up is no connection: it is not authorised as one, but decided by its name, in the
// handler, and recorded there.

// isDNS reports whether a destination is the stack's DNS.
func (g *Gateway) isDNS(remote netip.AddrPort) bool {
	return g.opts.DNS != nil && remote.Port() == dnsPort && g.isStackAddr(remote.Addr())
}

// queryDNS hands a query over UDP to the handler. The answer comes back through the loop's queue.
func (l *loop) queryDNS(p *packet) {
	local, remote := p.local, p.remote
	if !l.outboundPacket(p, &subject{proto: wire.UDP, local: local, remote: remote}) {
		return
	}
	l.g.opts.DNS.HandleDNS(p.payload(), local, false, func(answer []byte) {
		if answer != nil {
			l.post(func() { l.answerDNS(local, remote, answer) }) // a full queue loses a datagram
		}
	})
}

// answerDNS sends an answer over UDP to the program.
func (l *loop) answerDNS(local, remote netip.AddrPort, answer []byte) {
	if len(answer) > maxUDPPayload {
		l.g.counters.drop(dropMalformed) // no datagram is that long
		return
	}
	slot := make([]byte, headroom+len(answer))
	copy(slot[headroom:], answer)
	f := &datagramFlow{l: l, who: subject{proto: wire.UDP, local: local, remote: remote}}
	l.deliverUDP(f, slot, len(answer))
}

// maxUDPPayload is the longest payload of a datagram over IPv4. Units: bytes.
const maxUDPPayload = 65507

// dnsStream answers queries over one TCP connection, in the order the answers come.
//
// Source: RFC 7766, 6.
type dnsStream struct {
	f       *tcpFlow
	in      []byte // bytes of a query that is not complete
	out     []byte // answers that netstack had no room for
	waiting int    // queries without an answer
	ended   bool   // the program sent its last query
	begun   bool   // counted in loop.dnsStreams
	active  time.Time
	lost    atomic.Int32 // queries that ended when the loop's queue was full
}

// maxDNSQueries bounds the queries of one connection that are under way, maxDNSPending the answers not taken, maxDNSStreams the
// connections: a look-up is not authorised as a connection, and must not fill the table of flows. Units: queries, bytes,
// connections.
const (
	maxDNSQueries = 32
	maxDNSPending = 128 << 10
	maxDNSStreams = 256
)

// dnsIdle is how long a connection may be without a query under way and without an answer taken. Source: RFC 7766, 6.2.3.
const dnsIdle = 10 * time.Second

func newDNSStream(f *tcpFlow) *dnsStream { return &dnsStream{f: f} }

// dnsWriter collects what the program sent.
type dnsWriter struct{ s *dnsStream }

// Write implements io.Writer.
func (w dnsWriter) Write(b []byte) (int, error) {
	w.s.in = append(w.s.in, b...)
	return len(b), nil
}

// pump reads queries and writes answers. It runs on the loop.
func (s *dnsStream) pump() {
	f := s.f
	if f.programError() {
		f.reset("program: connection reset") // also while no more queries are read
		return
	}
	if !s.begun && !s.begin() {
		return
	}
	s.waiting -= int(s.lost.Swap(0))
	s.write()
	s.queries()
	for f.state == stateOpen && s.waiting < maxDNSQueries && len(s.out) < maxDNSPending && len(s.in) < 1<<17 {
		res, err := f.ep.Read(dnsWriter{s}, tcpip.ReadOptions{})
		f.relay.bytesOut += uint64(res.Count)
		s.queries()
		if err == nil && res.Count > 0 {
			continue
		}
		switch err.(type) {
		case nil, *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			s.ended = true
		default:
			f.reset("program: " + err.String())
		}
		break
	}
	s.finish()
}

// begin counts the connection and watches it, or refuses it.
func (s *dnsStream) begin() bool {
	l := s.f.l
	if l.dnsStreams >= maxDNSStreams {
		l.g.counters.drop(dropTableFull)
		s.f.reset("too many connections to the stack's DNS")
		return false
	}
	s.begun, s.active = true, l.now
	l.dnsStreams++
	s.f.timer = l.after(dnsIdle, s.watch)
	return true
}

// watch ends the connection when it was idle for long enough. Only an answer counts: who sends what has none, or half a query,
// does not stay for that.
func (s *dnsStream) watch() {
	l := s.f.l
	switch left := dnsIdle - l.now.Sub(s.active); {
	case s.waiting > 0:
		s.f.timer = l.after(dnsIdle, s.watch)
	case left > 0:
		s.f.timer = l.after(left, s.watch)
	case len(s.out) > 0:
		s.f.reset("the program takes no answers")
	default:
		s.f.relay.detail = "idle"
		s.f.end()
	}
}

// release takes the connection out of the count.
func (s *dnsStream) release() {
	if s.begun {
		s.begun = false
		s.f.l.dnsStreams--
	}
}

// queries takes the complete ones.
func (s *dnsStream) queries() {
	f := s.f
	for len(s.in) >= 2 && s.waiting < maxDNSQueries {
		n := int(binary.BigEndian.Uint16(s.in))
		if len(s.in) < 2+n {
			return
		}
		msg := append([]byte{}, s.in[2:2+n]...) // not nil, however short
		s.in = append(s.in[:0], s.in[2+n:]...)
		s.waiting++
		var replied atomic.Bool
		f.l.g.opts.DNS.HandleDNS(msg, f.who.local, true, func(answer []byte) {
			if replied.Swap(true) {
				return
			}
			if !f.l.post(func() { s.answered(answer) }) {
				s.lost.Add(1)
				f.l.markDirty(f)
			}
		})
	}
}

// answered queues one answer; nil is none.
func (s *dnsStream) answered(answer []byte) {
	if s.f.state != stateOpen {
		return
	}
	s.waiting--
	switch {
	case answer == nil:
	case len(answer) > 0xffff:
		s.f.reset("an answer longer than DNS can say")
		return
	default:
		s.active = s.f.l.now
		s.out = binary.BigEndian.AppendUint16(s.out, uint16(len(answer)))
		s.out = append(s.out, answer...)
	}
	s.pump()
}

// write gives netstack what it takes.
func (s *dnsStream) write() {
	f := s.f
	for len(s.out) > 0 {
		scratch := &f.l.g.relay.reader
		scratch.Reset(s.out)
		n, err := f.ep.Write(scratch, tcpip.WriteOptions{Atomic: true})
		s.out = append(s.out[:0], s.out[n:]...)
		f.relay.bytesIn += uint64(n)
		if n > 0 {
			s.active = f.l.now
		}
		if err != nil || n == 0 {
			return // full: netstack tells when there is room; gone: the read tells
		}
	}
}

// finish ends the connection once all is answered.
func (s *dnsStream) finish() {
	if s.ended && s.waiting == 0 && len(s.out) == 0 && s.f.state == stateOpen {
		s.f.end()
	}
}

// sliceOf is the memory that an iovec describes.
func sliceOf(v unix.Iovec) []byte { return unsafe.Slice(v.Base, v.Len) }
