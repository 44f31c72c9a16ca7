package layers

import "fmt"

// ID names one layer of one address family, a point in the stack where filters are evaluated. The fourteen classic layers
// occupy four consecutive numbers each, in the order V4, V4 discard, V6, V6 discard; the newer ones have no discard twin.
// The zero ID is InboundIPPacketV4, so an ID is never used as "unset".
//
// Source: "management-filtering-layer-identifiers", "run-time-filtering-layer-identifiers".
type ID uint16

// The layers. A name ending in Discard is the twin that is indicated once for each packet or operation dropped at the layer
// whose name precedes it.
const (
	// InboundIPPacketV4 is hit by every received IPv4 packet right after its IP header was parsed, before reassembly.
	InboundIPPacketV4 ID = iota
	// InboundIPPacketV4Discard is hit by each packet dropped at InboundIPPacketV4.
	InboundIPPacketV4Discard
	// InboundIPPacketV6 is InboundIPPacketV4 for IPv6.
	InboundIPPacketV6
	// InboundIPPacketV6Discard is hit by each packet dropped at InboundIPPacketV6.
	InboundIPPacketV6Discard

	// OutboundIPPacketV4 is hit by every sent IPv4 packet, with its full IP header, just before the fragmentation check.
	OutboundIPPacketV4
	// OutboundIPPacketV4Discard is hit by each packet dropped at OutboundIPPacketV4.
	OutboundIPPacketV4Discard
	// OutboundIPPacketV6 is OutboundIPPacketV4 for IPv6.
	OutboundIPPacketV6
	// OutboundIPPacketV6Discard is hit by each packet dropped at OutboundIPPacketV6.
	OutboundIPPacketV6Discard

	// IPForwardV4 is hit by a received IPv4 packet that is about to be forwarded.
	IPForwardV4
	// IPForwardV4Discard is hit by each packet dropped at IPForwardV4.
	IPForwardV4Discard
	// IPForwardV6 is IPForwardV4 for IPv6.
	IPForwardV6
	// IPForwardV6Discard is hit by each packet dropped at IPForwardV6.
	IPForwardV6Discard

	// InboundTransportV4 is hit after the transport header of a received, reassembled packet was parsed and before the
	// transport processes it. TCP (every segment), UDP, ICMP that is no error, and other protocols.
	InboundTransportV4
	// InboundTransportV4Discard is hit by each packet dropped at InboundTransportV4, also when no endpoint wants it.
	InboundTransportV4Discard
	// InboundTransportV6 is InboundTransportV4 for IPv6.
	InboundTransportV6
	// InboundTransportV6Discard is hit by each packet dropped at InboundTransportV6.
	InboundTransportV6Discard

	// OutboundTransportV4 is hit by every packet that a transport hands to the network layer, resets and errors included.
	OutboundTransportV4
	// OutboundTransportV4Discard is hit by each packet dropped at OutboundTransportV4.
	OutboundTransportV4Discard
	// OutboundTransportV6 is OutboundTransportV4 for IPv6.
	OutboundTransportV6
	// OutboundTransportV6Discard is hit by each packet dropped at OutboundTransportV6.
	OutboundTransportV6Discard

	// StreamV4 is hit by the TCP payload bytes of a connection, per direction and in order, and by FIN and RST as indications
	// of zero bytes. Handshake, pure acknowledgements and retransmissions are not indicated.
	StreamV4
	// StreamV4Discard is reserved: blocked stream bytes are counted, not indicated.
	StreamV4Discard
	// StreamV6 is StreamV4 for IPv6.
	StreamV6
	// StreamV6Discard is reserved, as StreamV4Discard.
	StreamV6Discard

	// DatagramDataV4 is hit by every UDP datagram and non-error ICMP message in both directions, also after its flow was authorised.
	DatagramDataV4
	// DatagramDataV4Discard is hit by each datagram dropped at DatagramDataV4.
	DatagramDataV4Discard
	// DatagramDataV6 is DatagramDataV4 for IPv6.
	DatagramDataV6
	// DatagramDataV6Discard is hit by each datagram dropped at DatagramDataV6.
	DatagramDataV6Discard

	// InboundICMPErrorV4 is hit by a received ICMP error meant for a transport.
	InboundICMPErrorV4
	// InboundICMPErrorV4Discard is hit by each message dropped at InboundICMPErrorV4.
	InboundICMPErrorV4Discard
	// InboundICMPErrorV6 is InboundICMPErrorV4 for IPv6.
	InboundICMPErrorV6
	// InboundICMPErrorV6Discard is hit by each message dropped at InboundICMPErrorV6.
	InboundICMPErrorV6Discard

	// OutboundICMPErrorV4 is hit by an ICMP error made by the stack, before OutboundTransportV4.
	OutboundICMPErrorV4
	// OutboundICMPErrorV4Discard is hit by each message dropped at OutboundICMPErrorV4.
	OutboundICMPErrorV4Discard
	// OutboundICMPErrorV6 is OutboundICMPErrorV4 for IPv6.
	OutboundICMPErrorV6
	// OutboundICMPErrorV6Discard is hit by each message dropped at OutboundICMPErrorV6.
	OutboundICMPErrorV6Discard

	// ALEResourceAssignmentV4 is hit by a bind, explicit or implicit, before the port is taken.
	ALEResourceAssignmentV4
	// ALEResourceAssignmentV4Discard is hit by each bind refused at ALEResourceAssignmentV4.
	ALEResourceAssignmentV4Discard
	// ALEResourceAssignmentV6 is ALEResourceAssignmentV4 for IPv6.
	ALEResourceAssignmentV6
	// ALEResourceAssignmentV6Discard is hit by each bind refused at ALEResourceAssignmentV6.
	ALEResourceAssignmentV6Discard

	// ALEAuthListenV4 is hit by a TCP listen.
	ALEAuthListenV4
	// ALEAuthListenV4Discard is hit by each listen refused at ALEAuthListenV4.
	ALEAuthListenV4Discard
	// ALEAuthListenV6 is ALEAuthListenV4 for IPv6.
	ALEAuthListenV6
	// ALEAuthListenV6Discard is hit by each listen refused at ALEAuthListenV6.
	ALEAuthListenV6Discard

	// ALEAuthRecvAcceptV4 is hit by a SYN that reaches a listener and by the first datagram from a remote, before anything is
	// answered; and by reauthorisation of such flows.
	ALEAuthRecvAcceptV4
	// ALEAuthRecvAcceptV4Discard is hit by each operation refused at ALEAuthRecvAcceptV4.
	ALEAuthRecvAcceptV4Discard
	// ALEAuthRecvAcceptV6 is ALEAuthRecvAcceptV4 for IPv6.
	ALEAuthRecvAcceptV6
	// ALEAuthRecvAcceptV6Discard is hit by each operation refused at ALEAuthRecvAcceptV6.
	ALEAuthRecvAcceptV6Discard

	// ALEAuthConnectV4 is hit by a TCP connect and by the first datagram to a remote, before anything leaves; and by
	// reauthorisation of such flows.
	ALEAuthConnectV4
	// ALEAuthConnectV4Discard is hit by each operation refused at ALEAuthConnectV4.
	ALEAuthConnectV4Discard
	// ALEAuthConnectV6 is ALEAuthConnectV4 for IPv6.
	ALEAuthConnectV6
	// ALEAuthConnectV6Discard is hit by each operation refused at ALEAuthConnectV6.
	ALEAuthConnectV6Discard

	// ALEFlowEstablishedV4 is hit when a TCP handshake finished, and by other protocols right after they were authorised. It is
	// the place to attach a flow context.
	ALEFlowEstablishedV4
	// ALEFlowEstablishedV4Discard is hit by each flow closed at ALEFlowEstablishedV4.
	ALEFlowEstablishedV4Discard
	// ALEFlowEstablishedV6 is ALEFlowEstablishedV4 for IPv6.
	ALEFlowEstablishedV6
	// ALEFlowEstablishedV6Discard is hit by each flow closed at ALEFlowEstablishedV6.
	ALEFlowEstablishedV6Discard

	// ALEResourceReleaseV4 is hit once for each ALEResourceAssignmentV4 when that resource is freed.
	ALEResourceReleaseV4
	// ALEResourceReleaseV6 is ALEResourceReleaseV4 for IPv6.
	ALEResourceReleaseV6
	// ALEEndpointClosureV4 is hit once for each authorised TCP connection, listening socket or datagram endpoint that closes.
	ALEEndpointClosureV4
	// ALEEndpointClosureV6 is ALEEndpointClosureV4 for IPv6.
	ALEEndpointClosureV6
	// ALEConnectRedirectV4 is hit before ALEAuthConnectV4 and may change the remote address of this flow.
	ALEConnectRedirectV4
	// ALEConnectRedirectV6 is ALEConnectRedirectV4 for IPv6.
	ALEConnectRedirectV6
	// ALEBindRedirectV4 is hit before ALEResourceAssignmentV4 and may change the local address of the endpoint.
	ALEBindRedirectV4
	// ALEBindRedirectV6 is ALEBindRedirectV4 for IPv6.
	ALEBindRedirectV6
	// StreamPacketV4 is hit by every TCP packet of a connection, handshake and flow control included.
	StreamPacketV4
	// StreamPacketV6 is StreamPacketV4 for IPv6.
	StreamPacketV6
	// NameResolutionCacheV4 is only looked up: the names recently resolved to an IPv4 address.
	NameResolutionCacheV4
	// NameResolutionCacheV6 is NameResolutionCacheV4 for IPv6.
	NameResolutionCacheV6

	// NumLayers is the number of layers; every ID is below it.
	NumLayers
)

