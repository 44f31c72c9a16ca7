package gateway

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// tcpState is where a connection of a program is.
//
//	state        program's SYN again   verdict / host socket           program's RST   gone by
//	pended       attached duplicate    permit → dialing, block → —     → —             deadline, abandoned
//	dialing      attached duplicate    connected → handshake,          → —             host's errno, dial timeout
//	                                   failed → refused or unreachable
//	handshake    to netstack           accepted → open                 → —             handshakeTimeout
//	open         to netstack           data both ways                  → —             both ends closed, or a reset
//	silent       dropped               —                               → —             silentTime
//
// A SYN with another sequence number in the first three states is a new operation: the old one was abandoned.
type tcpState uint8

const (
	statePended tcpState = iota
	stateDialing
	stateHandshake
	stateOpen
	stateSilent // a failure that the program's kernel is to find by its own timer
	stateGone
)

const (
	handshakeTimeout = 30 * time.Second
	// silentTime outlasts a Linux program's own SYN timer of about 131 s.
	silentTime = 150 * time.Second
	// synInterval is the longest pause between two SYNs of a kernel that still tries: the backoff doubles up to 64 s.
	synInterval = 70 * time.Second
	// keepAliveIdle finds a program's machine that vanished.
	keepAliveIdle = 60 * time.Second
	// lingerTime is how long netstack may try to send what is left after both sides closed; a program that keeps its window
	// at zero would hold it for ever.
	lingerTime = 60 * time.Second
)

// tcpFlow is one TCP connection of a program. All fields are the loop's, but for dirty.
type tcpFlow struct {
	key   flowKey
	who   subject
	state tcpState
	l     *loop

	syn  *stack.PacketBuffer // owned: the latest SYN, until it was delivered
	isn  uint32
	seen time.Time // of the latest SYN
	op   *layers.PendedOp
	mark layers.InjectionMark

	target  netip.AddrPort // where the host side connects
	fd      int            // host socket, -1: none
	ep      tcpip.Endpoint // netstack's side, once accepted
	te      stack.TransportEndpoint
	wq      *waiter.Queue
	entry   waiter.Entry
	timer   *timer
	started time.Time

	inbound *inboundFlow // from a published port; nil: the program connects

	established bool // flow established was raised
	dirty       atomic.Bool

	relay relay
}

// inputTCP takes one segment from a program.
func (l *loop) inputTCP(p *packet) {
	flags := header.TCP(p.transport).Flags()
	if badFlags(flags) {
		l.g.counters.drop(dropFlags)
		return
	}
	key := keyOf(wire.TCP, p.local, p.remote)
	f := l.g.tcp[key]
	if f == nil {
		l.unknownSegment(key, p, flags)
		return
	}
	if f.state == stateOpen {
		l.toEndpoint(f, p)
		return
	}
	l.embryonicSegment(f, p, flags)
}

// badFlags reports combinations that no kernel takes from a program. Source: RFC 9293, 3.10.7; Linux drops them too.
func badFlags(f header.TCPFlags) bool {
	const syn, fin, rst, ack = header.TCPFlagSyn, header.TCPFlagFin, header.TCPFlagRst, header.TCPFlagAck
	return f.Contains(syn|fin) || f.Contains(syn|rst) || f&(syn|fin|rst|ack) == 0
}

// embryonicSegment takes a segment of a connection that is not open yet.
func (l *loop) embryonicSegment(f *tcpFlow, p *packet, flags header.TCPFlags) {
	switch {
	case flags.Contains(header.TCPFlagRst):
		if f.state == stateHandshake {
			l.toEndpoint(f, p)
		}
		f.abandon("reset by the program")
	case flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck):
		if seq := header.TCP(p.transport).SequenceNumber(); seq != f.isn {
			f.abandon("the program connects anew")
			l.newConnection(f.key, p)
			return
		}
		f.seen = l.now
		if f.state == stateHandshake {
			l.toEndpoint(f, p)
			return
		}
		if f.syn != nil {
			// The newest SYN carries the newest timestamp.
			f.syn.DecRef()
			f.syn = p.buf.Clone()
		}
		l.g.counters.drop(dropPended)
	case f.state == stateHandshake:
		if !flags.Contains(header.TCPFlagSyn) {
			f.establish(l) // towards a program, netstack's last acknowledgement comes first
		}
		l.toEndpoint(f, p)
	default:
		l.g.counters.drop(dropNoFlow)
	}
}

