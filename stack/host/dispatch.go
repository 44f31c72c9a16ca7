package host

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
	"github.com/wfpstack/wfpstack/stack/link"
)

// network is a network protocol whose endpoints hand their packets to our dispatcher instead of the NIC.
type network struct {
	stack.NetworkProtocol
	s *Stack
}

// intercept wraps the factory of a network protocol. Only NewEndpoint is ours; the endpoint itself is the genuine one.
func (s *Stack) intercept(f stack.NetworkProtocolFactory) stack.NetworkProtocolFactory {
	return func(st *stack.Stack) stack.NetworkProtocol { return &network{f(st), s} }
}

// NewEndpoint implements stack.NetworkProtocol.
func (n *network) NewEndpoint(nic stack.NetworkInterface, d stack.TransportDispatcher) stack.NetworkEndpoint {
	return n.NetworkProtocol.NewEndpoint(nic, &dispatcher{TransportDispatcher: d, s: n.s})
}

// dispatcher sees every packet for a transport, reassembled, before netstack looks for its endpoint. It runs on the reader's
// goroutine, on the worker's for injected packets, and for loopback on that of the sender, with the sending endpoint locked: it
// calls no endpoint's methods but State, and neither sends nor waits.
type dispatcher struct {
	stack.TransportDispatcher
	s *Stack
}

var _ stack.TransportDispatcherWithDefaultHandlerResult = (*dispatcher)(nil)

// DeliverTransportPacket implements stack.TransportDispatcher.
func (d *dispatcher) DeliverTransportPacket(p tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) stack.TransportPacketDisposition {
	if !d.s.inbound(p, pkt) {
		return stack.TransportPacketHandled
	}
	return d.TransportDispatcher.DeliverTransportPacket(p, pkt)
}

// DeliverTransportPacketWithDefaultHandlerResult implements stack.TransportDispatcherWithDefaultHandlerResult. To say that an echo
// request was handled keeps netstack from answering it.
func (d *dispatcher) DeliverTransportPacketWithDefaultHandlerResult(p tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) (stack.TransportPacketDisposition, bool) {
	if !d.s.inbound(p, pkt) {
		return stack.TransportPacketHandled, true
	}
	if w, ok := d.TransportDispatcher.(stack.TransportDispatcherWithDefaultHandlerResult); ok {
		return w.DeliverTransportPacketWithDefaultHandlerResult(p, pkt)
	}
	return d.TransportDispatcher.DeliverTransportPacket(p, pkt), false
}

// segment is an inbound packet on its way through the dispatcher.
type segment struct {
	pkt    *stack.PacketBuffer
	header []byte // of the transport
	t      tuple
	fam    layers.Family
	x      facts
}

// inbound shows a packet to the inbound layers from transport on and reports whether netstack may have it.
//
// Hot path: TCP of an established flow costs a map look-up and an atomic load where no filter is at the layers.
func (s *Stack) inbound(p tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) bool {
	h := pkt.TransportHeader().Slice()
	if len(h) == 0 {
		return true // malformed or of an unknown protocol: netstack counts it, or answers it
	}
	g := segment{pkt: pkt, header: h, t: tupleOf(pkt, layers.Inbound), fam: conv.Family(pkt.NetworkProtocolNumber)}
	g.x.dir = layers.Inbound
	g.x.loopback = s.isLocal(g.t.remote.Addr())
	if !s.valid(&g) {
		return false
	}
	switch p {
	case header.TCPProtocolNumber:
		return s.inboundTCP(&g)
	case header.UDPProtocolNumber:
		return s.inboundUDP(&g)
	default:
		return s.inboundICMP(&g)
	}
}

// valid checks what netstack takes on trust: the link declares all checksums valid and marks the packets for which somebody
// vouched. Packets from ourselves need none. ICMPv6 is checked by netstack whatever the link says.
func (s *Stack) valid(g *segment) bool {
	ok, code := true, layers.DiscardTransportHeaderInvalid
	size := len(g.header) + g.pkt.Data().Size()
	switch g.t.proto {
	case uint8(header.TCPProtocolNumber):
		h := header.TCP(g.header)
		ok = len(h) >= header.TCPMinimumSize && int(h.DataOffset()) >= header.TCPMinimumSize && int(h.DataOffset()) <= size &&
			g.t.remote.Port() != 0 && g.t.local.Port() != 0
	case uint8(header.UDPProtocolNumber):
		n := int(header.UDP(g.header).Length())
		ok = len(g.header) >= header.UDPMinimumSize && n >= header.UDPMinimumSize && n <= size
	case uint8(header.ICMPv4ProtocolNumber):
		// Netstack looks at it too, and hands echo requests to the transport all the same.
		if ok = checksum.Checksum(g.header, g.pkt.Data().Checksum()) == 0xffff; !ok {
			code = layers.DiscardTransportChecksumInvalid
			s.counters.badChecksum.Add(1)
			s.discardInbound(g, layers.InboundTransport, code)
		}
		return ok
	default:
		return true
	}
	if !ok {
		s.counters.malformed.Add(1)
	} else if !g.x.loopback && g.pkt.Mark&link.MarkTrusted == 0 && !checksumValid(g) {
		ok, code = false, layers.DiscardTransportChecksumInvalid
		s.counters.badChecksum.Add(1)
	}
	if !ok {
		s.discardInbound(g, layers.InboundTransport, code)
	}
	return ok
}

