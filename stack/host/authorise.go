package host

import (
	"context"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/ale"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// BlockedError says that a decision stopped an operation; it is inside the *net.OpError that the operation returned.
type BlockedError struct {
	// Layer is where it was decided.
	Layer layers.ID
	// Decision is what was decided, and why.
	Decision layers.Decision
	// Errno is what a program sees.
	Errno syscall.Errno
}

// Error names the error number and who decided.
func (e *BlockedError) Error() string {
	by := e.Decision.Reason.String()
	if e.Decision.FilterName != "" {
		by += ", filter " + e.Decision.FilterName
	}
	return e.Errno.Error() + " (blocked at " + e.Layer.String() + ": " + by + ")"
}

// Unwrap returns the error number.
func (e *BlockedError) Unwrap() error { return e.Errno }

// Timeout reports whether the error number stands for a timeout, as net.Error asks.
func (e *BlockedError) Timeout() bool { return e.Errno.Timeout() }

// blockedErrno returns what the program sees of a refused operation.
func blockedErrno(layer layers.ID, proto uint8) syscall.Errno {
	switch {
	case layer.Kind() != layers.ALEAuthConnect:
		return syscall.EACCES
	case proto == uint8(header.TCPProtocolNumber):
		return syscall.ECONNREFUSED
	case layer.Family() == layers.V4:
		return syscall.EHOSTUNREACH
	default:
		return syscall.EACCES
	}
}

// request is an operation of a program on its way through one ALE layer.
type request struct {
	layer layers.ID
	t     tuple
	x     facts
	data  []byte // the datagram that began it, nil if none did
	// async says that nobody waits: the worker goes on when the operation is completed.
	async bool
}

// prepare makes the indication of a request. One after a completion has the operation's id.
func (s *Stack) prepare(r *request, completed *layers.PendedOp) *event {
	e := newEvent(r.layer)
	s.fill(e, &r.t, &r.x)
	switch {
	case completed == nil:
		if r.data != nil {
			s.showData(e, &r.t, r.data)
		}
	case r.layer.Kind() == layers.ALEAuthConnect:
		ale.FillReauthorize(&e.in, layers.ReauthClassifyCompletion, layers.Outbound, completed.ID())
	default:
		e.in.Meta.Operation = completed.ID()
		e.in.Meta.Mark(layers.MetaOperationID)
	}
	return e
}

// ask classifies a request. With held not nil the operation was pended: its end comes later. completed is the operation whose
// completion caused this classification, which cannot be pended.
func (s *Stack) ask(r *request, completed *layers.PendedOp) (d layers.Decision, held *pender) {
	e := s.prepare(r, completed)
	defer e.release()
	p := newPender(s, r)
	if completed == nil {
		e.in.Pender = p
		e.in.Meta.Mark(layers.MetaCompletionHandle)
	}
	d = s.decide(e)
	if p.op != nil {
		if d.Blocked() && d.Absorb {
			if p.fresh {
				s.recordPend(layers.RecordPend, p.op, p.since, &r.t, &r.x)
			}
			return d, p
		}
		// Somebody else decided: there is nothing left to wait for.
		p.drop()
	}
	s.record(e, &r.t, &r.x, d)
	if d.Blocked() && !d.Absorb {
		s.discarded(e, layers.DiscardFirewallPolicy, d.Filter)
	}
	return d, nil
}

// newPender makes the pender of a request.
func newPender(s *Stack, r *request) *pender {
	p := &pender{s: s, wait: !r.async, h: held{layer: r.layer, t: r.t, x: r.x}}
	if r.async {
		later := *r
		later.data = nil // lent; the callout has a clone, if it wants one
		p.h.request = &later
	}
	return p
}

// authorise asks about an operation of the calling goroutine and waits as long as it is pended. A nil error permits.
//
// Errors: *BlockedError; that of ctx; net.ErrClosed when the stack closes.
func (s *Stack) authorise(ctx context.Context, r *request) error {
	d, held := s.ask(r, nil)
	if held != nil {
		var err error
		if d, err = s.await(ctx, r, held); err != nil {
			return err
		}
	}
	return blocked(r, &d)
}

// blocked returns the error of a request, nil if the decision permits it.
func blocked(r *request, d *layers.Decision) error {
	if !d.Blocked() {
		return nil
	}
	return &BlockedError{Layer: r.layer, Decision: *d, Errno: blockedErrno(r.layer, r.t.proto)}
}

// recordPend writes down that an operation was pended, or ended.
func (s *Stack) recordPend(what layers.RecordType, op *layers.PendedOp, since time.Time, t *tuple, x *facts) {
	r := layers.Record{
		Time: s.opts.Clock(), Type: what, Layer: op.Layer(), Operation: op.ID(), Direction: x.dir, Protocol: t.proto, Local: t.local,
		Remote: t.remote, Name: x.name, App: s.opts.App, PID: s.opts.PID, PendCause: op.Cause(),
	}
	if !since.IsZero() {
		r.Duration = r.Time.Sub(since)
	}
	s.opts.Recorder.Record(&r)
}

// recordLate writes down a block that no classification made.
func (s *Stack) recordLate(layer layers.ID, t *tuple, x *facts, d layers.Decision) {
	s.counters.blocked.Add(1)
	s.opts.Recorder.Record(&layers.Record{
		Time: s.opts.Clock(), Type: layers.RecordVerdict, Layer: layer, Flow: x.flow.id(), Direction: x.dir, Protocol: t.proto, Local: t.local,
		Remote: t.remote, Name: x.name, App: s.opts.App, PID: s.opts.PID, Decision: &d,
	})
}

// authoriseInbound raises auth recv-accept for the packet that would begin the flow of tuple t, and reports whether it may. isn
// tells one SYN from another of the same tuple.
func (s *Stack) authoriseInbound(g *segment, t *tuple, isn uint32) bool {
	if s.isClosing() {
		s.counters.stopping.Add(1)
		return false
	}
	var completed *layers.PendedOp
	switch {
	case g.pkt.Mark&markCompleted != 0:
		if e := s.pends.inbound(keyOf(t)); e != nil {
			completed = e.Op
		}
	case t.proto == uint8(header.TCPProtocolNumber):
		e, abandoned := s.pends.touch(s.opts.Clock(), keyOf(t), isn)
		if abandoned != nil {
			s.ended(abandoned)
		}
		if e != nil {
			s.counters.pendAbsorbed.Add(1) // a retransmission of what waits already
			return false
		}
	}
	layer := layers.ALEAuthRecvAccept.Layer(g.fam)
	e := newEvent(layer)
	defer e.release()
	s.fill(e, &g.t, &g.x)
	s.show(e, g.pkt, layers.Inbound, 0)
	s.fillEcho(e, g.pkt)
	if completed != nil {
		e.in.Meta.Operation = completed.ID()
		e.in.Meta.Mark(layers.MetaOperationID)
		return s.judgeInbound(e, g, nil)
	}
	p := &pender{s: s, h: held{layer: layer, t: *t, x: g.x, isn: isn}}
	e.in.Pender = p
	e.in.Meta.Mark(layers.MetaCompletionHandle)
	return s.judgeInbound(e, g, p)
}

// judgeInbound classifies at auth recv-accept and sees to what follows from it.
func (s *Stack) judgeInbound(e *event, g *segment, p *pender) bool {
	d := s.decide(e)
	if p != nil && p.op != nil {
		if d.Blocked() && d.Absorb {
			if p.fresh {
				s.recordPend(layers.RecordPend, p.op, p.since, &g.t, &g.x)
			}
			return false
		}
		p.drop()
	}
	s.record(e, &g.t, &g.x, d)
	if d.Blocked() && !d.Absorb {
		s.discarded(e, layers.DiscardFirewallPolicy, d.Filter)
		if !d.Silent {
			s.refuseLater(refusalOf(g))
		}
	}
	return !d.Blocked()
}

// establish raises flow established, once for each flow. A block there ends the flow.
func (s *Stack) establish(f *flow) {
	if was := f.state.Load(); was == flowEstablished || was == flowClosed || !f.state.CompareAndSwap(was, flowEstablished) {
		return
	}
	if !s.flowEstablished(f) {
		f.refused.Store(true)
		s.abortLater(f)
	}
}

// flowEstablished raises flow established and writes the record.
func (s *Stack) flowEstablished(f *flow) bool {
	layer := layers.ALEFlowEstablished.Layer(conv.FamilyOf(f.key.local.Addr()))
	if s.wanted(layer) {
		e := newEvent(layer)
		defer e.release()
		x := facts{dir: f.dir, flow: f, loopback: f.loopback, endpoint: f.endpoint}
		s.fill(e, &f.key, &x)
		if d := s.decide(e); d.Blocked() {
			s.record(e, &f.key, &x, d)
			s.discarded(e, layers.DiscardFirewallPolicy, d.Filter)
			return false
		}
	}
	s.opts.Recorder.Record(&layers.Record{
		Time: s.opts.Clock(), Type: layers.RecordFlow, Layer: layer, Flow: f.ID(), Direction: f.dir, Protocol: f.key.proto, Local: f.key.local,
		Remote: f.key.remote, Name: f.name, App: s.opts.App, PID: s.opts.PID,
	})
	return true
}

// beginDatagrams makes the flow of authorised datagrams; nil if it may not be. sock is nil for ICMP.
func (s *Stack) beginDatagrams(t tuple, dir layers.Direction, sock *socket, name string) *flow {
	var endpoint uint64
	if sock != nil {
		endpoint = sock.id
	}
	f := s.newFlow(t, dir, flowEstablished, endpoint)
	f.name = name
	if !s.enter(f, false) {
		// Another packet was faster, or the table is full.
		if other := s.flows.get(&t); other != nil && other.state.Load() == flowEstablished {
			return other
		}
		return nil
	}
	if sock != nil && !sock.adopt(f) {
		s.dropFlow(f)
		return nil
	}
	if !s.flowEstablished(f) {
		s.dropFlow(f)
		return nil
	}
	return f
}

// sweep ends what nobody else ends: idle datagram flows, closed connections whose peer never finishes, connections that died
// before they were accepted, and pended operations that are over.
func (s *Stack) sweep(now time.Time) {
	s.sweepPends(now)
	idle := s.opts.DatagramIdle
	if s.flows.len() > s.opts.MaxFlows/4*3 {
		idle = min(idle, crowdedIdle)
	}
	for _, f := range s.flows.all() {
		age := now.Sub(time.Unix(0, f.seen.Load()))
		switch {
		case f.key.proto != uint8(header.TCPProtocolNumber):
			if age >= idle || f.state.Load() == flowClosed {
				s.dropFlow(f)
			}
		default:
			s.sweepConnection(f, now)
		}
	}
}

// crowdedIdle is how long a datagram flow may idle when the flow table is three quarters full.
const crowdedIdle = 10 * time.Second

// handshakeTime is how long netstack works on a handshake that the peer does not finish, and closeTime how long the peer may take
// to take what was sent before a close. Beyond it the connection is reset.
const (
	handshakeTime = 75 * time.Second
	closeTime     = 2 * time.Minute
)

// sweepConnection deals with one TCP flow.
func (s *Stack) sweepConnection(f *flow, now time.Time) {
	if sock := f.sock.Load(); sock != nil {
		if sock.over() {
			s.dropFlow(f)
		} else if since := sock.closedAt.Load(); since != 0 && now.Sub(time.Unix(0, since)) > closeTime {
			sock.ep.Abort()
		}
		return
	}
	ep := s.endpoint(&f.key)
	alive := ep != nil && s.socketOf(ep) == nil // a socket of ours here is the listener
	if !alive && (f.state.Load() != flowAccepting || f.reset.Load() || now.Sub(f.started) > handshakeTime) {
		s.dropFlow(f)
	}
}
