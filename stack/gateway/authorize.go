package gateway

import (
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// newConnection authorises a SYN.
func (l *loop) newConnection(key flowKey, p *packet) {
	g := l.g
	who := subject{proto: wire.TCP, local: p.local, remote: p.remote}
	if oldest := g.silent.Front(); len(g.tcp) >= g.opts.MaxFlows && oldest != nil {
		oldest.Value.(*tcpFlow).end() // nobody waits for it
	}
	switch {
	case len(g.tcp) >= g.opts.MaxFlows, g.embryonic >= g.opts.MaxPending:
		g.counters.drop(dropTableFull)
		return
	case g.perSource[p.local.Addr()] >= g.opts.MaxPendingPerSource:
		g.counters.drop(dropSourceFull)
		return
	}
	f := &tcpFlow{key: key, who: who, l: l, fd: -1, isn: header.TCP(p.transport).SequenceNumber(), seen: l.now, started: l.now, mark: p.mark}
	f.who.flow = g.newFlow(func() { f.reset("aborted by a callout") })
	f.syn = p.buf.Clone()
	g.tcp[key] = f
	g.sizeBuffers()
	f.countEmbryonic(1)
	if g.isDNS(who.remote) {
		f.relay.dns = newDNSStream(f)
		f.connected()
		return
	}
	if d := l.assignResource(&f.who); d.Blocked() {
		f.refuse(p, layers.ALEResourceAssignment, &d)
		return
	}
	d := l.authorizeConnect(f, 0)
	f.decided(p, &d)
}

// countEmbryonic counts f among the connections that are not open.
func (f *tcpFlow) countEmbryonic(by int) {
	g := f.l.g
	g.embryonic += by
	g.counters.embryonic.Store(int64(g.embryonic))
	src := f.who.local.Addr()
	if g.perSource[src] += by; g.perSource[src] == 0 {
		delete(g.perSource, src)
	}
}

// decided acts on the decision at auth connect. p is the SYN, nil after a pend.
func (f *tcpFlow) decided(p *packet, d *layers.Decision) {
	pended := d.Blocked() && d.Absorb
	if f.op != nil && !pended {
		// A callout pended, and then the final decision was not its own: nobody waits for it.
		f.op.Cancel(layers.PendStopped)
		f.op = nil
	}
	switch {
	case f.op != nil:
		f.state = statePended
		f.watchPend()
	case pended:
		f.l.g.counters.drop(dropAbsorbed)
		f.goSilent()
	case d.Blocked():
		f.refuse(p, layers.ALEAuthConnect, d)
	default:
		f.l.g.record(layers.RecordVerdict, layers.ALEAuthConnect.Layer(f.who.family()), &f.who, d, nil)
		f.dial(p)
	}
}

// assignResource raises resource assignment for a port of a program that is seen for the first time. TCP takes a port for each
// connection, so that it is raised for each.
func (l *loop) assignResource(who *subject) layers.Decision {
	id := layers.ALEResourceAssignment.Layer(who.family())
	if !l.g.wanted(id) {
		return layers.Decision{Action: layers.Permit}
	}
	s := &l.g.loopScratch
	l.g.fill(s, layers.ALEResourceAssignment, who, layers.Outbound)
	return l.g.decide(s)
}

// authorizeConnect raises auth connect, for op ≠ 0 as the classification that a completion causes.
func (l *loop) authorizeConnect(f *tcpFlow, op layers.OperationID) layers.Decision {
	g := l.g
	s := &g.loopScratch
	in := g.fill(s, layers.ALEAuthConnect, &f.who, layers.Outbound)
	if op == 0 {
		in.Pender = f
		in.Meta.Mark(layers.MetaCompletionHandle)
	} else {
		in.Meta.Operation = op
		in.Meta.PacketDirection = layers.Outbound
		in.Meta.Mark(layers.MetaOperationID, layers.MetaPacketDirection)
		in.Values.SetNum(layers.FieldFlags, uint64(layers.FlagIsReauthorize))
		in.Values.SetNum(layers.FieldReauthorizeReason, uint64(layers.ReauthClassifyCompletion))
	}
	d := g.decide(s)
	g.guard(&d, f.who.remote.Addr())
	return d
}

// guard refuses what the gateway does not allow on its own account.
func (g *Gateway) guard(d *layers.Decision, remote netip.Addr) {
	if d.Blocked() {
		return
	}
	if !g.opts.HostLoopback && g.isStackAddr(remote) {
		g.refuseFor(d, layers.ReasonLoopbackGuard)
		return
	}
	if g.opts.Guard == nil {
		return
	}
	if r := g.opts.Guard.Check(remote, d); r != layers.ReasonNone {
		g.refuseFor(d, r)
	}
}

// refuseFor makes a decision the gateway's own.
func (*Gateway) refuseFor(d *layers.Decision, r layers.Reason) {
	d.Action, d.Hard, d.Reason = layers.Block, true, r
	d.Filter, d.FilterName, d.Sublayer, d.SublayerName = 0, "", 0, ""
}

// Pend implements layers.Pender: it suspends this connect. It is called from Classify, on the loop.
func (f *tcpFlow) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	if f.op != nil {
		return f.op, nil
	}
	l := f.l
	f.holder = holder
	f.op = layers.NewPendedOp(l.g.opID(), layers.ALEAuthConnect.Layer(f.who.family()), holder, l.g.opts.Ledger, func(op *layers.PendedOp, c *layers.Clone) {
		c.Release() // a TCP connect has no packet
		l.post(func() { f.completed(op) })
	})
	return f.op, nil
}