// unknownSegment takes a segment of no flow: a new connection, the tail of an old one that netstack finishes alone, or nothing
// that anybody knows, which is answered by a reset.
func (l *loop) unknownSegment(key flowKey, p *packet, flags header.TCPFlags) {
	who := subject{proto: wire.TCP, local: p.local, remote: p.remote}
	isSyn := flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck)
	te := l.g.stack.FindTransportEndpoint(p.proto(), tcp.ProtocolNumber, p.endpointID(), nicID)
	if te != nil && l.g.isListener(te) {
		te = nil
	}
	if te != nil && isSyn {
		// Netstack would ignore a SYN in TIME_WAIT for as long as that lasts; a kernel takes it.
		if ep, ok := te.(*tcp.Endpoint); ok && ep.EndpointState() == tcp.StateTimeWait {
			ep.Abort()
			te = nil
		}
	}
	switch {
	case te != nil:
		if l.outboundPacket(p, &who) {
			l.g.queueTCP.QueuePacket(te, p.endpointID(), p.buf)
		}
	case isSyn:
		l.newConnection(key, p)
	case flags.Contains(header.TCPFlagRst):
		l.g.counters.drop(dropNoFlow)
	default:
		l.g.counters.drop(dropNoFlow)
		l.g.queueTCP.HandleUnknownDestinationPacket(p.endpointID(), p.buf)
	}
}

// endpointID is the packet's identity as netstack names it.
func (p *packet) endpointID() stack.TransportEndpointID {
	return stack.TransportEndpointID{
		LocalPort: p.remote.Port(), LocalAddress: addressOf(p.remote.Addr()),
		RemotePort: p.local.Port(), RemoteAddress: addressOf(p.local.Addr()),
	}
}

func addressOf(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

// addrOf translates an address of netstack.
func addrOf(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice()) // invalid for the empty address
	return addr.Unmap()
}

// toEndpoint raises the packet layers and gives the segment to netstack's endpoint.
//
// Hot path: no lookup once the endpoint is known, no allocation.
func (l *loop) toEndpoint(f *tcpFlow, p *packet) {
	if !l.outboundPacket(p, &f.who) {
		return
	}
	if t := header.TCP(p.transport); t.Flags().Contains(header.TCPFlagAck) {
		f.relay.noteAck(t.AckNumber())
	}
	if f.te == nil {
		te := l.g.stack.FindTransportEndpoint(p.proto(), tcp.ProtocolNumber, p.endpointID(), nicID)
		if te == nil || l.g.isListener(te) {
			if f.state == stateHandshake {
				te = l.g.listeners[f.who.family()].te
			} else {
				l.g.queueTCP.HandleUnknownDestinationPacket(p.endpointID(), p.buf)
				return
			}
		} else {
			f.te = te
		}
		l.g.queueTCP.QueuePacket(te, p.endpointID(), p.buf)
		return
	}
	l.g.queueTCP.QueuePacket(f.te, p.endpointID(), p.buf)
}

func (g *Gateway) isListener(te stack.TransportEndpoint) bool {
	return te == g.listeners[layers.V4].te || te == g.listeners[layers.V6].te
}

