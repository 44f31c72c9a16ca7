package gateway

import (
	"container/list"
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
	// holder is the callout that pended; silent is the place among the silent ones.
	holder string
	silent *list.Element
	mark   layers.InjectionMark

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

// resetEarly resets a program that finished the handshake when netstack had not: aborting a half-open endpoint sends nothing.
func (f *tcpFlow) resetEarly() {
	if !f.relay.hasAck || f.inbound != nil {
		return
	}
	seg := make([]byte, header.TCPMinimumSize)
	header.TCP(seg).Encode(&header.TCPFields{SrcPort: f.who.remote.Port(), DstPort: f.who.local.Port(), SeqNum: f.relay.lastAck,
		DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagRst})
	f.l.sendToProgram(&f.who, buildPacket(f.who.remote.Addr(), f.who.local.Addr(), wire.TCP, seg), 0, layers.InboundTransport)
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
		f.resetEarly()
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
	if f.silent != nil {
		l.g.silent.Remove(f.silent)
		f.silent = nil
	}
	if l.g.tcp[f.key] == f {
		delete(l.g.tcp, f.key)
		l.g.sizeBuffers()
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
