package host

import (
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/ale"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
	"github.com/wfpstack/wfpstack/stack/link"
)

// The mark of a packet buffer: markBits hold its layers.InjectionMark, markCompleted says that the completion of a pended operation
// let it in again. link.MarkTrusted lies above.
const (
	markBits      = 1<<14 - 1
	markCompleted = 1 << 14
)

// nicDevice and nicLoopback are the stack's two interfaces, and their indexes in the interface fields.
const (
	nicDevice   = 1
	nicLoopback = 2
)

// Interface types of the two. Source: IANA ifType.
const (
	ifTypeTunnel   = 131
	ifTypeLoopback = 24
)

// event is one indication with the memory for what it shows. It comes from a pool, because an indication is raised for each
// packet.
type event struct {
	in     layers.Indication
	packet layers.Packet
	parts  [][]byte
	names  [1]string
	header [headerRoom]byte // a header made up for a datagram that has none yet
}

// headerRoom holds an IPv6 and a UDP header.
const headerRoom = header.IPv6MinimumSize + header.UDPMinimumSize

var events = sync.Pool{New: func() any { return &event{parts: make([][]byte, 0, 8)} }}

// newEvent takes an event from the pool for a layer.
//
// Hot path: does not allocate once the pool is warm.
func newEvent(layer layers.ID) *event {
	e := events.Get().(*event)
	e.in.Reset(layer)
	return e
}

// release ends the loan of everything in the event and gives it back to the pool.
func (e *event) release() {
	e.packet.Revoke()
	e.in.Reset(0)
	clear(e.parts)
	e.parts = e.parts[:0]
	e.names[0] = ""
	events.Put(e)
}

// show lends the bytes of a packet buffer, whose headers are parsed or pushed, to the indication.
//
// Hot path: does not allocate; reads headers only through slices of their own view.
func (s *Stack) show(e *event, pkt *stack.PacketBuffer, dir layers.Direction, flow layers.FlowID) {
	ip, transport := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	// What lies before the data: link header (none here), network and transport header.
	views, skip := pkt.AsViewList()
	skip += len(ip) + len(transport)
	size := 0
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		b = b[skip:]
		skip = 0
		e.parts = append(e.parts, b[:len(b):len(b)])
		size += len(b)
	}
	if dir == layers.Inbound && e.in.Layer.Kind() != layers.InboundIPPacket {
		if whole := wholeHeader(ip, len(transport)+size); whole != nil {
			ip = whole
			e.in.Values.SetNum(layers.FieldFlags, uint64(e.in.Values.Flags()|layers.FlagIsReassembled))
		}
	}
	v := layers.PacketView{
		IPHeader: ip[:len(ip):len(ip)], TransportHeader: transport[:len(transport):len(transport)], Payload: e.parts, PayloadLen: size,
		GSOSize: segmentSize(pkt, size), Direction: dir, Layer: e.in.Layer, Flow: flow, Ledger: s.opts.Ledger,
		State: layers.InjectionMark(pkt.Mark & markBits),
	}
	// A checksum that is left to the device, or that the device left to us, is not in the packet; a clone gets a whole one.
	v.ChecksumPartial = dir == layers.Outbound && s.partialChecksums || dir == layers.Inbound && pkt.Mark&link.MarkTrusted != 0
	e.packet.Lend(v)
	e.in.Packet = &e.packet
	m := &e.in.Meta
	m.IPHeaderSize, m.TransportHeaderSize = len(ip), len(transport)
	m.Mark(layers.MetaIPHeaderSize, layers.MetaTransportHeaderSize)
}

// wholeHeader returns the IP header that a reassembled packet would have had in one piece, nil for a packet that came so. Netstack
// leaves an IPv4 header without its checksum, which was right when the fragment came, and an IPv6 one as that of a fragment.
//
// size is that of what follows the header. Units: bytes.
func wholeHeader(ip []byte, size int) []byte {
	switch {
	case len(ip) >= header.IPv4MinimumSize && ip[0]>>4 == header.IPv4Version:
		if header.IPv4(ip).IsChecksumValid() {
			return nil
		}
		h := header.IPv4(append([]byte(nil), ip...))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		return h
	case len(ip) > header.IPv6MinimumSize && ip[0]>>4 == header.IPv6Version && hasFragmentHeader(ip):
		h := withoutFragmentHeader(ip)
		header.IPv6(h).SetPayloadLength(uint16(len(h) - header.IPv6MinimumSize + size))
		return h
	default:
		return nil
	}
}

