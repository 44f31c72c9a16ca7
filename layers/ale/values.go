package ale

import (
	"net/netip"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// Flow5 is what a role knows of a flow or an endpoint. What it does not know is left zero; the fields are then empty.
type Flow5 struct {
	// Protocol is the transport protocol.
	Protocol uint8
	// Local and Remote are the endpoints. The port of an ICMP flow's Local is the type of the message, of its Remote the code.
	Local, Remote netip.AddrPort
	// Direction is that of the first packet: who began the flow.
	Direction layers.Direction

	// Interface is the index of the interface that owns the local address, zero where there is none.
	Interface uint32
	// InterfaceType is its IANA ifType.
	InterfaceType uint32
	// Compartment is the network namespace, by a number of the stack's choice.
	Compartment uint32
	// RemoteScope is the IPv6 zone of the remote address, by interface index.
	RemoteScope uint32
	// Loopback says that both endpoints are on this machine.
	Loopback bool
	// Flags are set beside those that follow from the rest.
	Flags layers.Flags

	// AppID is the path of the program behind the local endpoint.
	AppID string
	// PID is its process, zero where unknown.
	PID int
	// UserID is its uid, where UserKnown.
	UserID    uint32
	UserKnown bool
	// Names are the names of the remote address, latest first. Lent with the indication.
	Names []string

	// Flow is the flow's id, zero where there is none yet.
	Flow layers.FlowID
	// Endpoint and Parent identify the endpoint and its listener.
	Endpoint, Parent uint64
	// EchoID and EchoSeq are those of an ICMP echo message, where Echo.
	EchoID, EchoSeq uint16
	Echo            bool
}

// Family returns the address family of the flow; without a remote address that of the local one.
func (f *Flow5) Family() layers.Family {
	a := f.Remote.Addr()
	if !a.IsValid() {
		a = f.Local.Addr()
	}
	if a.Unmap().Is4() {
		return layers.V4
	}
	return layers.V6
}

// FillBind resets in to ALE resource assignment. An open address is empty there, and FlagIsWildcardBind tells of an open address
// or port; the role adds the flag itself where it has chosen the port already.
func FillBind(in *layers.Indication, f *Flow5) {
	fill(in, layers.ALEResourceAssignment, f, 0)
	if f.Local.Addr().IsUnspecified() || !f.Local.Addr().IsValid() || f.Local.Port() == 0 {
		in.Values.SetNum(layers.FieldFlags, uint64(in.Values.Flags()|layers.FlagIsWildcardBind))
	}
}

// FillListen resets in to ALE auth listen.
func FillListen(in *layers.Indication, f *Flow5) { fill(in, layers.ALEAuthListen, f, 0) }

// FillConnect resets in to ALE auth connect.
func FillConnect(in *layers.Indication, f *Flow5) {
	fill(in, layers.ALEAuthConnect, f, layers.Outbound)
}

// FillAccept resets in to ALE auth recv-accept.
func FillAccept(in *layers.Indication, f *Flow5) {
	fill(in, layers.ALEAuthRecvAccept, f, layers.Inbound)
}

// FillReauthorize makes a filled auth connect or auth recv-accept a reauthorisation. packet is the direction of the packet that
// caused it; op is the pended operation whose completion caused it, zero for none.
func FillReauthorize(in *layers.Indication, reason layers.ReauthorizeReason, packet layers.Direction, op layers.OperationID) {
	in.Values.SetNum(layers.FieldFlags, uint64(in.Values.Flags()|layers.FlagIsReauthorize))
	in.Values.SetNum(layers.FieldReauthorizeReason, uint64(reason))
	in.Meta.PacketDirection = packet
	in.Meta.Mark(layers.MetaPacketDirection)
	if op != 0 {
		in.Meta.Operation = op
		in.Meta.Mark(layers.MetaOperationID)
	}
}

// FillFlowEstablished resets in to ALE flow established.
func FillFlowEstablished(in *layers.Indication, f *Flow5) {
	fill(in, layers.ALEFlowEstablished, f, f.Direction)
}

// FillClosure resets in to ALE endpoint closure.
func FillClosure(in *layers.Indication, f *Flow5) { fill(in, layers.ALEEndpointClosure, f, 0) }

// FillRelease resets in to ALE resource release.
func FillRelease(in *layers.Indication, f *Flow5) { fill(in, layers.ALEResourceRelease, f, 0) }

// FillDatagram resets in to datagram data, for a packet of a direction.
func FillDatagram(in *layers.Indication, f *Flow5, packet layers.Direction) {
	fill(in, layers.DatagramData, f, packet)
}

// FillTransport resets in to inbound or outbound transport.
func FillTransport(in *layers.Indication, f *Flow5, packet layers.Direction) {
	kind := layers.OutboundTransport
	if packet == layers.Inbound {
		kind = layers.InboundTransport
	}
	fill(in, kind, f, packet)
}

// FillIPPacket resets in to the inbound or outbound network layer.
func FillIPPacket(in *layers.Indication, f *Flow5, packet layers.Direction) {
	kind := layers.OutboundIPPacket
	if packet == layers.Inbound {
		kind = layers.InboundIPPacket
	}
	fill(in, kind, f, packet)
}

// FillStream resets in to the stream layer. The direction field is the connection's; which way the bytes go is told by
// StreamIO.Flags.
func FillStream(in *layers.Indication, f *Flow5) { fill(in, layers.Stream, f, f.Direction) }

// fill sets what the flow knows and the layer has. packet is the direction of what is indicated.
//
// Hot path: no allocation.
func fill(in *layers.Indication, kind layers.Kind, f *Flow5, packet layers.Direction) {
	layer := kind.Layer(f.Family())
	in.Reset(layer)
	s := setter{v: &in.Values, has: layer.Fields()}
	local, remote := plain(f.Local.Addr()), plain(f.Remote.Addr())
	if local.IsValid() && !local.IsUnspecified() {
		s.address(layers.FieldLocalAddress, local)
		s.number(layers.FieldLocalAddressType, uint64(layers.AddressTypeOf(local)))
	}
	s.address(layers.FieldRemoteAddress, remote)
	icmp := f.Protocol == wire.ICMP || f.Protocol == wire.ICMPv6
	s.number(layers.FieldProtocol, uint64(f.Protocol))
	if f.Local.Port() != 0 || icmp { // type and code may be zero
		s.number(layers.FieldLocalPort, uint64(f.Local.Port()))
	}
	if f.Remote.IsValid() {
		s.number(layers.FieldRemotePort, uint64(f.Remote.Port()))
		destination := remote
		if packet == layers.Inbound {
			destination = local
		}
		s.number(layers.FieldDestinationAddressType, uint64(layers.AddressTypeOf(destination)))
	}
	if icmp {
		s.number(layers.FieldOriginalICMPType, uint64(f.Local.Port()))
	}
	direction := packet
	if kind == layers.Stream || kind == layers.ALEFlowEstablished {
		direction = f.Direction
	}
	s.number(layers.FieldDirection, uint64(direction))
	flags := f.Flags
	if f.Loopback {
		flags |= layers.FlagIsLoopback
	}
	s.number(layers.FieldFlags, uint64(flags))
	s.program(f)
	s.links(f, kind)
	fillMeta(in, f)
}

// plain strips what conditions do not compare: the zone, and the mapping of IPv4 into IPv6.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// setter sets the fields that a layer has.
type setter struct {
	v   *layers.Values
	has layers.FieldSet
}

func (s *setter) number(f layers.Field, n uint64) {
	if s.has.Has(f) {
		s.v.SetNum(f, n)
	}
}

func (s *setter) address(f layers.Field, a netip.Addr) {
	if s.has.Has(f) {
		s.v.SetAddress(f, a)
	}
}

// program sets what is known of the program and of names.
func (s *setter) program(f *Flow5) {
	if s.has.Has(layers.FieldAppID) {
		s.v.SetText(layers.FieldAppID, f.AppID)
	}
	if f.UserKnown {
		s.number(layers.FieldUserID, uint64(f.UserID))
	}
	if s.has.Has(layers.FieldPeerName) {
		s.v.SetPeerNames(f.Names)
	}
	if f.Compartment != 0 {
		s.number(layers.FieldCompartmentID, uint64(f.Compartment))
	}
}

// links sets the interface under all the names it has at the layer. Linux has no LUIDs; the index serves as one.
func (s *setter) links(f *Flow5, kind layers.Kind) {
	if f.Interface == 0 {
		return
	}
	index, typ := uint64(f.Interface), uint64(f.InterfaceType)
	s.number(layers.FieldLocalInterface, index)
	s.number(layers.FieldInterfaceIndex, index)
	s.number(layers.FieldSubInterfaceIndex, 0)
	s.number(layers.FieldInterfaceType, typ)
	s.number(layers.FieldLocalInterfaceIndex, index)
	s.number(layers.FieldLocalInterfaceType, typ)
	switch kind {
	case layers.ALEAuthConnect: // nothing arrived
		s.number(layers.FieldNextHopInterface, index)
		s.number(layers.FieldNextHopInterfaceIndex, index)
		s.number(layers.FieldNextHopInterfaceType, typ)
		s.number(layers.FieldNextHopSubInterfaceIndex, 0)
	case layers.ALEAuthRecvAccept: // nothing leaves
		s.number(layers.FieldArrivalInterface, index)
		s.number(layers.FieldArrivalInterfaceIndex, index)
		s.number(layers.FieldArrivalInterfaceType, typ)
		s.number(layers.FieldArrivalSubInterfaceIndex, 0)
	}
}

// fillMeta sets the metadata that the layer has and the flow knows.
func fillMeta(in *layers.Indication, f *Flow5) {
	m, layer := &in.Meta, in.Layer
	if f.Flow != 0 && layer.HasMeta(layers.MetaFlowID) {
		m.FlowID = f.Flow
		m.Mark(layers.MetaFlowID)
	}
	if f.PID != 0 && layer.HasMeta(layers.MetaProcessID) {
		m.ProcessID = f.PID
		m.Mark(layers.MetaProcessID)
	}
	if f.AppID != "" && layer.HasMeta(layers.MetaProcessPath) {
		m.ProcessPath = f.AppID
		m.Mark(layers.MetaProcessPath)
	}
	if f.Endpoint != 0 && layer.HasMeta(layers.MetaTransportEndpointHandle) {
		m.Endpoint = f.Endpoint
		m.Mark(layers.MetaTransportEndpointHandle)
	}
	if f.Parent != 0 && layer.HasMeta(layers.MetaParentEndpointHandle) {
		m.ParentEndpoint = f.Parent
		m.Mark(layers.MetaParentEndpointHandle)
	}
	if f.Compartment != 0 && layer.HasMeta(layers.MetaCompartmentID) {
		m.CompartmentID = f.Compartment
		m.Mark(layers.MetaCompartmentID)
	}
	if f.RemoteScope != 0 && layer.HasMeta(layers.MetaRemoteScopeID) {
		m.RemoteScopeID = f.RemoteScope
		m.Mark(layers.MetaRemoteScopeID)
	}
	if f.Echo && layer.HasMeta(layers.MetaICMPIDAndSequence) {
		m.ICMPID, m.ICMPSeq = f.EchoID, f.EchoSeq
		m.Mark(layers.MetaICMPIDAndSequence)
	}
}