// checksumValid verifies the transport checksum of a TCP segment or UDP datagram. Source: RFC 9293, 3.1; RFC 768; RFC 8200, 8.1.
func checksumValid(g *segment) bool {
	src, dst := conv.Address(g.t.remote.Addr()), conv.Address(g.t.local.Addr())
	size := uint16(len(g.header) + g.pkt.Data().Size())
	if g.t.proto == uint8(header.UDPProtocolNumber) {
		u := header.UDP(g.header)
		if u.Checksum() == 0 {
			return g.fam == layers.V4
		}
		size = u.Length()
		payload := int(size) - header.UDPMinimumSize
		if payload != g.pkt.Data().Size() {
			// Bytes behind the datagram are not part of it.
			return checksum.Checksum(g.pkt.Data().AsRange().Capped(payload).ToSlice(),
				checksum.Checksum(u, header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, size))) == 0xffff
		}
	}
	sum := header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(g.t.proto), src, dst, size)
	return checksum.Combine(checksum.Checksum(g.header, sum), g.pkt.Data().Checksum()) == 0xffff
}

// discardInbound shows the discard twin of an inbound layer for a packet that was never at the layer itself, and reports whether
// that was blocked.
func (s *Stack) discardInbound(g *segment, kind layers.Kind, code layers.DiscardCode) bool {
	layer := kind.Layer(g.fam)
	twin, _ := layer.Discard()
	if !s.wanted(twin) {
		return false
	}
	e := newEvent(layer)
	defer e.release()
	s.fill(e, &g.t, &g.x)
	s.show(e, g.pkt, layers.Inbound, g.x.flow.id())
	return s.discarded(e, code, 0)
}

// transport raises inbound transport for a segment and reports whether it may go on.
func (s *Stack) transport(g *segment, authorise bool) bool {
	layer := layers.InboundTransport.Layer(g.fam)
	if !s.wanted(layer) {
		return true
	}
	if !authorise {
		return s.packetLayer(layer, g.pkt, &g.t, &g.x)
	}
	x := g.x
	x.flags |= layers.FlagRequiresALEClassify
	return s.packetLayer(layer, g.pkt, &g.t, &x)
}

// nobody deals with a packet that no endpoint waits for: the discard layer sees it, and netstack answers it unless that blocks.
func (s *Stack) nobody(g *segment, kind layers.Kind, code layers.DiscardCode) bool {
	s.counters.noEndpoint.Add(1)
	return !s.discardInbound(g, kind, code)
}

// inboundTCP deals with a TCP segment.
func (s *Stack) inboundTCP(g *segment) bool {
	h := header.TCP(g.header)
	flags := h.Flags()
	opening := flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck) && !flags.Contains(header.TCPFlagRst)
	f := s.flows.get(&g.t)
	if opening && s.begins(f, g) {
		return s.inboundSYN(g)
	}
	if f == nil {
		if s.endpoint(&g.t) == nil {
			return s.nobody(g, layers.InboundTransport, layers.DiscardTransportEndpointNotFound)
		}
		return s.transport(g, false)
	}
	g.x.flow, g.x.endpoint = f, f.endpoint
	if !s.transport(g, false) {
		return false
	}
	if flags.Contains(header.TCPFlagRst) && f.state.Load() == flowAccepting {
		f.reset.Store(true)
	}
	if st := f.state.Load(); (st == flowConnecting || st == flowAccepting) && flags.Contains(header.TCPFlagAck) &&
		!flags.Contains(header.TCPFlagRst) && f.completes(h.AckNumber()) {
		s.establish(f)
	}
	return true
}

// begins reports whether a SYN asks for a new connection, given the flow of its tuple. A retransmission does not, nor one that
// netstack gives to the connection that is there. What is left of an old flow then ends.
func (s *Stack) begins(f *flow, g *segment) bool {
	switch {
	case f == nil:
		return true
	case !s.reusable(&g.t):
		return false
	case f.state.Load() == flowAccepting && f.isn == header.TCP(g.header).SequenceNumber():
		return false // netstack has answered with a cookie, or not at all
	}
	s.dropFlow(f)
	return true
}