// firstNewer is the first layer without a discard twin; from here on there are two IDs a kind.
const firstNewer = ALEResourceReleaseV4

// Kind is a layer without its family and without the discard bit: ALEAuthConnectV4, its V6 form and their discard twins
// have one Kind.
type Kind uint8

// The kinds of layer, in the order of the IDs. Each is documented at its V4 ID.
const (
	InboundIPPacket Kind = iota
	OutboundIPPacket
	IPForward
	InboundTransport
	OutboundTransport
	Stream
	DatagramData
	InboundICMPError
	OutboundICMPError
	ALEResourceAssignment
	ALEAuthListen
	ALEAuthRecvAccept
	ALEAuthConnect
	ALEFlowEstablished
	ALEResourceRelease
	ALEEndpointClosure
	ALEConnectRedirect
	ALEBindRedirect
	StreamPacket
	NameResolutionCache

	// NumKinds is the number of kinds.
	NumKinds
)

// kindNames are the names used in policy files, events and messages.
var kindNames = [NumKinds]string{
	"inbound_ippacket", "outbound_ippacket", "ipforward", "inbound_transport", "outbound_transport", "stream",
	"datagram_data", "inbound_icmp_error", "outbound_icmp_error", "ale_resource_assignment", "ale_auth_listen",
	"ale_auth_recv_accept", "ale_auth_connect", "ale_flow_established", "ale_resource_release", "ale_endpoint_closure",
	"ale_connect_redirect", "ale_bind_redirect", "stream_packet", "name_resolution_cache",
}

