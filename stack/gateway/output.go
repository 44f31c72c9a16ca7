package gateway

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun"
)

// outbound is the link endpoint that netstack sees: it shows each packet to the packet layers on its way to the program, and
// passes it on to the device. Netstack calls it from the loop, from its processors and from its timers, often with an
// endpoint's lock held: nothing here calls back into an endpoint.
type outbound struct {
	*link.Endpoint
	g       *Gateway
	scratch sync.Pool // of *scratch, for the goroutines that are not the loop
}

func newOutbound(g *Gateway, ep *link.Endpoint) *outbound {
	return &outbound{Endpoint: ep, g: g, scratch: sync.Pool{New: func() any { return new(scratch) }}}
}

// WritePackets implements stack.LinkWriter.
//
// Hot path: four atomic loads where no filter is at the packet layers.
func (o *outbound) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	o.g.counters.packetsIn.Add(uint64(pkts.Len()))
	if !o.g.inboundWanted() && len(o.g.opts.Publish) == 0 {
		return o.Endpoint.WritePackets(pkts)
	}
	n := pkts.Len()
	var pass stack.PacketBufferList
	for _, pkt := range pkts.AsSlice() {
		if o.g.inboundPacket(pkt) {
			pass.PushBack(pkt)
		}
	}
	if pass.Len() == 0 {
		return n, nil
	}
	if _, err := o.Endpoint.WritePackets(pass); err != nil {
		return 0, err
	}
	return n, nil
}

// inboundWanted reports whether anybody looks at packets towards the programs.
func (g *Gateway) inboundWanted() bool {
	for _, f := range [2]layers.Family{layers.V4, layers.V6} {
		if g.wanted(layers.InboundIPPacket.Layer(f)) || g.wanted(layers.InboundTransport.Layer(f)) {
			return true
		}
	}
	return false
}

// inboundPacket raises inbound network and inbound transport for a packet of netstack. It reports whether it may go on.
func (g *Gateway) inboundPacket(pkt *stack.PacketBuffer) bool {
	s := g.out.scratch.Get().(*scratch)
	defer g.out.scratch.Put(s)
	n := pkt.Network()
	src, dst := addrOf(n.SourceAddress()), addrOf(n.DestinationAddress())
	who := subject{proto: uint8(pkt.TransportProtocolNumber), local: netip.AddrPortFrom(dst, 0), remote: netip.AddrPortFrom(src, 0)}
	t := pkt.TransportHeader().Slice()
	if len(t) >= 4 && (who.proto == wire.TCP || who.proto == wire.UDP) {
		who.remote = netip.AddrPortFrom(src, binary.BigEndian.Uint16(t))
		who.local = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:]))
	}
	v := layers.PacketView{
		IPHeader: pkt.NetworkHeader().Slice(), TransportHeader: t, Direction: layers.Inbound,
		State: layers.InjectionMark(pkt.Mark & 0x3fff), ChecksumPartial: pkt.GSOOptions.NeedsCsum,
	}
	s.parts = s.parts[:0]
	views, skip := pkt.AsViewList()
	skip += len(v.IPHeader) + len(t)
	for b := views.Front(); b != nil; b = b.Next() {
		part := b.AsSlice()
		if skip >= len(part) {
			skip -= len(part)
			continue
		}
		s.parts = append(s.parts, part[skip:len(part):len(part)])
		v.PayloadLen += len(part) - skip
		skip = 0
	}
	v.Payload = s.parts
	if pkt.GSOOptions.Type != stack.GSONone && v.PayloadLen > int(pkt.GSOOptions.MSS) {
		v.GSOSize = int(pkt.GSOOptions.MSS) // netstack has the options on packets of one segment too
	}
	return g.inboundLayers(s, &who, v) && (!isSYN(&who, t) || g.inboundSYN(s, &who, v))
}

// inboundLayers raises inbound network and inbound transport. The data of a TCP connection was indicated at the stream layer before
// netstack made segments of it: there the packet layers follow from the top down.
func (g *Gateway) inboundLayers(s *scratch, who *subject, v layers.PacketView) bool {
	kinds := [2]layers.Kind{layers.InboundIPPacket, layers.InboundTransport}
	if hasData(who, &v) {
		kinds[0], kinds[1] = kinds[1], kinds[0]
	}
	return g.inboundLayer(s, who, v, kinds[0]) && g.inboundLayer(s, who, v, kinds[1])
}

