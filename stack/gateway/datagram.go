package gateway

import (
	"container/list"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// datagramFlow is what one endpoint of a program exchanges with one remote: UDP datagrams, or the echo requests of one
// identifier. It has a connected socket on the host side. All fields are the loop's.
//
//	state       datagram of the program               gone by
//	pended      indicated again; the callout clones   deadline, completion
//	open        sent                                  idle time, LRU, host's error at creation
type datagramFlow struct {
	key    flowKey
	who    subject
	l      *loop
	fd     int // -1: none yet
	raw    bool
	op     *layers.PendedOp
	used   time.Time
	turn   uint64 // of the last receive
	idle   time.Duration
	timer  *timer // until it is idle
	limit  *timer // of a pended operation
	lru    *list.Element
	ttl    uint8  // set on the socket; 0: the host's default
	df     bool   // path MTU discovery is on
	id     uint16 // ICMP: the program's identifier
	opened time.Time
	batch  []outDatagram
	port   *publishedPort // UDP from a published port: its socket serves all its flows
	client netip.AddrPort // of a published port, as the host sees it

	accepted bool // with port: auth recv-accept was permitted

	assigned bool // counted in the table's ports

	bytesOut, bytesIn uint64
}

// datagramTable holds all datagram flows, the one used longest ago at the back.
type datagramTable struct {
	flows map[flowKey]*datagramFlow
	lru   list.List
	max   int
	ports map[resource]int // local ports in use, by how many flows
	// sources counts the flows of programs by their address.
	sources map[netip.Addr]int
}

// resource is a local port of a program.
type resource struct {
	local netip.AddrPort
	proto uint8
}

func (t *datagramTable) init(max int) {
	t.flows, t.max, t.ports = make(map[flowKey]*datagramFlow), max, make(map[resource]int)
	t.sources = make(map[netip.Addr]int)
}

// Idle times: how long a flow without datagrams is kept. A DNS query has its answer in seconds; RFC 4787, REQ-5 asks for two
// minutes of others, which a port below 1024 may cut short.
const (
	idleDNS     = 10 * time.Second
	idleService = 60 * time.Second
	idleOther   = 120 * time.Second
	idleEcho    = 30 * time.Second
)

func idleTime(proto uint8, remotePort uint16) time.Duration {
	switch {
	case proto != wire.UDP:
		return idleEcho
	case remotePort == dnsPort || remotePort == 123:
		return idleDNS
	case remotePort < 1024 && remotePort != 443:
		return idleService
	default:
		return idleOther
	}
}

// inputUDP takes one UDP datagram from a program.
func (l *loop) inputUDP(p *packet) {
	if p.remote.Port() == 0 {
		l.g.counters.drop(dropMalformed)
		return
	}
	if l.g.isDNS(p.remote) {
		l.queryDNS(p)
		return
	}
	l.inputDatagram(keyOf(wire.UDP, p.local, p.remote), p, 0)
}

// inputDatagram takes one datagram or echo request.
func (l *loop) inputDatagram(key flowKey, p *packet, id uint16) {
	f := l.g.datagrams.flows[key]
	if f == nil {
		f = l.newDatagramFlow(key, p, id)
	}
	f.used = l.now
	l.g.datagrams.lru.MoveToFront(f.lru)
	if f.fd < 0 && f.port == nil {
		if !f.authorize(p) || !f.open(p) {
			return
		}
	}
	if !f.indicateOut(p) {
		return
	}
	f.send(p)
}

// newDatagramFlow enters a flow; the one used longest ago makes room for it.
func (l *loop) newDatagramFlow(key flowKey, p *packet, id uint16) *datagramFlow {
	t := &l.g.datagrams
	if len(t.flows) >= t.max {
		l.g.counters.drop(dropTableFull)
		t.victim().end("made room for a newer flow")
	}
	t.sources[p.local.Addr()]++
	f := &datagramFlow{key: key, l: l, fd: -1, id: id, idle: idleTime(p.h.Protocol, p.remote.Port()), opened: l.now, used: l.now}
	f.who = subject{proto: p.h.Protocol, local: p.local, remote: p.remote}
	f.who.flow = l.g.newFlow(func() { f.end("aborted by a callout") })
	f.enter()
	return f
}

// enter puts the flow into the table and starts its idle timer.
func (f *datagramFlow) enter() {
	t := &f.l.g.datagrams
	t.flows[f.key] = f
	f.lru = t.lru.PushFront(f)
	f.l.g.counters.datagramFlows.Add(1)
	f.watchIdle(f.idle)
}

func (f *datagramFlow) watchIdle(d time.Duration) {
	f.timer = f.l.after(d, func() {
		left := f.idle - f.l.now.Sub(f.used)
		if f.op != nil {
			left = f.idle // while pended it has a deadline of its own, or none
		}
		if left > 0 {
			f.watchIdle(left)
			return
		}
		f.end("")
	})
}

// authorize raises resource assignment, where the port is new, and auth connect. It reports whether the flow is permitted.
func (f *datagramFlow) authorize(p *packet) bool {
	l := f.l
	d := f.assignResource()
	kind := layers.ALEResourceAssignment
	if !d.Blocked() {
		kind = layers.ALEAuthConnect
		d = f.classifyConnect(p, 0)
	}
	switch {
	case d.Blocked() && d.Absorb && f.op != nil:
		l.g.counters.drop(dropPended)
		return false
	case d.Blocked() && d.Absorb:
		l.g.counters.drop(dropAbsorbed)
		f.end("")
		return false
	}
	if f.op != nil {
		f.endPend(layers.PendStopped) // a callout pended, and then the final decision was not its own
	}
	if d.Blocked() {
		f.refuse(p, kind, &d)
		return false
	}
	l.g.record(layers.RecordVerdict, kind.Layer(f.who.family()), &f.who, &d, nil)
	return f.establish()
}

// assignResource raises resource assignment for a port that no flow uses yet.
func (f *datagramFlow) assignResource() layers.Decision {
	if f.assigned {
		return layers.Decision{Action: layers.Permit}
	}
	f.assigned = true
	ports, r := f.l.g.datagrams.ports, resource{f.who.local, f.who.proto}
	ports[r]++
	if ports[r] > 1 || f.who.proto != wire.UDP {
		return layers.Decision{Action: layers.Permit}
	}
	return f.l.assignResource(&f.who)
}

// classifyConnect raises auth connect; p is nil and op set in the classification that a completion causes.
func (f *datagramFlow) classifyConnect(p *packet, op layers.OperationID) layers.Decision {
	g := f.l.g
	s := &g.loopScratch
	in := g.fill(s, layers.ALEAuthConnect, &f.who, layers.Outbound)
	if op == 0 {
		in.Pender = f
		in.Meta.Mark(layers.MetaCompletionHandle)
		if g.engine.HasCallouts(in.Layer) {
			g.lend(s, p.view(s))
		}
	} else {
		in.Meta.Operation = op
		in.Meta.Mark(layers.MetaOperationID, layers.MetaPacketDirection)
		in.Values.SetNum(layers.FieldFlags, uint64(layers.FlagIsReauthorize))
		in.Values.SetNum(layers.FieldReauthorizeReason, uint64(layers.ReauthClassifyCompletion))
	}
	d := g.decide(s)
	g.guard(&d, f.who.remote.Addr())
	return d
}

// Pend implements layers.Pender. The datagram at hand and those that follow are the callout's to clone.
func (f *datagramFlow) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	return f.pend(layers.ALEAuthConnect.Layer(f.who.family()), holder, func(op *layers.PendedOp, c *layers.Clone) {
		c.Release() // the clone of a datagram is injected, not handed to its completion
		f.l.post(func() { f.completed(op) })
	})
}