// inboundSYN deals with the request for a new connection.
func (s *Stack) inboundSYN(g *segment) bool {
	l := s.listenerOf(&g.t)
	if l == nil {
		return s.nobody(g, layers.InboundTransport, layers.DiscardTransportEndpointNotFound)
	}
	g.x.endpoint = l.id
	if !s.transport(g, true) {
		return false
	}
	if !s.authoriseInbound(g, &g.t, header.TCP(g.header).SequenceNumber()) {
		return false
	}
	f := s.newFlow(g.t, layers.Inbound, flowAccepting, l.id)
	f.isn = header.TCP(g.header).SequenceNumber()
	return s.enter(f, true)
}

// inboundUDP deals with a datagram.
func (s *Stack) inboundUDP(g *segment) bool {
	f := s.flows.get(&g.t)
	if f == nil || f.state.Load() != flowEstablished {
		sock := s.socketOf(s.endpoint(&g.t))
		if sock == nil {
			return s.nobody(g, layers.InboundIPPacket, layers.DiscardNetworkPortUnreachable)
		}
		g.x.endpoint = sock.id
		if !s.transport(g, true) || !s.authoriseInbound(g, &g.t, 0) {
			return false
		}
		if f = s.beginDatagrams(g.t, layers.Inbound, sock, ""); f == nil {
			return false
		}
		g.x.flow = f
	} else {
		g.x.flow, g.x.endpoint = f, f.endpoint
		f.touch(s.opts.Clock())
		if !s.transport(g, false) {
			return false
		}
	}
	f.bytesIn.Add(uint64(g.pkt.Data().Size()))
	return s.datagram(g)
}

// datagram raises datagram data for an inbound packet.
func (s *Stack) datagram(g *segment) bool {
	layer := layers.DatagramData.Layer(g.fam)
	return !s.wanted(layer) || s.packetLayer(layer, g.pkt, &g.t, &g.x)
}

// inboundICMP deals with an ICMP message that is no error. Echo has flows; a request that begins one is authorised, and its reply
// belongs to it. Other messages are shown to the packet layers only.
func (s *Stack) inboundICMP(g *segment) bool {
	if !isQuery(g.t.proto, g.header) {
		return s.transport(g, false)
	}
	_, _, request, isEcho := echo(g.t.proto, g.header)
	if !isEcho {
		return s.transport(g, false) && s.datagram(g)
	}
	k, _ := echoKey(&g.t, g.header)
	f := s.flows.get(&k)
	switch {
	case f != nil && f.state.Load() == flowEstablished:
		g.x.flow = f
		f.touch(s.opts.Clock())
		if !s.transport(g, false) {
			return false
		}
	case request:
		if !s.transport(g, true) || !s.authoriseInbound(g, &k, 0) {
			return false
		}
		if f = s.beginDatagrams(k, layers.Inbound, nil, ""); f == nil {
			return false
		}
		g.x.flow = f
	default:
		if !s.transport(g, false) {
			return false
		}
	}
	return s.datagram(g)
}

// endpoint returns netstack's endpoint for a tuple, nil if there is none.
func (s *Stack) endpoint(t *tuple) stack.TransportEndpoint {
	return s.find(t, stack.TransportEndpointID{
		LocalPort: t.local.Port(), LocalAddress: conv.Address(t.local.Addr()),
		RemotePort: t.remote.Port(), RemoteAddress: conv.Address(t.remote.Addr()),
	})
}

func (s *Stack) find(t *tuple, id stack.TransportEndpointID) stack.TransportEndpoint {
	return s.stack.FindTransportEndpoint(conv.NetworkProtocol(t.local.Addr()), tcpip.TransportProtocolNumber(t.proto), id, nicDevice)
}

// listenerOf returns the listening socket that a tuple's SYN would reach, nil if there is none.
func (s *Stack) listenerOf(t *tuple) *socket {
	sock := s.socketOf(s.find(t, stack.TransportEndpointID{LocalPort: t.local.Port(), LocalAddress: conv.Address(t.local.Addr())}))
	if sock == nil || tcp.EndpointState(sock.ep.State()) != tcp.StateListen {
		return nil
	}
	return sock
}

// reusable reports whether netstack would take a new connection for a tuple that had one: its endpoint is gone, so that the
// listener is found in its place, or in TIME_WAIT, from where a SYN is passed to the listener.
func (s *Stack) reusable(t *tuple) bool {
	ep, ok := s.endpoint(t).(*tcp.Endpoint)
	if !ok {
		return true
	}
	switch ep.EndpointState() {
	case tcp.StateListen, tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
		return true
	default:
		return false
	}
}
