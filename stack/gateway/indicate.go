package gateway

import (
	"net/netip"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// subject is whom an indication is about.
type subject struct {
	proto         uint8
	local, remote netip.AddrPort
	flow          *layers.Flow
	inbound       bool // the remote began
}

func (s *subject) family() layers.Family {
	if s.local.Addr().Is4() {
		return layers.V4
	}
	return layers.V6
}

// scratch is an indication with everything it refers to, reused from one classification to the next. The loop has one; packets
// that netstack sends from other goroutines take one from a pool.
type scratch struct {
	in    layers.Indication
	pkt   layers.Packet
	io    layers.StreamIO
	names []string
	parts [][]byte
}

// wanted reports whether anybody looks at a layer. Where nobody does, an indication costs this one load.
func (g *Gateway) wanted(id layers.ID) bool { return g.engine.Active(id) || g.opts.Trace != nil }

// fill sets the values that the layer has. Source: "filtering-conditions-available-at-each-filtering-layer".
func (g *Gateway) fill(s *scratch, kind layers.Kind, who *subject, dir layers.Direction) *layers.Indication {
	in := &s.in
	in.Reset(kind.Layer(who.family()))
	v := &in.Values
	v.SetAddress(layers.FieldLocalAddress, who.local.Addr())
	v.SetNum(layers.FieldLocalAddressType, uint64(layers.AddressTypeOf(who.local.Addr())))
	v.SetNum(layers.FieldFlags, 0)
	if kind != layers.ALEResourceAssignment && kind != layers.ALEAuthListen {
		v.SetAddress(layers.FieldRemoteAddress, who.remote.Addr())
	}
	switch kind {
	case layers.InboundIPPacket, layers.OutboundIPPacket:
		return in
	case layers.ALEResourceAssignment:
		v.SetNum(layers.FieldProtocol, uint64(who.proto))
		v.SetNum(layers.FieldLocalPort, uint64(who.local.Port()))
		return in
	case layers.ALEAuthListen:
		v.SetNum(layers.FieldLocalPort, uint64(who.local.Port()))
		return in
	case layers.Stream, layers.StreamPacket:
	default:
		v.SetNum(layers.FieldProtocol, uint64(who.proto))
	}
	v.SetNum(layers.FieldLocalPort, uint64(who.local.Port()))
	v.SetNum(layers.FieldRemotePort, uint64(who.remote.Port()))
	switch kind {
	case layers.Stream, layers.DatagramData, layers.ALEFlowEstablished, layers.StreamPacket:
		v.SetNum(layers.FieldDirection, uint64(dir))
	case layers.ALEAuthConnect:
		v.SetNum(layers.FieldDestinationAddressType, uint64(layers.AddressTypeOf(who.remote.Addr())))
		g.fillNames(s, who.remote.Addr())
	}
	if who.flow != nil {
		in.Flow = who.flow
		in.Meta.FlowID = who.flow.ID()
		in.Meta.Mark(layers.MetaFlowID)
	}
	return in
}

// fillNames sets the names under which the remote was looked up.
func (g *Gateway) fillNames(s *scratch, remote netip.Addr) {
	if g.opts.Names == nil {
		return
	}
	s.names = g.opts.Names.AppendNames(s.names[:0], remote)
	s.in.Values.SetPeerNames(s.names)
}

// lend shows the packet to callouts, where the layer has any.
func (g *Gateway) lend(s *scratch, v layers.PacketView) {
	in := &s.in
	in.Meta.IPHeaderSize, in.Meta.TransportHeaderSize = len(v.IPHeader), len(v.TransportHeader)
	in.Meta.Mark(layers.MetaIPHeaderSize, layers.MetaTransportHeaderSize)
	v.Layer, v.Ledger = in.Layer, g.opts.Ledger
	if in.Flow != nil {
		v.Flow = in.Flow.ID()
	}
	s.pkt.Lend(v)
	in.Packet = &s.pkt
}

// decide classifies what was filled and ends the packet's loan.
func (g *Gateway) decide(s *scratch) layers.Decision {
	d := g.engine.Classify(&s.in)
	if g.opts.Trace != nil {
		g.opts.Trace(&s.in, &d)
	}
	if s.in.Packet != nil {
		s.pkt.Revoke()
	}
	return d
}

// record hands a decision to the recorder.
func (g *Gateway) record(t layers.RecordType, layer layers.ID, who *subject, d *layers.Decision, more func(*layers.Record)) {
	if g.opts.Recorder == nil {
		return
	}
	r := layers.Record{Time: g.clock(), Type: t, Layer: layer, Protocol: who.proto, Local: who.local, Remote: who.remote, Flow: who.flow.ID(), Decision: d}
	if who.inbound {
		r.Direction = layers.Inbound
	}
	if g.opts.Names != nil {
		if names := g.opts.Names.AppendNames(nil, who.remote.Addr()); len(names) > 0 {
			r.Name = names[0]
		}
	}
	if more != nil {
		more(&r)
	}
	g.opts.Recorder.Record(&r)
}

// view shows a packet from a program to callouts. The headers and payload are lent for as long as p is.
func (p *packet) view(s *scratch) layers.PacketView {
	s.parts = s.parts[:0]
	n := 0
	views, skip := p.buf.AsViewList()
	skip += p.h.PayloadStart
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		s.parts = append(s.parts, b[skip:len(b):len(b)])
		n += len(b) - skip
		skip = 0
	}
	partial := p.buf.Mark>>31 != 0 && p.h.Protocol != wire.ICMP
	return layers.PacketView{
		IPHeader: p.ip[:len(p.ip):len(p.ip)], TransportHeader: p.transport[:len(p.transport):len(p.transport)],
		Payload: s.parts, PayloadLen: n, GSOSize: p.gso, Direction: layers.Outbound, ChecksumPartial: partial, State: p.mark,
	}
}