// pend suspends the flow at a layer.
func (f *datagramFlow) pend(layer layers.ID, holder string, complete func(*layers.PendedOp, *layers.Clone)) (*layers.PendedOp, error) {
	if f.op != nil {
		return f.op, nil
	}
	l := f.l
	if l.g.counters.pended.Load() >= int64(l.g.opts.MaxPending) {
		return nil, layers.ErrPendLimit
	}
	f.op = layers.NewPendedOp(l.g.opID(), layer, holder, l.g.opts.Ledger, complete)
	l.g.counters.pended.Add(1)
	op := f.op
	l.g.record(layers.RecordPend, op.Layer(), &f.who, nil, func(r *layers.Record) { r.Operation, r.Detail = op.ID(), holder })
	if l.g.opts.PendDeadline > 0 {
		f.limit = l.after(l.g.opts.PendDeadline, func() {
			if f.op == op {
				f.pendTimedOut()
			}
		})
	}
	return f.op, nil
}

// pendTimedOut blocks a flow that nobody decided. The program has long given up on the datagrams, so that nothing is sent to it.
func (f *datagramFlow) pendTimedOut() {
	layer := f.op.Layer()
	f.endPend(layers.PendDeadline)
	d := layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout}
	f.l.g.record(layers.RecordVerdict, layer, &f.who, &d, nil)
	f.end("")
}

