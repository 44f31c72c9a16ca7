package host

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// hooks are the five live packet hooks of netstack. Each returns false to drop the packet, which is no error to its sender.
//
// The outbound ones run with the sending endpoint's lock held: nothing here calls an endpoint, injects, or waits.
type hooks struct{ s *Stack }

var _ stack.NFTablesInterface = hooks{}

// CheckPrerouting implements stack.NFTablesInterface: a packet came from the device and its headers were parsed.
func (h hooks) CheckPrerouting(pkt *stack.PacketBuffer, _ *stack.Route, af stack.AddressFamily) bool {
	// Netstack takes the link's word for the checksum of the IPv4 header too.
	if b := pkt.NetworkHeader().Slice(); af == stack.IP && len(b) >= header.IPv4MinimumSize && !header.IPv4(b).IsChecksumValid() {
		h.s.counters.badChecksum.Add(1)
		return false
	}
	return h.s.inboundIP(pkt, conv.HookFamily(af), false)
}

// CheckInput implements stack.NFTablesInterface: the packet is for us. Packets from ourselves skip prerouting, so that they are
// shown here.
func (h hooks) CheckInput(pkt *stack.PacketBuffer, _ *stack.Route, af stack.AddressFamily) bool {
	f := conv.HookFamily(af)
	if !h.s.wanted(layers.InboundIPPacket.Layer(f)) {
		return true
	}
	if src, _ := addresses(pkt); !h.s.isLocal(src) {
		return true
	}
	return h.s.inboundIP(pkt, f, true)
}

// CheckForward implements stack.NFTablesInterface; forwarding is off.
func (hooks) CheckForward(*stack.PacketBuffer, *stack.Route, stack.AddressFamily) bool { return false }

// CheckOutput implements stack.NFTablesInterface: a transport sends a packet.
func (h hooks) CheckOutput(pkt *stack.PacketBuffer, _ *stack.Route, _ stack.AddressFamily) bool {
	return h.s.outboundTransport(pkt)
}

// CheckPostrouting implements stack.NFTablesInterface: a packet leaves, not yet fragmented.
func (h hooks) CheckPostrouting(pkt *stack.PacketBuffer, _ *stack.Route, af stack.AddressFamily) bool {
	return h.s.outboundIP(pkt, conv.HookFamily(af))
}

// CheckIngress implements stack.NFTablesInterface; netstack never calls it.
func (hooks) CheckIngress(*stack.PacketBuffer, *stack.Route, stack.AddressFamily) bool { return true }

// CheckEgress implements stack.NFTablesInterface; netstack never calls it.
func (hooks) CheckEgress(*stack.PacketBuffer, *stack.Route, stack.AddressFamily) bool { return true }

// addresses returns the addresses of a packet whose network header is parsed or pushed.
//
// Hot path: does not allocate.
func addresses(pkt *stack.PacketBuffer) (src, dst netip.Addr) {
	switch b := pkt.NetworkHeader().Slice(); {
	case len(b) >= header.IPv4MinimumSize && b[0]>>4 == header.IPv4Version:
		return netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == header.IPv6Version:
		return netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	default:
		return netip.Addr{}, netip.Addr{}
	}
}

// protocolOf returns the transport protocol of a packet.
func protocolOf(pkt *stack.PacketBuffer) uint8 {
	if b := pkt.NetworkHeader().Slice(); len(b) >= header.IPv4MinimumSize && b[0]>>4 == header.IPv4Version {
		return b[9]
	}
	return uint8(pkt.TransportProtocolNumber) // behind extension headers
}

// tupleOf returns the tuple of a packet as the local endpoint sees it.
//
// Hot path: does not allocate.
func tupleOf(pkt *stack.PacketBuffer, dir layers.Direction) tuple {
	src, dst := addresses(pkt)
	t := tuple{proto: protocolOf(pkt)}
	var sport, dport uint16
	h := pkt.TransportHeader().Slice()
	switch {
	case t.isICMP():
		if len(h) >= 2 {
			// Type and code are those of the flow in both directions.
			t.local, t.remote = netip.AddrPortFrom(src, uint16(h[0])), netip.AddrPortFrom(dst, uint16(h[1]))
			if dir == layers.Inbound {
				t.local, t.remote = netip.AddrPortFrom(dst, uint16(h[0])), netip.AddrPortFrom(src, uint16(h[1]))
			}
			return t
		}
	case len(h) >= 4:
		sport, dport = binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:])
	}
	if dir == layers.Inbound {
		src, dst, sport, dport = dst, src, dport, sport
	}
	t.local, t.remote = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return t
}

