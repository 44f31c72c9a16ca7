package host

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// refusal is the answer to an inbound packet that was blocked and not silently.
type refusal struct {
	t     tuple
	ack   uint32 // TCP: what a reset acknowledges
	quote []byte // datagrams: the packet, as far as an ICMP error quotes it
}

// quoted is how much of a refused datagram an ICMP error quotes, after its IP header: enough for any socket to know it.
const quoted = 64

// refusalOf prepares the answer to a segment; the packet is not kept.
func refusalOf(g *segment) refusal {
	if g.t.proto == uint8(header.TCPProtocolNumber) {
		return refusal{t: g.t, ack: header.TCP(g.header).SequenceNumber() + 1}
	}
	ip := g.pkt.NetworkHeader().Slice()
	q := append(make([]byte, 0, len(ip)+len(g.header)+quoted), ip...)
	q = append(q, g.header...)
	q = append(q, g.pkt.Data().AsRange().Capped(quoted).ToSlice()...)
	return refusal{t: g.t, quote: q}
}

// refuseLater leaves a refusal to the worker.
func (s *Stack) refuseLater(r refusal) {
	if !s.queue.packet(s.opts.InjectionQueue, func(late bool) {
		if !late {
			s.refuse(r)
		}
	}) {
		s.counters.refusalsLost.Add(1)
	}
}

// refuse answers with a reset or an ICMP "administratively prohibited". It runs on the worker. ICMP messages are not answered, as
// errors about echo requests tell a prober more than silence does.
func (s *Stack) refuse(r refusal) {
	if r.t.isICMP() || r.t.proto != uint8(header.TCPProtocolNumber) && (r.quote == nil || !s.stack.AllowICMPMessage()) {
		return
	}
	local, remote := conv.Address(r.t.local.Addr()), conv.Address(r.t.remote.Addr())
	route, err := s.stack.FindRoute(0, local, remote, conv.NetworkProtocol(r.t.local.Addr()), false)
	if err != nil {
		return // nobody to tell
	}
	defer route.Release()
	var pkt *stack.PacketBuffer
	switch {
	case r.t.proto == uint8(header.TCPProtocolNumber):
		pkt = resetPacket(route, &r)
	case r.t.local.Addr().Is4():
		pkt = prohibited4(route, &r)
	default:
		pkt = prohibited6(route, &r)
	}
	defer pkt.DecRef()
	if err := route.WritePacket(stack.NetworkHeaderParams{Protocol: pkt.TransportProtocolNumber, TTL: ttl}, pkt); err != nil {
		s.opts.Logger.Debug("refusal not sent", "remote", r.t.remote, "error", err.String())
	}
}

// resetPacket is the reset that answers a SYN. Source: RFC 9293, 3.10.7.1.
func resetPacket(route *stack.Route, r *refusal) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: int(route.MaxHeaderLength()) + header.TCPMinimumSize})
	h := header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize))
	h.Encode(&header.TCPFields{
		SrcPort: r.t.local.Port(), DstPort: r.t.remote.Port(), AckNum: r.ack, DataOffset: header.TCPMinimumSize,
		Flags: header.TCPFlagRst | header.TCPFlagAck,
	})
	h.SetChecksum(^h.CalculateChecksum(route.PseudoHeaderChecksum(header.TCPProtocolNumber, header.TCPMinimumSize)))
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	return pkt
}

// prohibited4 is the ICMP error for a refused datagram. Source: RFC 1812, 5.2.7.1.
func prohibited4(route *stack.Route, r *refusal) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()) + header.ICMPv4MinimumSize, Payload: buffer.MakeWithData(r.quote),
	})
	h := header.ICMPv4(pkt.TransportHeader().Push(header.ICMPv4MinimumSize))
	clear(h)
	h.SetType(header.ICMPv4DstUnreachable)
	h.SetCode(header.ICMPv4AdminProhibited)
	h.SetChecksum(header.ICMPv4Checksum(h, pkt.Data().Checksum()))
	pkt.TransportProtocolNumber = header.ICMPv4ProtocolNumber
	return pkt
}

// prohibited6 is prohibited4 for IPv6. Source: RFC 4443, 3.1.
func prohibited6(route *stack.Route, r *refusal) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()) + header.ICMPv6DstUnreachableMinimumSize, Payload: buffer.MakeWithData(r.quote),
	})
	h := header.ICMPv6(pkt.TransportHeader().Push(header.ICMPv6DstUnreachableMinimumSize))
	clear(h)
	h.SetType(header.ICMPv6DstUnreachable)
	h.SetCode(header.ICMPv6Prohibited)
	h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: h, Src: route.LocalAddress(), Dst: route.RemoteAddress(),
		PayloadCsum: pkt.Data().Checksum(), PayloadLen: pkt.Data().Size(),
	}))
	pkt.TransportProtocolNumber = header.ICMPv6ProtocolNumber
	return pkt
}