func (f *datagramFlow) endPend(cause layers.PendCause) {
	op := f.op
	if op == nil {
		return
	}
	f.op = nil
	f.l.stop(f.limit)
	op.Cancel(cause)
	g := f.l.g
	g.counters.pended.Add(-1)
	g.record(layers.RecordPendEnd, op.Layer(), &f.who, nil, func(r *layers.Record) {
		r.Operation, r.PendCause, r.Duration = op.ID(), op.Cause(), f.l.now.Sub(f.opened)
	})
}

// completed runs on the loop after the callout completed op. A permit makes the flow; the callout injects what it cloned.
func (f *datagramFlow) completed(op *layers.PendedOp) {
	if f.op != op || f.lru == nil {
		return
	}
	f.endPend(layers.PendCompleted)
	d := f.classifyConnect(nil, op.ID())
	if d.Blocked() {
		if d.Reason == layers.ReasonCallout {
			d.Reason = layers.ReasonPendDenied
		}
		f.refuse(nil, layers.ALEAuthConnect, &d)
		return
	}
	f.l.g.record(layers.RecordVerdict, layers.ALEAuthConnect.Layer(f.who.family()), &f.who, &d, nil)
	if f.establish() {
		f.open(nil)
	}
}

// refuse ends a flow that is not allowed. The program sees "administratively prohibited", or silence where the filter asks.
func (f *datagramFlow) refuse(p *packet, kind layers.Kind, d *layers.Decision) {
	l := f.l
	l.g.record(layers.RecordVerdict, kind.Layer(f.who.family()), &f.who, d, nil)
	l.g.counters.drop(dropPolicy)
	if p != nil && !d.Silent {
		l.replyUnreachable(p, unreachProhibited, 0)
	}
	f.end("")
}

// establish raises flow established.
func (f *datagramFlow) establish() bool {
	g := f.l.g
	dir := layers.Outbound
	if f.port != nil {
		dir = layers.Inbound
	}
	id := layers.ALEFlowEstablished.Layer(f.who.family())
	if g.wanted(id) {
		s := &g.loopScratch
		g.fill(s, layers.ALEFlowEstablished, &f.who, dir)
		if d := g.decide(s); d.Blocked() {
			g.record(layers.RecordVerdict, id, &f.who, &d, nil)
			f.end("blocked at flow established")
			return false
		}
	}
	g.record(layers.RecordFlow, id, &f.who, nil, nil)
	return true
}

// indicateOut raises datagram data, outbound transport and outbound network.
func (f *datagramFlow) indicateOut(p *packet) bool {
	l := f.l
	if id := layers.DatagramData.Layer(f.who.family()); l.g.wanted(id) && !l.packetLayer(p, &f.who, layers.DatagramData) {
		return false
	}
	return l.outboundPacket(p, &f.who)
}

// indicateIn raises inbound network, inbound transport and datagram data for a message to the program.
func (f *datagramFlow) indicateIn(b []byte) bool {
	g := f.l.g
	data := layers.DatagramData.Layer(f.who.family())
	unknown := f.port != nil && !f.accepted // a client's first datagram
	if !unknown && !g.inboundWanted() && !g.wanted(data) {
		return true
	}
	h, err := wire.Parse(b)
	if err != nil {
		g.counters.drop(dropMalformed)
		return false
	}
	v := layers.PacketView{IPHeader: b[:h.TransportStart:h.TransportStart], TransportHeader: b[h.TransportStart:h.PayloadStart:h.PayloadStart],
		Payload: [][]byte{b[h.PayloadStart:]}, PayloadLen: len(b) - h.PayloadStart, Direction: layers.Inbound}
	s := &g.loopScratch
	if !g.inboundLayers(s, &f.who, v) || unknown && !f.authorizeAccept(s, v) {
		return false
	}
	if !g.wanted(data) {
		return true
	}
	in := g.fill(s, layers.DatagramData, &f.who, layers.Inbound)
	if g.engine.HasCallouts(data) || g.opts.Trace != nil {
		g.lend(s, v)
	}
	if d := g.decide(s); d.Blocked() {
		g.blockedPacket(in.Layer, &f.who, &d)
		return false
	}
	return true
}