// newConnection authorises a SYN.
func (l *loop) newConnection(key flowKey, p *packet) {
	g := l.g
	who := subject{proto: wire.TCP, local: p.local, remote: p.remote}
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
	if r := g.opts.Guard.Check(remote, d.Reason == layers.ReasonFilter || d.Reason == layers.ReasonCallout); r != layers.ReasonNone {
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
	l.g.record(layers.RecordPend, f.op.Layer(), &f.who, nil, func(r *layers.Record) { r.Operation = f.op.ID() })
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

// packetOf finds the headers of a packet that was consumed before.
func packetOf(b *stack.PacketBuffer) packet {
	p := packet{buf: b, ip: b.NetworkHeader().Slice(), transport: b.TransportHeader().Slice()}
	p.h.V6 = b.NetworkProtocolNumber == header.IPv6ProtocolNumber
	p.h.Protocol = uint8(b.TransportProtocolNumber)
	p.h.TransportStart, p.h.PayloadStart = len(p.ip), len(p.ip)+len(p.transport)
	n := b.Network()
	p.h.Src, p.h.Dst = addrOf(n.SourceAddress()), addrOf(n.DestinationAddress())
	p.h.SrcPort, p.h.DstPort = binary.BigEndian.Uint16(p.transport), binary.BigEndian.Uint16(p.transport[2:])
	p.local, p.remote = p.h.Source(), p.h.Destination()
	p.h.PayloadEnd = p.h.PayloadStart + b.Data().Size()
	p.h.End = p.h.PayloadEnd
	return p
}

// dial connects on the host side. The SYN is shown to the packet layers first.
func (f *tcpFlow) dial(syn *packet) {
	l := f.l
	if syn == nil {
		p := packetOf(f.syn)
		syn = &p
	}
	if !l.outboundPacket(syn, &f.who) {
		f.end() // dropped without a trace, as the filter says; the program's kernel sends another SYN
		return
	}
	f.state = stateDialing
	f.target = l.g.targetOf(f.who.remote)
	if err := f.connect(); err != nil {
		f.dialFailed(err)
	}
}

// dnsPort is where the stack answers DNS. Source: RFC 1035, 4.2.
const dnsPort = 53

// targetOf is where the host side connects for a destination: the stack's own addresses stand for the host's loopback.
func (g *Gateway) targetOf(remote netip.AddrPort) netip.AddrPort {
	switch {
	case remote.Addr() == g.opts.Addr4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), remote.Port())
	case remote.Addr() == g.opts.Addr6:
		return netip.AddrPortFrom(netip.IPv6Loopback(), remote.Port())
	default:
		return remote
	}
}

