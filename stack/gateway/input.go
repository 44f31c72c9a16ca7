package gateway

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/link"
)

// flowKey identifies a flow in a map; it is plain memory, so that hashing it is cheap. IPv4 addresses are mapped.
type flowKey struct {
	local, remote         [16]byte
	localPort, remotePort uint16
	proto                 uint8
}

func keyOf(proto uint8, local, remote netip.AddrPort) flowKey {
	return flowKey{local.Addr().As16(), remote.Addr().As16(), local.Port(), remote.Port(), proto}
}

// packet is one packet from the programs, with its headers found.
type packet struct {
	h   wire.Header
	buf *stack.PacketBuffer // headers consumed once consume was called; lent
	// local and remote are the packet's source and destination.
	local, remote netip.AddrPort
	ip, transport []byte // the headers
	gso           int    // bytes of payload a wire segment; 0: one segment
	reassembled   bool   // came in fragments
	mark          layers.InjectionMark
}

func (p *packet) proto() tcpip.NetworkProtocolNumber {
	if p.h.V6 {
		return header.IPv6ProtocolNumber
	}
	return header.IPv4ProtocolNumber
}

// input takes one packet that a program sent.
//
//	device → input ─┬─ fragment → netstack reassembles → reassembled ─┐
//	                └─────────── all others ──────────────────────────┴─ checks → transport → TCP | UDP | ICMP
func (l *loop) input(r *link.Received) {
	l.g.counters.packetsOut.Add(1)
	p := packet{buf: r.Packet, gso: int(r.Offload.GSOSize), mark: layers.InjectionMark(r.Packet.Mark & 0x3fff)}
	if drop := l.parse(&p); drop != dropNone {
		l.g.counters.drop(drop)
		return
	}
	if p.h.Fragment {
		// Netstack bounds what it keeps of fragments in bytes and time, and gives the whole packet to reassembled.
		l.g.link.Deliver(r.Proto, r.Packet)
		return
	}
	l.whole(&p)
}

// headLen covers the longest headers without extension headers: IPv4 60 + TCP 60 bytes.
const headLen = 120

// parse finds the headers and drops what no kernel would take.
//
// Source: RFC 1122, 3.2.1; RFC 8200, 3.
func (l *loop) parse(p *packet) dropReason {
	total := p.buf.Data().Size()
	head, ok := p.buf.Data().PullUp(min(total, headLen))
	if !ok {
		return dropMalformed
	}
	h, err := wire.ParseHead(head, total)
	if err != nil && total > headLen {
		// Extension headers may reach further: look at all of it once.
		if head, ok = p.buf.Data().PullUp(total); ok {
			h, err = wire.ParseHead(head, total)
		}
	}
	if err != nil {
		return dropMalformed
	}
	p.h = h
	p.local, p.remote = h.Source(), h.Destination()
	switch {
	case !h.V6 && wire.Sum(0, head[:h.TransportStart]) != 0xffff:
		return dropChecksum
	case martianSource(h.Src) || l.g.isStackAddr(h.Src):
		return dropMartian
	case martianDestination(h.Dst):
		return dropMartian
	}
	if h.PayloadEnd < total {
		p.buf.Data().CapLength(h.PayloadEnd) // what follows is padding
	}
	return dropNone
}

// martianSource reports addresses that no packet may come from. Source: RFC 1122, 3.2.1.3; RFC 4291, 2.7.
func martianSource(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a == broadcast4 || (a.Is4() && a.As4()[0] == 0) || a.Is4In6()
}

// martianDestination reports addresses that no packet may go to from here. Multicast and broadcast have no gateway.
func martianDestination(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsLoopback() || a.Is4In6() || (a.Is4() && a.As4()[0] == 0)
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// isStackAddr reports whether an address is the stack's own.
func (g *Gateway) isStackAddr(a netip.Addr) bool { return a == g.opts.Addr4 || a == g.opts.Addr6 }

// reassembled takes a packet back from netstack's reassembly. It runs on the loop, below Deliver.
//
// Netstack leaves the headers of the first fragment, with its checksum, and in IPv6 with its fragment header: the packet gets the
// header that it had before it was cut, without options and extension headers, which have been acted on.
func (l *loop) reassembled(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) {
	message := stack.PayloadSince(pkt.TransportHeader())
	defer message.Release()
	b, ok := rebuild(proto, pkt, message.AsSlice())
	if !ok {
		l.g.counters.drop(dropMalformed)
		return
	}
	whole := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b), Mark: pkt.Mark &^ link.MarkTrusted})
	defer whole.DecRef()
	p := packet{buf: whole, mark: layers.InjectionMark(pkt.Mark & 0x3fff), reassembled: true}
	if drop := l.parse(&p); drop != dropNone || p.h.Fragment {
		l.g.counters.drop(dropMalformed)
		return
	}
	l.whole(&p)
}