// outboundPacket raises outbound transport and outbound network for a packet from a program, together, after reassembly. It
// reports whether the packet may go on.
//
// Hot path: two atomic loads where no filter is at these layers.
func (l *loop) outboundPacket(p *packet, who *subject) bool {
	f := who.family()
	for _, kind := range [2]layers.Kind{layers.OutboundTransport, layers.OutboundIPPacket} {
		id := kind.Layer(f)
		if !l.g.wanted(id) {
			continue
		}
		if !l.packetLayer(p, who, kind) {
			return false
		}
	}
	return true
}

func (l *loop) packetLayer(p *packet, who *subject, kind layers.Kind) bool {
	s := &l.g.loopScratch
	in := l.g.fill(s, kind, who, layers.Outbound)
	if l.g.engine.HasCallouts(in.Layer) || l.g.opts.Trace != nil {
		l.g.lend(s, p.view(s))
	}
	d := l.g.decide(s)
	if !d.Blocked() {
		return true
	}
	l.g.blockedPacket(in.Layer, who, &d)
	return false
}

// blockedPacket counts and records a packet that a filter stopped.
func (g *Gateway) blockedPacket(layer layers.ID, who *subject, d *layers.Decision) {
	if d.Absorb {
		g.counters.drop(dropAbsorbed)
		return
	}
	g.counters.drop(dropPolicy)
	g.record(layers.RecordVerdict, layer, who, d, nil)
}

// opID hands out the next operation id.
func (g *Gateway) opID() layers.OperationID { return layers.OperationID(g.lastOp.Add(1)) }

// newFlow makes a flow whose Abort is carried out by the loop.
func (g *Gateway) newFlow(abort func()) *layers.Flow {
	g.counters.flowsTotal.Add(1)
	return layers.NewFlow(layers.FlowID(g.lastFlow.Add(1)), func() { g.loop.post(abort) })
}
