package gateway

import (
	"sync"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// synGate stands where SYNs pass on their way to programs.
type synGate struct {
	connecting atomic.Pointer[tcpFlow] // whose SYN the loop is sending

	mu sync.Mutex
	// held are the connections whose SYN must not leave.
	// +checklocks:mu
	held map[flowKey]struct{}
}

func (s *synGate) hold(key flowKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = make(map[flowKey]struct{})
	}
	s.held[key] = struct{}{}
}

func (s *synGate) letGo(key flowKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, key)
}

func (s *synGate) holds(key flowKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, held := s.held[key]
	return held
}

// inboundSYN reports whether a SYN towards a program may leave. The first SYN of a connection, which is sent below Connect on
// the loop, is authorised; one that netstack's timer sends again goes the way of the first.
func (g *Gateway) inboundSYN(s *scratch, who *subject, v layers.PacketView) bool {
	key := keyOf(wire.TCP, who.local, who.remote)
	if f := g.syns.connecting.Load(); f != nil && f.key == key {
		if f.authorizeAccept(s, v) {
			return true
		}
		g.syns.hold(key)
		return false
	}
	if g.syns.holds(key) {
		g.counters.drop(dropPended)
		return false
	}
	return true
}

// authorizeAccept raises auth recv-accept for a connection from a published port, after inbound network and inbound transport.
func (f *tcpFlow) authorizeAccept(s *scratch, v layers.PacketView) bool {
	in := f.inbound
	g := f.l.g
	id := layers.ALEAuthRecvAccept.Layer(f.who.family())
	if !g.wanted(id) {
		in.decided = true
		return true
	}
	ind := g.fill(s, layers.ALEAuthRecvAccept, &f.who, layers.Inbound)
	ind.Pender = acceptPender{f}
	ind.Meta.Mark(layers.MetaCompletionHandle)
	g.lend(s, v)
	d := g.decide(s)
	if d.Blocked() && d.Absorb && f.op != nil {
		return false
	}
	if f.op != nil {
		f.endPend(layers.PendStopped) // a callout pended, and then the final decision was not its own
		f.l.stop(f.timer)
	}
	if d.Blocked() {
		in.blocked = &d
		return false
	}
	g.record(layers.RecordVerdict, id, &f.who, &d, func(r *layers.Record) { r.Original = in.client })
	in.decided = true
	return true
}

// refuseClient resets a client that is not allowed.
func (f *tcpFlow) refuseClient() {
	f.l.g.record(layers.RecordVerdict, layers.ALEAuthRecvAccept.Layer(f.who.family()), &f.who, f.inbound.blocked, func(r *layers.Record) { r.Original = f.inbound.client })
	f.l.g.counters.drop(dropPolicy)
	f.reset("blocked")
}

// acceptPender suspends the acceptance of a connection from a published port.
type acceptPender struct{ f *tcpFlow }

// Pend implements layers.Pender. It is called below Connect, on the loop.
func (a acceptPender) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	f := a.f
	if f.op != nil {
		return f.op, nil
	}
	l := f.l
	f.op = layers.NewPendedOp(l.g.opID(), layers.ALEAuthRecvAccept.Layer(f.who.family()), holder, l.g.opts.Ledger, func(op *layers.PendedOp, c *layers.Clone) {
		if !l.post(func() { f.acceptCompleted(op, c, holder) }) {
			c.Release()
		}
	})
	op := f.op
	l.g.counters.pended.Add(1)
	l.g.record(layers.RecordPend, op.Layer(), &f.who, nil, func(r *layers.Record) { r.Operation, r.Original, r.Detail = op.ID(), f.inbound.client, holder })
	if d := l.g.opts.PendDeadline; d > 0 {
		f.timer = l.after(d, func() {
			if f.op == op {
				f.endPend(layers.PendDeadline)
				f.inbound.blocked = &layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout}
				f.refuseClient()
			}
		})
	}
	return op, nil
}

// acceptCompleted runs on the loop after the callout completed op: with the clone of the SYN the connection goes on, without it
// is refused. The clone is authorised on its way in, where the callout finds it injected by itself.
func (f *tcpFlow) acceptCompleted(op *layers.PendedOp, c *layers.Clone, holder string) {
	defer c.Release()
	if f.state != stateHandshake || f.op != op {
		return
	}
	f.endPend(layers.PendCompleted)
	f.l.stop(f.timer)
	if c == nil {
		f.inbound.blocked = &layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendDenied}
		f.refuseClient()
		return
	}
	t, err := c.Take("accept completion")
	if err != nil {
		f.reset(err.Error())
		return
	}
	defer t.Done()
	g := f.l.g
	err = f.l.injectReceive(t, g.inject.markFor(holder, t.Mark), func(s *scratch, v layers.PacketView) bool {
		d := g.authorizeCompleted(s, &f.who, v, op)
		if d.Blocked() {
			f.inbound.blocked = &d
			return false
		}
		g.record(layers.RecordVerdict, op.Layer(), &f.who, &d, func(r *layers.Record) { r.Original = f.inbound.client })
		f.inbound.decided = true
		g.syns.letGo(f.key)
		return true
	})
	switch {
	case f.inbound.blocked != nil:
		f.refuseClient()
	case err != nil:
		f.reset(err.Error())
	default:
		f.timer = f.l.after(handshakeTimeout, func() { f.reset("the program did not answer") })
	}
}

// authorizeCompleted raises auth recv-accept for the clone that a completion lets in; it cannot be pended again.
func (g *Gateway) authorizeCompleted(s *scratch, who *subject, v layers.PacketView, op *layers.PendedOp) layers.Decision {
	in := g.fill(s, layers.ALEAuthRecvAccept, who, layers.Inbound)
	in.Meta.Operation = op.ID()
	in.Meta.Mark(layers.MetaOperationID)
	g.lend(s, v)
	return g.decide(s)
}