// inboundIP raises inbound network for a packet, which may be a fragment.
//
// Hot path: one atomic load where no filter is at the layer.
func (s *Stack) inboundIP(pkt *stack.PacketBuffer, f layers.Family, loopback bool) bool {
	layer := layers.InboundIPPacket.Layer(f)
	if !s.wanted(layer) {
		return true
	}
	src, dst := addresses(pkt)
	t := tuple{proto: protocolOf(pkt), local: netip.AddrPortFrom(dst, 0), remote: netip.AddrPortFrom(src, 0)}
	return s.packetLayer(layer, pkt, &t, &facts{dir: layers.Inbound, loopback: loopback, flags: fragmentFlag(pkt, f)})
}

// outboundIP raises outbound network.
//
// Hot path: one atomic load where no filter is at the layer.
func (s *Stack) outboundIP(pkt *stack.PacketBuffer, f layers.Family) bool {
	layer := layers.OutboundIPPacket.Layer(f)
	if !s.wanted(layer) {
		return true
	}
	src, dst := addresses(pkt)
	t := tuple{proto: protocolOf(pkt), local: netip.AddrPortFrom(src, 0), remote: netip.AddrPortFrom(dst, 0)}
	return s.packetLayer(layer, pkt, &t, &facts{dir: layers.Outbound, loopback: s.isLocal(dst)})
}

// outboundTransport raises datagram data and outbound transport.
//
// Hot path: two atomic loads where no filter is at the layers, and a look at the TCP flags.
func (s *Stack) outboundTransport(pkt *stack.PacketBuffer) bool {
	h := pkt.TransportHeader().Slice()
	proto := protocolOf(pkt)
	syn := proto == uint8(header.TCPProtocolNumber) && len(h) >= header.TCPMinimumSize && header.TCP(h).Flags().Contains(header.TCPFlagSyn)
	f := layers.V4
	if b := pkt.NetworkHeader().Slice(); len(b) > 0 && b[0]>>4 == header.IPv6Version {
		f = layers.V6
	}
	data, transport := layers.DatagramData.Layer(f), layers.OutboundTransport.Layer(f)
	datagram := proto == uint8(header.UDPProtocolNumber) || isQuery(proto, h)
	wantData, wantTransport := datagram && s.wanted(data), s.wanted(transport)
	if !wantData && !wantTransport && !syn {
		return true
	}
	t := tupleOf(pkt, layers.Outbound)
	fl := s.flowOf(&t, h)
	if syn && fl != nil {
		fl.expectAck(header.TCP(h).SequenceNumber())
	}
	x := facts{dir: layers.Outbound, flow: fl, loopback: s.isLocal(t.remote.Addr())}
	if fl != nil {
		x.endpoint = fl.endpoint
	}
	if wantData && !s.packetLayer(data, pkt, &t, &x) {
		return false
	}
	return !wantTransport || s.packetLayer(transport, pkt, &t, &x)
}

// flowOf returns the flow that a packet belongs to, nil if it has none.
func (s *Stack) flowOf(t *tuple, transport []byte) *flow {
	if !t.isICMP() {
		return s.flows.get(t)
	}
	k, ok := echoKey(t, transport)
	if !ok {
		return nil
	}
	return s.flows.get(&k)
}

// packetLayer indicates a packet to one of the packet layers and reports whether it may go on.
func (s *Stack) packetLayer(layer layers.ID, pkt *stack.PacketBuffer, t *tuple, x *facts) bool {
	e := newEvent(layer)
	defer e.release()
	s.fill(e, t, x)
	s.show(e, pkt, x.dir, x.flow.id())
	s.fillEcho(e, pkt)
	d := s.decide(e)
	if !d.Blocked() {
		return true
	}
	if !d.Absorb {
		s.record(e, t, x, d)
		s.discarded(e, layers.DiscardFirewallPolicy, d.Filter)
	}
	return false
}

// id returns the flow's id, zero for none.
func (f *flow) id() layers.FlowID {
	if f == nil {
		return 0
	}
	return f.Flow.ID()
}

// fragmentFlag tells whether a received packet is a fragment.
func fragmentFlag(pkt *stack.PacketBuffer, f layers.Family) layers.Flags {
	b := pkt.NetworkHeader().Slice()
	if f == layers.V4 {
		if len(b) >= header.IPv4MinimumSize && (header.IPv4(b).More() || header.IPv4(b).FragmentOffset() != 0) {
			return layers.FlagIsFragment
		}
		return 0
	}
	if len(b) >= header.IPv6MinimumSize && hasFragmentHeader(b) {
		return layers.FlagIsFragment
	}
	return 0
}

// hasFragmentHeader walks the extension headers of an IPv6 packet, as far as its network header was parsed.
func hasFragmentHeader(b []byte) bool {
	next, at := b[6], header.IPv6MinimumSize
	for at+8 <= len(b) {
		switch header.IPv6ExtensionHeaderIdentifier(next) {
		case header.IPv6FragmentExtHdrIdentifier:
			return binary.BigEndian.Uint16(b[at+2:])&^6 != 0
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
			next, at = b[at], at+8+int(b[at+1])*8
		default:
			return false
		}
	}
	return false
}