// connect starts a non-blocking connect and, where the kernel finishes it at once, goes on.
func (f *tcpFlow) connect() error {
	l := f.l
	fd, err := sysSocket(familyOf(f.target.Addr()), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	f.fd = fd
	if l.g.opts.Control != nil {
		if err := l.g.opts.Control(fd); err != nil {
			return fmt.Errorf("prepare host socket: %w", err)
		}
	}
	prepareHostSocket(fd)
	err = sysConnect(fd, f.target)
	if err != nil && err != unix.EINPROGRESS {
		return err
	}
	if err := l.epollAdd(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff, f); err != nil {
		return err
	}
	if err == nil {
		f.connected()
		return nil
	}
	if l.g.opts.DialTimeout > 0 {
		f.timer = l.after(l.g.opts.DialTimeout, func() { f.dialFailed(syscall.ETIMEDOUT) })
	}
	return nil
}

// prepareHostSocket sets what the relay relies on. The program's own Nagle has already acted, and urgent data stays in line so
// that no byte is lost. The options exist on every Linux; a failure costs latency, not correctness.
func prepareHostSocket(fd int) {
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	sysSetInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	sysSetInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// dialFailed shows the program what its own kernel would have found.
func (f *tcpFlow) dialFailed(err error) {
	errno, ok := err.(syscall.Errno)
	if !ok {
		errno = syscall.EHOSTUNREACH
		f.l.g.opts.Logger.Warn("connect on the host side", "remote", f.target, "err", err)
	}
	f.l.g.recordDialFailure(f, errno)
	if errno == syscall.ETIMEDOUT {
		f.goSilent() // the program's own SYN timer reports ETIMEDOUT
		return
	}
	f.sendRefusal(unreachableErrno(errno))
	f.end()
}

// unreachableErrno is the errno that an answer can make the program's kernel report. A refusal says that the server answered; what
// never got there, like a route that swallows (EINVAL), is unreachable.
func unreachableErrno(errno syscall.Errno) syscall.Errno {
	switch errno {
	case syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ENETUNREACH, syscall.EACCES, syscall.EPERM:
		return errno
	case syscall.ENETDOWN, syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT:
		return syscall.ENETUNREACH
	default:
		return syscall.EHOSTUNREACH
	}
}

func (g *Gateway) recordDialFailure(f *tcpFlow, errno syscall.Errno) {
	g.record(layers.RecordFlowEnd, layers.ALEFlowEstablished.Layer(f.who.family()), &f.who, nil, func(r *layers.Record) {
		r.Duration, r.Detail = f.l.now.Sub(f.started), "connect: "+errno.Error()
	})
}

// onReady implements pollable: the host socket has an event.
func (f *tcpFlow) onReady(events uint32) {
	switch f.state {
	case stateDialing:
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			switch errno := socketError(f.fd); errno {
			case 0:
			case syscall.ECONNRESET, syscall.EPIPE:
				// The server answered and then reset: the program's connect succeeds, and finds that next.
				f.relay.hostReset, f.relay.hostErrno, f.relay.detail = true, errno, "host: "+errno.Error()
			default:
				f.dialFailed(errno)
				return
			}
		}
		if events&(unix.EPOLLOUT|unix.EPOLLHUP) != 0 {
			f.noteHost(events)
			f.connected()
		}
	case stateHandshake, stateOpen:
		f.noteHost(events)
		f.l.markDirty(f)
	}
}

// connected gives the SYN to netstack: only now is the program told anything.
func (f *tcpFlow) connected() {
	l := f.l
	l.stop(f.timer)
	f.state = stateHandshake
	f.timer = l.after(handshakeTimeout, func() { f.reset("the program did not finish its handshake") })
	p := packetOf(f.syn)
	l.g.queueTCP.QueuePacket(l.g.listeners[f.who.family()].te, p.endpointID(), f.syn)
	f.dropSYN()
}

// establish raises flow established, once, before the packet that completes the handshake.
func (f *tcpFlow) establish(l *loop) {
	if f.established {
		return
	}
	f.established = true
	g := l.g
	g.counters.flows.Add(1)
	id := layers.ALEFlowEstablished.Layer(f.who.family())
	if g.wanted(id) {
		s := &g.loopScratch
		dir := layers.Outbound
		if f.inbound != nil {
			dir = layers.Inbound
		}
		g.fill(s, layers.ALEFlowEstablished, &f.who, dir)
		if d := g.decide(s); d.Blocked() {
			g.record(layers.RecordVerdict, id, &f.who, &d, nil)
			l.post(func() { f.reset("blocked at flow established") })
			return
		}
	}
	g.record(layers.RecordFlow, id, &f.who, nil, nil)
}

// open makes the listener of a family.
func (ln *listener) open(g *Gateway, f layers.Family) error {
	proto, addr := header.IPv4ProtocolNumber, tcpip.AddrFrom4([4]byte{})
	if f == layers.V6 {
		proto, addr = header.IPv6ProtocolNumber, tcpip.AddrFrom16([16]byte{})
	}
	wq := &waiter.Queue{}
	ep, err := g.stack.NewEndpoint(tcp.ProtocolNumber, proto, wq)
	if err != nil {
		return fmt.Errorf("make %v listener: %v", f, err)
	}
	ep.SocketOptions().SetV6Only(true)
	entry := waiter.NewFunctionEntry(waiter.ReadableEvents, func(waiter.EventMask) {
		g.acceptReady.Store(true)
		g.loop.wake()
	})
	wq.EventRegister(&entry)
	if err := ep.Bind(tcpip.FullAddress{Addr: addr, Port: 1}); err != nil {
		return fmt.Errorf("bind %v listener: %v", f, err)
	}
	if err := ep.Listen(g.opts.MaxFlows); err != nil {
		return fmt.Errorf("listen %v: %v", f, err)
	}
	te, ok := ep.(stack.TransportEndpoint)
	if !ok {
		return fmt.Errorf("this version of netstack has no packet-taking %v listener", f)
	}
	ln.ep, ln.te = ep, te
	return nil
}

// acceptFlows takes the connections whose handshake finished.
func (l *loop) acceptFlows() bool {
	if !l.g.acceptReady.Swap(false) {
		return false
	}
	for i := range l.g.listeners {
		for {
			ep, wq, err := l.g.listeners[i].ep.Accept(nil)
			if err != nil {
				break // nothing left; a listener of ours has no other error
			}
			l.accepted(ep, wq)
		}
	}
	return true
}

// accepted joins netstack's endpoint to its flow.
func (l *loop) accepted(ep tcpip.Endpoint, wq *waiter.Queue) {
	local, _ := ep.GetLocalAddress() // these fail for unconnected endpoints only
	remote, _ := ep.GetRemoteAddress()
	key := keyOf(wire.TCP, netip.AddrPortFrom(addrOf(remote.Addr), remote.Port), netip.AddrPortFrom(addrOf(local.Addr), local.Port))
	f := l.g.tcp[key]
	if f == nil || f.state != stateHandshake {
		ep.Abort()
		return
	}
	f.open(ep, wq)
}

// open starts the relay between both sides.
func (f *tcpFlow) open(ep tcpip.Endpoint, wq *waiter.Queue) {
	l := f.l
	l.stop(f.timer)
	f.establish(l)
	f.state = stateOpen
	f.countEmbryonic(-1)
	f.ep, f.wq = ep, wq
	if te, ok := ep.(stack.TransportEndpoint); ok {
		f.te = te
	}
	o := ep.SocketOptions()
	o.SetDelayOption(false)
	idle := tcpip.KeepaliveIdleOption(keepAliveIdle)
	_ = ep.SetSockOpt(&idle) // cannot fail for TCP
	o.SetKeepAlive(true)
	f.entry.Init(f, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	wq.EventRegister(&f.entry)
	f.relay.start(f)
	l.markDirty(f)
}

// NotifyEvent implements waiter.EventListener. Netstack calls it with the endpoint's lock held.
func (f *tcpFlow) NotifyEvent(waiter.EventMask) { f.l.markDirty(f) }

// abandon ends a connection whose program gave up.
func (f *tcpFlow) abandon(why string) {
	f.endPend(layers.PendAbandoned)
	f.reset(why)
}

// closeHost closes the host socket in the ordinary way.
func (f *tcpFlow) closeHost() {
	if f.fd >= 0 {
		f.l.forget(f.fd)
		sysClose(f.fd)
		f.fd = -1
	}
}

// halfOpen returns netstack's endpoint of a handshake under way, nil if there is none. It is found by its address only once the
// program has answered.
func (f *tcpFlow) halfOpen() stack.TransportEndpoint {
	if f.te != nil || f.state != stateHandshake {
		return f.te
	}
	p := packet{local: f.who.local, remote: f.who.remote}
	proto := header.IPv4ProtocolNumber
	if f.who.family() == layers.V6 {
		proto = header.IPv6ProtocolNumber
	}
	te := f.l.g.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, p.endpointID(), nicID)
	if te == nil || f.l.g.isListener(te) {
		return nil
	}
	return te
}

// reset ends the connection with a reset on both sides.
func (f *tcpFlow) reset(why string) {
	if f.state == stateGone {
		return
	}
	if f.fd >= 0 {
		f.l.forget(f.fd)
		resetAndClose(f.fd)
		f.fd = -1
	}
	if f.ep != nil {
		f.ep.Abort()
	} else if ep, ok := f.halfOpen().(*tcp.Endpoint); ok {
		ep.Abort()
	}
	f.relay.detail = why
	f.end()
}

// end forgets the connection. The host socket is closed, netstack's endpoint goes on alone with what it has to send.
func (f *tcpFlow) end() {
	if f.state == stateGone {
		return
	}
	l := f.l
	l.stop(f.timer)
	f.endPend(layers.PendStopped)
	f.dropSYN()
	f.closeHost()
	if f.state != stateOpen && f.state != stateSilent {
		f.countEmbryonic(-1)
	}
	f.state = stateGone
	if l.g.tcp[f.key] == f {
		delete(l.g.tcp, f.key)
	}
	if f.inbound != nil {
		l.g.syns.letGo(f.key)
	}
	if f.ep != nil {
		f.wq.EventUnregister(&f.entry)
		linger := tcpip.TCPUserTimeoutOption(lingerTime)
		_ = f.ep.SetSockOpt(&linger) // cannot fail for TCP
		f.ep.Close()
		f.ep = nil
	}
	f.relay.release()
	if f.established {
		l.g.counters.flows.Add(-1)
		l.g.record(layers.RecordFlowEnd, layers.ALEFlowEstablished.Layer(f.who.family()), &f.who, nil, func(r *layers.Record) {
			r.BytesOut, r.BytesIn, r.Duration, r.Detail = f.relay.bytesOut, f.relay.bytesIn, l.now.Sub(f.started), f.relay.detail
		})
	}
	f.who.flow.End()
}