// rebuild puts an IP header in front of a reassembled message.
func rebuild(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer, message []byte) ([]byte, bool) {
	src, dst := pkt.Network().SourceAddress(), pkt.Network().DestinationAddress()
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		if len(message) > 0xffff {
			return nil, false
		}
		b := make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+len(message))
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(len(message)), TransportProtocol: proto,
			HopLimit: header.IPv6(pkt.NetworkHeader().Slice()).HopLimit(), SrcAddr: src, DstAddr: dst})
		return append(b, message...), true
	}
	if len(message) > 0xffff-header.IPv4MinimumSize {
		return nil, false
	}
	b := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(message))
	header.IPv4(b).Encode(&header.IPv4Fields{TotalLength: uint16(len(b) + len(message)), Protocol: uint8(proto),
		TTL: header.IPv4(pkt.NetworkHeader().Slice()).TTL(), SrcAddr: src, DstAddr: dst})
	header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	return append(b, message...), true
}

// whole takes a packet that is no fragment. The transport checksum is verified here unless the program's kernel vouches for it.
func (l *loop) whole(p *packet) {
	if p.buf.Mark&link.MarkTrusted == 0 && !l.checksumValid(p) {
		l.g.counters.drop(dropChecksum)
		return
	}
	if drop := p.consume(); drop != dropNone {
		l.g.counters.drop(drop)
		return
	}
	switch {
	case p.h.Dst.IsMulticast() || p.h.Dst == broadcast4:
		l.g.counters.drop(dropNoMulticast)
	case p.h.Protocol == wire.TCP:
		l.inputTCP(p)
	case p.h.Protocol == wire.UDP:
		l.inputUDP(p)
	case p.h.Protocol == wire.ICMP && !p.h.V6, p.h.Protocol == wire.ICMPv6 && p.h.V6:
		l.inputICMP(p)
	default:
		l.replyUnreachable(p, unreachProtocol, 0)
		l.g.counters.drop(dropProtocol)
	}
}

// checksumValid computes the transport checksum over the packet as it lies in memory.
func (l *loop) checksumValid(p *packet) bool {
	head, ok := p.buf.Data().PullUp(p.h.PayloadStart)
	if !ok {
		return false
	}
	switch p.h.Protocol {
	case wire.TCP, wire.UDP, wire.ICMP, wire.ICMPv6:
	default:
		return true
	}
	if p.h.Protocol == wire.UDP && binary.BigEndian.Uint16(head[p.h.TransportStart+6:]) == 0 {
		return !p.h.V6
	}
	sum := wire.Sum(0, head[p.h.TransportStart:p.h.PayloadStart])
	if p.h.Protocol != wire.ICMP {
		sum = wire.PseudoSum(p.h.Src, p.h.Dst, p.h.Protocol, p.h.PayloadEnd-p.h.TransportStart) + sum
	}
	sum = fold(fold(sum) + uint32(p.buf.Data().ChecksumAtOffset(p.h.PayloadStart)))
	return sum == 0xffff
}

func fold(s uint32) uint32 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return s
}

// consume moves the headers out of the data, as netstack's endpoints expect it.
func (p *packet) consume() dropReason {
	ip, ok := p.buf.NetworkHeader().Consume(p.h.TransportStart)
	if !ok {
		return dropMalformed
	}
	t, ok := p.buf.TransportHeader().Consume(p.h.PayloadStart - p.h.TransportStart)
	if !ok {
		return dropMalformed
	}
	p.ip, p.transport = ip, t
	p.buf.NetworkProtocolNumber = p.proto()
	p.buf.TransportProtocolNumber = tcpip.TransportProtocolNumber(p.h.Protocol)
	p.buf.NICID = nicID
	p.buf.RXChecksumValidated = true
	return dropNone
}

// wrapNetwork makes netstack's IP give what it would deliver to a transport to the loop instead. Only reassembled packets get
// there: everything else the loop takes before.
func (g *Gateway) wrapNetwork(f stack.NetworkProtocolFactory) stack.NetworkProtocolFactory {
	return func(s *stack.Stack) stack.NetworkProtocol { return &networkProtocol{f(s), g} }
}

type networkProtocol struct {
	stack.NetworkProtocol
	g *Gateway
}

// NewEndpoint implements stack.NetworkProtocol.
func (n *networkProtocol) NewEndpoint(nic stack.NetworkInterface, d stack.TransportDispatcher) stack.NetworkEndpoint {
	return n.NetworkProtocol.NewEndpoint(nic, &dispatcher{d, n.g})
}

// dispatcher takes what comes out of reassembly. ICMP passes netstack's checks before it gets here; of its messages netstack hands
// on echo requests, which are all that the loop takes.
type dispatcher struct {
	stack.TransportDispatcher
	g *Gateway
}

// DeliverTransportPacket implements stack.TransportDispatcher.
func (d *dispatcher) DeliverTransportPacket(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) stack.TransportPacketDisposition {
	d.g.loop.reassembled(proto, pkt)
	return stack.TransportPacketHandled
}

// DeliverTransportPacketWithDefaultHandlerResult implements stack.TransportDispatcherWithDefaultHandlerResult.
func (d *dispatcher) DeliverTransportPacketWithDefaultHandlerResult(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) (stack.TransportPacketDisposition, bool) {
	d.g.loop.reassembled(proto, pkt)
	return stack.TransportPacketHandled, true
}

// DeliverTransportError implements stack.TransportDispatcher; the loop has no use for netstack's view of errors.
func (*dispatcher) DeliverTransportError(_, _ tcpip.Address, _ tcpip.NetworkProtocolNumber, _ tcpip.TransportProtocolNumber, _ stack.TransportError, _ *stack.PacketBuffer) {
}