// inboundLayer raises one packet layer for a packet to a program.
func (g *Gateway) inboundLayer(s *scratch, who *subject, v layers.PacketView, kind layers.Kind) bool {
	id := kind.Layer(who.family())
	if !g.wanted(id) {
		return true
	}
	in := g.fill(s, kind, who, layers.Inbound)
	if g.engine.HasCallouts(id) || g.opts.Trace != nil {
		g.lend(s, v)
	}
	if d := g.decide(s); d.Blocked() {
		g.blockedPacket(in.Layer, who, &d)
		return false
	}
	return true
}

// hasData reports whether a packet carries bytes or the end of a TCP connection.
func hasData(who *subject, v *layers.PacketView) bool {
	if who.proto != wire.TCP || len(v.TransportHeader) < header.TCPMinimumSize {
		return false
	}
	return v.PayloadLen > 0 || header.TCP(v.TransportHeader).Flags().Contains(header.TCPFlagFin)
}

// isSYN reports whether a packet of netstack opens a connection to a program.
func isSYN(who *subject, transport []byte) bool {
	return who.proto == wire.TCP && len(transport) >= header.TCPMinimumSize &&
		header.TCP(transport).Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn
}

// unreachable is a kind of ICMP destination unreachable, with its code for either family.
type unreachable struct{ code4, code6 uint8 }

// Source: RFC 792; RFC 1812, 5.2.7.1; RFC 4443, 3.1.
var (
	unreachNet        = unreachable{0, 0}
	unreachHost       = unreachable{1, 3}
	unreachProtocol   = unreachable{2, 0xff}
	unreachPort       = unreachable{3, 4}
	unreachTooBig     = unreachable{4, 0xfe}
	unreachProhibited = unreachable{13, 1}
)

// replyUnreachable answers a packet of a program with an ICMP error from the stack's address, quoting it.
func (l *loop) replyUnreachable(p *packet, u unreachable, mtu int) {
	l.replyError(p, l.errorSource(p), icmpError(p.h.V6, u, mtu))
}

// errorSource is whose address an ICMP error about p carries: the stack's, as it is the program's gateway.
func (l *loop) errorSource(p *packet) netip.Addr {
	a := l.g.opts.Addr4
	if p.h.V6 {
		a = l.g.opts.Addr6
	}
	if !a.IsValid() {
		return p.h.Dst
	}
	return a
}

// icmpHeader is type, code and the 32 bits after the checksum of an ICMP error.
type icmpHeader struct {
	typ, code uint8
	info      uint32
}

func icmpError(v6 bool, u unreachable, mtu int) icmpHeader {
	switch {
	case !v6:
		return icmpHeader{uint8(header.ICMPv4DstUnreachable), u.code4, uint32(mtu)}
	case u == unreachTooBig:
		return icmpHeader{uint8(header.ICMPv6PacketTooBig), 0, uint32(mtu)}
	case u == unreachProtocol:
		// Parameter problem: unrecognised next header, pointing at it in a header without extensions.
		return icmpHeader{uint8(header.ICMPv6ParamProblem), 1, 6}
	default:
		return icmpHeader{uint8(header.ICMPv6DstUnreachable), u.code6, 0}
	}
}

// quoteMax is how much of the offending packet an ICMP error quotes at most. Source: RFC 1812, 4.3.2.3; RFC 4443, 2.4 (c).
const (
	quoteMax4 = 576 - 20 - 8
	quoteMax6 = 1280 - 40 - 8
)

// replyError builds an ICMP error about p and sends it to the program.
func (l *loop) replyError(p *packet, from netip.Addr, h icmpHeader) {
	quote := make([]byte, 0, quoteMax6)
	quote = append(quote, p.ip...)
	quote = append(quote, p.transport...)
	limit := quoteMax4
	if p.h.V6 {
		limit = quoteMax6
	}
	views, skip := p.buf.AsViewList()
	skip += p.h.PayloadStart
	for v := views.Front(); v != nil && len(quote) < limit; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		quote = append(quote, b[skip:]...)
		skip = 0
	}
	l.sendICMPError(from, p.h.Src, h, quote[:min(len(quote), limit)])
}