// String returns the name used in policy files and events, such as ale_auth_connect.
func (k Kind) String() string {
	if k < NumKinds {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Layer returns the layer of this kind for a family.
func (k Kind) Layer(f Family) ID {
	if k <= ALEFlowEstablished {
		return ID(k)*4 + ID(f)*2
	}
	return firstNewer + ID(k-ALEResourceRelease)*2 + ID(f)
}

// HasDiscard reports whether the kind has discard twins.
func (k Kind) HasDiscard() bool { return k <= ALEFlowEstablished }

// KindByName finds a kind by the name that String prints.
func KindByName(name string) (Kind, bool) {
	for k, n := range kindNames {
		if n == name {
			return Kind(k), true
		}
	}
	return 0, false
}

// Family is an address family.
type Family uint8

// The address families.
const (
	V4 Family = iota
	V6
)

// String returns "v4" or "v6".
func (f Family) String() string {
	if f == V6 {
		return "v6"
	}
	return "v4"
}

// Kind returns the layer's kind.
func (id ID) Kind() Kind {
	if id < firstNewer {
		return Kind(id / 4)
	}
	return ALEResourceRelease + Kind((id-firstNewer)/2)
}

// Family returns the layer's address family.
func (id ID) Family() Family {
	if id < firstNewer {
		return Family(id / 2 % 2)
	}
	return Family((id - firstNewer) % 2)
}

// IsDiscard reports whether the layer is the discard twin of another.
func (id ID) IsDiscard() bool { return id < firstNewer && id%2 == 1 }

// Discard returns the discard twin of the layer; ok is false for a layer that has none.
func (id ID) Discard() (twin ID, ok bool) {
	if id >= firstNewer || id.IsDiscard() {
		return 0, false
	}
	return id + 1, true
}

// Valid reports whether id names a layer.
func (id ID) Valid() bool { return id < NumLayers }

// String returns the name used in policy files and events, such as ale_auth_connect_v4 or inbound_transport_v6_discard.
func (id ID) String() string {
	if !id.Valid() {
		return fmt.Sprintf("layer(%d)", uint16(id))
	}
	s := id.Kind().String() + "_" + id.Family().String()
	if id.IsDiscard() {
		s += "_discard"
	}
	return s
}

// LayerByName finds a layer by the name that String prints.
func LayerByName(name string) (ID, bool) {
	for id := range NumLayers {
		if id.String() == name {
			return id, true
		}
	}
	return 0, false
}