// withoutFragmentHeader copies an IPv6 header with its extension headers, but for the fragment header.
func withoutFragmentHeader(b []byte) []byte {
	out := append([]byte(nil), b[:header.IPv6MinimumSize]...)
	link, next, at := 6, b[6], header.IPv6MinimumSize // where the type of the next header is written
	for at+8 <= len(b) {
		size := 8
		if header.IPv6ExtensionHeaderIdentifier(next) == header.IPv6FragmentExtHdrIdentifier {
			out[link] = b[at]
		} else {
			size += int(b[at+1]) * 8
			if at+size > len(b) {
				break
			}
			link = len(out)
			out = append(out, b[at:at+size]...)
		}
		next, at = b[at], at+size
	}
	return out
}

// segmentSize returns how many bytes of payload a wire segment of a super-packet has, 0 for a packet that is one segment.
func segmentSize(pkt *stack.PacketBuffer, payload int) int {
	if g := &pkt.GSOOptions; g.Type != stack.GSONone && payload > int(g.MSS) {
		return int(g.MSS)
	}
	return 0
}

// showData lends a datagram that has no headers yet. It is shown with those that it will get, except for the checksums.
func (s *Stack) showData(e *event, t *tuple, data []byte) {
	ip, udp := makeHeaders(e.header[:], t, len(data))
	e.parts = append(e.parts, data[:len(data):len(data)])
	e.packet.Lend(layers.PacketView{
		IPHeader: ip, TransportHeader: udp, Payload: e.parts, PayloadLen: len(data), Direction: layers.Outbound, Layer: e.in.Layer,
		ChecksumPartial: true, Ledger: s.opts.Ledger,
	})
	e.in.Packet = &e.packet
	e.in.Meta.TransportHeaderSize = len(udp)
	e.in.Meta.Mark(layers.MetaTransportHeaderSize)
}

// makeHeaders writes IP and UDP header of an outbound datagram of size bytes into b.
func makeHeaders(b []byte, t *tuple, size int) (ip, udp []byte) {
	n := header.IPv4MinimumSize
	length := uint16(header.UDPMinimumSize + size)
	if t.local.Addr().Is4() {
		h := header.IPv4(b[:n])
		h.Encode(&header.IPv4Fields{
			TotalLength: uint16(n) + length, TTL: ttl, Protocol: t.proto, SrcAddr: conv.Address(t.local.Addr()), DstAddr: conv.Address(t.remote.Addr()),
		})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		n = header.IPv6MinimumSize
		header.IPv6(b[:n]).Encode(&header.IPv6Fields{
			PayloadLength: length, TransportProtocol: header.UDPProtocolNumber, HopLimit: ttl,
			SrcAddr: conv.Address(t.local.Addr()), DstAddr: conv.Address(t.remote.Addr()),
		})
	}
	u := header.UDP(b[n : n+header.UDPMinimumSize])
	u.Encode(&header.UDPFields{SrcPort: t.local.Port(), DstPort: t.remote.Port(), Length: length})
	return b[:n:n], u[:len(u):len(u)]
}

// ttl is the hop limit of packets that this package makes. Source: RFC 1700, IP time to live.
const ttl = 64

// facts are what an indication says beside its tuple.
type facts struct {
	flags    layers.Flags
	dir      layers.Direction // of the packet or connection
	loopback bool
	name     string // by which the program named the remote
	endpoint uint64
	parent   uint64
	flow     *flow
}