// sendICMPError sends an ICMP error that quotes a packet of a program.
func (l *loop) sendICMPError(from, to netip.Addr, h icmpHeader, quote []byte) {
	body := make([]byte, 8+len(quote))
	body[0], body[1] = h.typ, h.code
	binary.BigEndian.PutUint32(body[4:], h.info)
	copy(body[8:], quote)
	proto := uint8(wire.ICMP)
	if to.Is6() {
		proto = wire.ICMPv6
	}
	who := subject{proto: proto, local: netip.AddrPortFrom(to, uint16(h.typ)), remote: netip.AddrPortFrom(from, uint16(h.code))}
	l.sendToProgram(&who, buildPacket(from, to, proto, body), 0, layers.InboundICMPError)
}

// replyReset answers a segment of a program as a closed port does. Source: RFC 9293, 3.10.7.1.
func (l *loop) replyReset(p *packet) {
	in := header.TCP(p.transport)
	seg := make([]byte, header.TCPMinimumSize)
	f := header.TCPFields{SrcPort: p.remote.Port(), DstPort: p.local.Port(), DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagRst}
	if in.Flags().Contains(header.TCPFlagAck) {
		f.SeqNum = in.AckNumber()
	} else {
		f.Flags |= header.TCPFlagAck
		f.AckNum = in.SequenceNumber() + uint32(p.h.PayloadEnd-p.h.PayloadStart)
		if in.Flags()&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
			f.AckNum++
		}
	}
	header.TCP(seg).Encode(&f)
	who := subject{proto: wire.TCP, local: p.local, remote: p.remote}
	l.sendToProgram(&who, buildPacket(p.remote.Addr(), p.local.Addr(), wire.TCP, seg), 0, layers.InboundTransport)
}

// defaultTTL is what packets of the stack start with. Source: RFC 1700.
const defaultTTL = 64

// buildPacket puts an IP header in front of a transport message and computes all checksums.
func buildPacket(src, dst netip.Addr, proto uint8, message []byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(message))
		header.IPv4(b).Encode(&header.IPv4Fields{
			TotalLength: uint16(len(b) + len(message)), TTL: defaultTTL, Protocol: proto, SrcAddr: addressOf(src), DstAddr: addressOf(dst),
			Flags: header.IPv4FlagDontFragment,
		})
	} else {
		b = make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+len(message))
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(message)), TransportProtocol: tcpip.TransportProtocolNumber(proto), HopLimit: defaultTTL,
			SrcAddr: addressOf(src), DstAddr: addressOf(dst),
		})
	}
	b = append(b, message...)
	h, err := wire.Parse(b)
	if err != nil {
		panic("wfpstack: built a bad packet: " + err.Error())
	}
	h.SetChecksums(b)
	return b
}

// sendToProgram shows a whole packet to the packet layers and writes it to the device. kind is InboundICMPError for an error
// message, which has that layer in place of inbound transport.
func (l *loop) sendToProgram(who *subject, b []byte, mark layers.InjectionMark, kind layers.Kind) bool {
	g := l.g
	g.counters.packetsIn.Add(1)
	if g.inboundWanted() {
		h, err := wire.Parse(b)
		if err != nil {
			g.counters.drop(dropMalformed)
			return false
		}
		v := layers.PacketView{IPHeader: b[:h.TransportStart:h.TransportStart], TransportHeader: b[h.TransportStart:h.PayloadStart:h.PayloadStart],
			Payload: [][]byte{b[h.PayloadStart:]}, PayloadLen: len(b) - h.PayloadStart, Direction: layers.Inbound, State: mark}
		// An error message is at the network layer as any packet; its own layer is not raised yet.
		if kind == layers.InboundICMPError && !g.inboundLayer(&g.loopScratch, who, v, layers.InboundIPPacket) ||
			kind != layers.InboundICMPError && !g.inboundLayers(&g.loopScratch, who, v) {
			return false
		}
	}
	if len(b) <= int(g.link.MTU()) {
		return l.write(b)
	}
	h, err := wire.Parse(b)
	if err != nil {
		g.counters.drop(dropMalformed)
		return false
	}
	l.writeFragments(b, &h)
	return true
}

// write writes one whole packet to the device.
func (l *loop) write(b []byte) bool {
	s := &l.g.raw
	s.bufs[0] = b
	s.pkt[0] = tun.Packet{Bufs: s.bufs[:1]}
	_, err := l.g.link.WriteRaw(s.pkt[:])
	s.bufs[0] = nil
	if err != nil {
		l.g.counters.drop(dropDevice)
		return false
	}
	return true
}

// rawScratch describes one packet to the device.
type rawScratch struct {
	pkt  [1]tun.Packet
	bufs [1][]byte
}
