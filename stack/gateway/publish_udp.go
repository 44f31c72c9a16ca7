package gateway

import (
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// receive takes datagrams of clients and passes them to the program.
func (p *publishedPort) receive() {
	s := &p.l.g.dgram
	for range datagramsPerTurn {
		slot := s.bufs[:recvSlot]
		n, sa, err := unix.Recvfrom(p.fd, slot[headroom:], unix.MSG_DONTWAIT)
		if err != nil {
			return // EAGAIN; errors of clients that went away concern nobody here
		}
		if f := p.flowOf(addrPortOf(sa)); f != nil {
			f.used = p.l.now
			f.bytesIn += uint64(n)
			p.l.deliverUDP(f, slot, n)
		}
	}
}

// flowOf finds or makes the flow of a client. It is authorised by its first datagram.
func (p *publishedPort) flowOf(client netip.AddrPort) *datagramFlow {
	l := p.l
	t := &l.g.datagrams
	shown := p.clientAddr(client)
	key := keyOf(wire.UDP, p.Program, shown)
	if f := t.flows[key]; f != nil {
		t.lru.MoveToFront(f.lru)
		return f
	}
	if len(t.flows) >= t.max {
		l.g.counters.drop(dropTableFull)
		t.lru.Back().Value.(*datagramFlow).end("made room for a newer flow")
	}
	f := &datagramFlow{key: key, l: l, fd: -1, idle: idleOther, opened: l.now, used: l.now, port: p, client: client}
	f.who = subject{proto: wire.UDP, local: p.Program, remote: shown, inbound: true}
	f.who.flow = l.g.newFlow(func() { f.end("aborted by a callout") })
	f.enter()
	return f
}

// authorizeAccept raises auth recv-accept for the first datagram of a client, after inbound network and inbound transport. It
// reports whether the datagram may go on.
func (f *datagramFlow) authorizeAccept(s *scratch, v layers.PacketView) bool {
	g := f.l.g
	id := layers.ALEAuthRecvAccept.Layer(f.who.family())
	if !g.wanted(id) {
		f.accepted = true
		return f.establish()
	}
	in := g.fill(s, layers.ALEAuthRecvAccept, &f.who, layers.Inbound)
	in.Pender = datagramAcceptPender{f}
	in.Meta.Mark(layers.MetaCompletionHandle)
	g.lend(s, v)
	d := g.decide(s)
	if d.Blocked() && d.Absorb {
		if f.op != nil {
			g.counters.drop(dropPended)
			return false
		}
		g.counters.drop(dropAbsorbed)
		f.end("")
		return false
	}
	if f.op != nil {
		f.endPend(layers.PendStopped) // a callout pended, and then the final decision was not its own
	}
	return f.acceptDecided(&d)
}

// acceptDecided acts on the decision about a client.
func (f *datagramFlow) acceptDecided(d *layers.Decision) bool {
	g := f.l.g
	g.record(layers.RecordVerdict, layers.ALEAuthRecvAccept.Layer(f.who.family()), &f.who, d, func(r *layers.Record) { r.Original = f.client })
	if d.Blocked() {
		g.counters.drop(dropPolicy)
		f.end("")
		return false
	}
	f.accepted = true
	return f.establish()
}

// datagramAcceptPender suspends the acceptance of a client's datagrams.
type datagramAcceptPender struct{ f *datagramFlow }

// Pend implements layers.Pender. The datagram at hand and those that follow are the callout's to clone.
func (a datagramAcceptPender) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	f := a.f
	return f.pend(layers.ALEAuthRecvAccept.Layer(f.who.family()), holder, func(op *layers.PendedOp, c *layers.Clone) {
		if !f.l.post(func() { f.acceptCompleted(op, c, holder) }) {
			c.Release()
		}
	})
}

// acceptCompleted runs on the loop after the callout completed op, as that of a connection does.
func (f *datagramFlow) acceptCompleted(op *layers.PendedOp, c *layers.Clone, holder string) {
	defer c.Release()
	if f.op != op || f.lru == nil {
		return
	}
	f.endPend(layers.PendCompleted)
	if c == nil {
		f.acceptDecided(&layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendDenied})
		return
	}
	t, err := c.Take("accept completion")
	if err != nil {
		f.end(err.Error())
		return
	}
	defer t.Done()
	g := f.l.g
	err = f.l.injectReceive(t, g.inject.markFor(holder, t.Mark), func(s *scratch, v layers.PacketView) bool {
		d := g.authorizeCompleted(s, &f.who, v, op)
		return f.acceptDecided(&d)
	})
	if err != nil && !f.accepted {
		f.end(err.Error())
	}
}

// sendTo sends a program's answer to a client of a published port.
func (p *publishedPort) sendTo(f *datagramFlow, pkt *packet) {
	b := pkt.payload()
	switch err := unix.Sendto(p.fd, b, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, sockaddr(f.client)); err {
	case nil:
		f.bytesOut += uint64(len(b))
	case syscall.EMSGSIZE:
		p.l.replyUnreachable(pkt, unreachTooBig, 1280)
		p.l.g.counters.drop(dropSend)
	default:
		p.l.g.counters.drop(dropSend)
	}
}
