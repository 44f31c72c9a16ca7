package host

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/layers"
)

// isQuery reports whether a transport header is that of an ICMP message that is no error; those are at the layers what
// datagrams are.
func isQuery(proto uint8, h []byte) bool {
	switch {
	case len(h) < header.ICMPv4MinimumSize:
		return false
	case proto == uint8(header.ICMPv4ProtocolNumber):
		switch header.ICMPv4(h).Type() {
		case header.ICMPv4DstUnreachable, header.ICMPv4SrcQuench, header.ICMPv4Redirect, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
			return false
		}
		return true
	case proto == uint8(header.ICMPv6ProtocolNumber):
		// Below 128 are errors. Neighbour discovery and the like is between the stacks, and no program's.
		t := header.ICMPv6(h).Type()
		return t == header.ICMPv6EchoRequest || t == header.ICMPv6EchoReply
	default:
		return false
	}
}

// echo returns what an echo message is about.
func echo(proto uint8, h []byte) (id, seq uint16, request, ok bool) {
	if len(h) < header.ICMPv4MinimumSize {
		return 0, 0, false, false
	}
	id, seq = binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
	switch {
	case proto == uint8(header.ICMPv4ProtocolNumber):
		t := header.ICMPv4(h).Type()
		return id, seq, t == header.ICMPv4Echo, t == header.ICMPv4Echo || t == header.ICMPv4EchoReply
	case proto == uint8(header.ICMPv6ProtocolNumber):
		t := header.ICMPv6(h).Type()
		return id, seq, t == header.ICMPv6EchoRequest, t == header.ICMPv6EchoRequest || t == header.ICMPv6EchoReply
	default:
		return 0, 0, false, false
	}
}

// echoKey returns the tuple of the flow that an echo message belongs to: that of its request.
func echoKey(t *tuple, h []byte) (tuple, bool) {
	id, _, _, ok := echo(t.proto, h)
	if !ok {
		return tuple{}, false
	}
	k := *t
	k.id = id
	request := uint16(header.ICMPv4Echo)
	if t.proto == uint8(header.ICMPv6ProtocolNumber) {
		request = uint16(header.ICMPv6EchoRequest)
	}
	k.local, k.remote = netip.AddrPortFrom(t.local.Addr(), request), netip.AddrPortFrom(t.remote.Addr(), 0)
	return k, true
}

// fillEcho writes id and sequence number of an echo message, at the layers that have them.
func (s *Stack) fillEcho(e *event, pkt *stack.PacketBuffer) {
	if !e.in.Layer.HasMeta(layers.MetaICMPIDAndSequence) {
		return
	}
	id, seq, _, ok := echo(protocolOf(pkt), pkt.TransportHeader().Slice())
	if !ok {
		return
	}
	e.in.Meta.ICMPID, e.in.Meta.ICMPSeq = id, seq
	e.in.Meta.Mark(layers.MetaICMPIDAndSequence)
}