// watchPend records a pend and looks after it until it ends: its deadline, and whether the program still waits. A program that
// closes in SYN_SENT sends nothing; its kernel tells, or its retransmissions stop.
func (f *tcpFlow) watchPend() {
	l := f.l
	l.g.counters.pended.Add(1)
	l.g.record(layers.RecordPend, f.op.Layer(), &f.who, nil, func(r *layers.Record) { r.Operation, r.Detail = f.op.ID(), f.holder })
	deadline := time.Time{}
	if l.g.opts.PendDeadline > 0 {
		deadline = l.now.Add(l.g.opts.PendDeadline)
	}
	var look func()
	look = func() {
		switch {
		case f.state != statePended:
			return
		case !deadline.IsZero() && !l.now.Before(deadline):
			f.endPend(layers.PendDeadline)
			d := layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout}
			f.refuse(nil, layers.ALEAuthConnect, &d)
			return
		case f.programGone():
			f.abandon("the program gave up")
			return
		}
		next := pendCheck
		if !deadline.IsZero() {
			next = min(next, deadline.Sub(l.now))
		}
		f.timer = l.after(max(next, time.Millisecond), look)
	}
	look()
}

// pendCheck is how often a pended connect is checked for a program that gave up.
const pendCheck = time.Second

// programGone reports whether nobody waits for this connect any more.
func (f *tcpFlow) programGone() bool {
	if s := f.l.g.opts.Sockets; s != nil {
		if exists, known := s.Connecting(f.who.local, f.who.remote); known {
			return !exists
		}
	}
	return f.l.now.Sub(f.seen) > synInterval
}

// endPend ends the operation in every record of it. It reports whether this was its end.
func (f *tcpFlow) endPend(cause layers.PendCause) {
	op := f.op
	if op == nil {
		return
	}
	f.op = nil
	op.Cancel(cause)
	g := f.l.g
	g.counters.pended.Add(-1)
	g.record(layers.RecordPendEnd, op.Layer(), &f.who, nil, func(r *layers.Record) {
		r.Operation, r.PendCause, r.Duration = op.ID(), op.Cause(), f.l.now.Sub(f.started)
	})
}

// completed runs on the loop after the callout completed op: the connect is authorised once more, and that decides.
func (f *tcpFlow) completed(op *layers.PendedOp) {
	if f.state != statePended || f.op != op {
		return
	}
	f.endPend(layers.PendCompleted)
	f.l.stop(f.timer)
	d := f.l.authorizeConnect(f, op.ID())
	if d.Blocked() && d.Reason == layers.ReasonCallout {
		d.Reason = layers.ReasonPendDenied
	}
	f.decided(nil, &d)
}

// refuse ends a connection that is not allowed: the program sees a refusal, or silence where the filter asks for that.
func (f *tcpFlow) refuse(p *packet, kind layers.Kind, d *layers.Decision) {
	l := f.l
	l.g.record(layers.RecordVerdict, kind.Layer(f.who.family()), &f.who, d, nil)
	l.g.counters.drop(dropPolicy)
	if d.Silent {
		f.goSilent()
		return
	}
	f.sendRefusal(syscall.ECONNREFUSED)
	f.end()
}

// goSilent keeps the connection so that its retransmitted SYNs are dropped until the program's kernel gives up.
func (f *tcpFlow) goSilent() {
	f.l.stop(f.timer)
	f.closeHost()
	f.dropSYN()
	f.countEmbryonic(-1) // nobody waits for it; it must not take the place of a connect that may succeed
	f.state = stateSilent
	f.silent = f.l.g.silent.PushBack(f)
	f.timer = f.l.after(silentTime, f.end)
}

func (f *tcpFlow) dropSYN() {
	if f.syn != nil {
		f.syn.DecRef()
		f.syn = nil
	}
}

// sendRefusal answers the SYN so that the program's kernel reports errno.
//
// Source: RFC 9293, 3.10.7.1 (reset); RFC 1122, 4.2.3.9 and Linux icmp_err_convert (unreachable).
func (f *tcpFlow) sendRefusal(errno syscall.Errno) {
	if f.syn == nil {
		return
	}
	p := packetOf(f.syn)
	switch errno {
	case syscall.ENETUNREACH:
		f.l.replyUnreachable(&p, unreachNet, 0)
	case syscall.EHOSTUNREACH:
		f.l.replyUnreachable(&p, unreachHost, 0)
	case syscall.EACCES, syscall.EPERM:
		f.l.replyUnreachable(&p, unreachProhibited, 0)
	default:
		f.l.replyReset(&p)
	}
}