// fill empties the event and writes the fields and metadata that its layer has.
//
// Hot path: does not allocate.
func (s *Stack) fill(e *event, t *tuple, x *facts) {
	f := ale.Flow5{
		Protocol: t.proto, Local: t.local, Remote: t.remote, Direction: x.dir, Interface: nicDevice, InterfaceType: ifTypeTunnel, Compartment: 1,
		Loopback: x.loopback, Flags: x.flags, AppID: s.opts.App, PID: s.opts.PID, UserID: s.uid, UserKnown: true,
		Flow: x.flow.id(), Endpoint: x.endpoint, Parent: x.parent,
	}
	if x.loopback {
		f.Interface, f.InterfaceType = nicLoopback, ifTypeLoopback
	}
	if x.name != "" {
		e.names[0] = x.name
		f.Names = e.names[:]
	}
	in := &e.in
	switch kind := in.Layer.Kind(); kind {
	case layers.InboundIPPacket, layers.OutboundIPPacket:
		ale.FillIPPacket(in, &f, x.dir)
	case layers.InboundTransport, layers.OutboundTransport:
		ale.FillTransport(in, &f, x.dir)
	case layers.DatagramData:
		ale.FillDatagram(in, &f, x.dir)
	case layers.ALEResourceAssignment:
		ale.FillBind(in, &f)
	case layers.ALEAuthListen:
		ale.FillListen(in, &f)
	case layers.ALEAuthConnect:
		if x.name != "" {
			f.Flags |= layers.FlagIsNameAppSpecified
		}
		ale.FillConnect(in, &f)
	case layers.ALEAuthRecvAccept:
		ale.FillAccept(in, &f)
	case layers.ALEFlowEstablished:
		ale.FillFlowEstablished(in, &f)
	case layers.ALEEndpointClosure:
		ale.FillClosure(in, &f)
	case layers.ALEResourceRelease:
		ale.FillRelease(in, &f)
	case layers.Stream:
		ale.FillStream(in, &f)
	default:
		panic("host: no such layer is raised here: " + kind.String())
	}
	if x.flow != nil {
		in.Flow = x.flow.Flow
	}
	if x.flags&layers.FlagRequiresALEClassify != 0 && in.Layer.HasMeta(layers.MetaALEClassifyRequired) {
		in.Meta.Mark(layers.MetaALEClassifyRequired)
	}
}

// decide classifies, shows the result to the trace, and counts a block.
func (s *Stack) decide(e *event) layers.Decision {
	d := s.engine.Classify(&e.in)
	s.trace(e, d)
	if d.Blocked() {
		s.counters.blocked.Add(1)
		if d.Absorb {
			s.counters.absorbed.Add(1)
		}
	}
	return d
}

// trace shows an indication and its decision to Options.Trace. The decision is copied here, so that it need not be on the heap
// where nobody traces.
func (s *Stack) trace(e *event, d layers.Decision) {
	if s.opts.Trace != nil {
		shown := d
		s.opts.Trace(&e.in, &shown)
	}
}

// wanted reports whether a layer has to be indicated at all.
//
// Hot path: one atomic load.
func (s *Stack) wanted(layer layers.ID) bool {
	return s.opts.Trace != nil || s.engine.Active(layer)
}

// record writes a decision down: at the ALE layers always, elsewhere a block.
func (s *Stack) record(e *event, t *tuple, x *facts, d layers.Decision) {
	r := layers.Record{
		Time: s.opts.Clock(), Type: layers.RecordVerdict, Layer: e.in.Layer, Flow: e.in.Flow.ID(), Operation: e.in.Meta.Operation,
		Direction: x.dir, Protocol: t.proto, Local: t.local, Remote: t.remote, Name: x.name, App: s.opts.App, PID: s.opts.PID, Decision: &d,
	}
	s.opts.Recorder.Record(&r)
}

// discarded shows the discard twin of the event's layer, after a block that no callout took responsibility for. It reports
// whether the discard layer blocked as well, which suppresses the answer to a packet that nobody waits for.
func (s *Stack) discarded(e *event, code layers.DiscardCode, by layers.FilterID) bool {
	twin, ok := e.in.Layer.Discard()
	if !ok || !s.wanted(twin) {
		return false
	}
	e.in.Layer = twin
	e.in.Pender = nil
	e.in.Meta.DiscardReason = layers.DiscardBy(code, by)
	e.in.Meta.Mark(layers.MetaDiscardReason)
	d := s.engine.Classify(&e.in)
	s.trace(e, d)
	return d.Blocked()
}

// isLocal reports whether an address is one of the stack's own.
func (s *Stack) isLocal(a netip.Addr) bool {
	_, ok := s.own[a]
	return ok || a.IsLoopback()
}