// open makes the connected host socket. p, which may be nil, is answered where that fails.
func (f *datagramFlow) open(p *packet) bool {
	l := f.l
	fd, err := f.socket()
	if err == unix.EMFILE || err == unix.ENFILE {
		// A flow that was used longest ago gives its descriptor.
		if oldest := l.g.datagrams.lru.Back().Value.(*datagramFlow); oldest != f {
			oldest.end("made room for a newer flow: " + err.Error())
			fd, err = f.socket()
		}
	}
	if err == nil && l.g.opts.Control != nil {
		err = l.g.opts.Control(fd)
	}
	if err == nil {
		target := l.g.targetOf(f.who.remote)
		if f.who.proto != wire.UDP {
			target = netip.AddrPortFrom(target.Addr(), 0)
		}
		err = unix.Connect(fd, sockaddr(target))
	}
	if err == nil {
		err = l.epollAdd(fd, unix.EPOLLIN, f)
	}
	if err == nil {
		f.fd = fd
		return true
	}
	if fd < 0 && f.who.proto != wire.UDP {
		l.g.opts.Logger.Warn("echo socket on the host", "err", err)
	}
	if fd >= 0 {
		unix.Close(fd)
	}
	l.g.record(layers.RecordFlowEnd, layers.ALEFlowEstablished.Layer(f.who.family()), &f.who, nil, func(r *layers.Record) { r.Detail = "connect: " + err.Error() })
	if p != nil {
		l.replyUnreachable(p, unreachableOf(err), 0)
	}
	l.g.counters.drop(dropSend)
	f.end("")
	return false
}

// socket makes the host socket with errors queued in full, so that the program can be shown each ICMP error.
func (f *datagramFlow) socket() (int, error) {
	family := familyOf(f.who.remote.Addr())
	const flags = unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	var fd int
	var err error
	if f.who.proto == wire.UDP {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|flags, unix.IPPROTO_UDP)
	} else {
		fd, f.raw, err = echoSocket(family, flags)
	}
	if err != nil {
		return -1, err
	}
	level, recvErr := unix.IPPROTO_IP, unix.IP_RECVERR
	if family == unix.AF_INET6 {
		level, recvErr = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	_ = unix.SetsockoptInt(fd, level, recvErr, 1) // without it only the errors of a connected socket arrive
	return fd, nil
}

// onReady implements pollable.
func (f *datagramFlow) onReady(events uint32) {
	if events&unix.EPOLLERR != 0 {
		f.readErrors()
	}
	if events&unix.EPOLLIN != 0 && f.fd >= 0 {
		f.receive()
	}
}

// end forgets the flow and closes its socket.
func (f *datagramFlow) end(detail string) {
	if f.lru == nil {
		return
	}
	l, t := f.l, &f.l.g.datagrams
	l.stop(f.timer)
	f.endPend(layers.PendAbandoned)
	f.releaseBatch()
	opened := f.fd >= 0 || f.port != nil
	if f.fd >= 0 {
		l.forget(f.fd)
		unix.Close(f.fd)
		f.fd = -1
	}
	t.lru.Remove(f.lru)
	f.lru = nil
	if f.port == nil {
		if t.sources[f.who.local.Addr()]--; t.sources[f.who.local.Addr()] == 0 {
			delete(t.sources, f.who.local.Addr())
		}
	}
	if t.flows[f.key] == f {
		delete(t.flows, f.key)
	}
	if r := (resource{f.who.local, f.who.proto}); f.assigned && t.ports[r] > 1 {
		t.ports[r]--
	} else if f.assigned {
		delete(t.ports, r)
	}
	l.g.counters.datagramFlows.Add(-1)
	if opened {
		l.g.record(layers.RecordFlowEnd, layers.ALEFlowEstablished.Layer(f.who.family()), &f.who, nil, func(r *layers.Record) {
			r.BytesOut, r.BytesIn, r.Duration, r.Detail = f.bytesOut, f.bytesIn, l.now.Sub(f.opened), detail
		})
	}
	f.who.flow.End()
}
