package layers

import "net/netip"

// MetaField names one metadata value: data about an indication that callouts may read and that filters never test.
//
// Source: "metadata-fields", "metadata-fields-at-each-filtering-layer".
type MetaField uint8

// The metadata values.
const (
	// MetaDiscardReason is why a packet was dropped; discard layers only.
	MetaDiscardReason MetaField = iota
	// MetaFlowID is the flow's id.
	MetaFlowID
	// MetaIPHeaderSize is the size of the IP header in bytes, options and extension headers included.
	MetaIPHeaderSize
	// MetaTransportHeaderSize is the size of the transport header in bytes.
	MetaTransportHeaderSize
	// MetaProcessPath is the path of the program that owns the endpoint.
	MetaProcessPath
	// MetaProcessID is its process id.
	MetaProcessID
	// MetaToken is the identity of its user.
	MetaToken
	// MetaSubProcessTag tells services within one process apart.
	MetaSubProcessTag
	// MetaCompartmentID is the routing compartment.
	MetaCompartmentID
	// MetaFragmentData describes a fragment: identification, offset, length.
	MetaFragmentData
	// MetaPathMTU is the path MTU in bytes; outbound network layer.
	MetaPathMTU
	// MetaCompletionHandle says that the indication can be pended.
	MetaCompletionHandle
	// MetaTransportEndpointHandle identifies the endpoint.
	MetaTransportEndpointHandle
	// MetaParentEndpointHandle identifies the listener of an accepted endpoint.
	MetaParentEndpointHandle
	// MetaRemoteScopeID is the IPv6 zone of the remote address.
	MetaRemoteScopeID
	// MetaTransportControlData is the ancillary data of a send.
	MetaTransportControlData
	// MetaPacketDirection is the direction of the packet that triggered a reauthorisation.
	MetaPacketDirection
	// MetaALEClassifyRequired says that this packet is indicated to an ALE authorisation layer next: permit it here.
	MetaALEClassifyRequired
	// MetaTransportHeaderIncludeHeader is the IP header supplied by a raw send.
	MetaTransportHeaderIncludeHeader
	// MetaICMPIDAndSequence is id and sequence of an echo message.
	MetaICMPIDAndSequence
	// MetaOriginalDestination is the remote address before redirection.
	MetaOriginalDestination
	// MetaLocalRedirectTargetPID is the process of the local proxy.
	MetaLocalRedirectTargetPID
	// MetaRedirectRecordHandle leads to the redirect state.
	MetaRedirectRecordHandle
	// MetaForwardInboundPassThru says that a forwarded packet is locally destined.
	MetaForwardInboundPassThru
	// MetaForwardOutboundPassThru says that a forwarded packet is locally originated.
	MetaForwardOutboundPassThru
	// MetaSourceInterfaceIndex is the arrival interface.
	MetaSourceInterfaceIndex
	// MetaDestinationInterfaceIndex is the departure interface.
	MetaDestinationInterfaceIndex
	// MetaDestinationPrefix is the prefix of the route taken.
	MetaDestinationPrefix
	// MetaSystemFlags are internal to the platform; never present.
	MetaSystemFlags
	// MetaOperationID identifies a pended operation in the classification that its completion causes. Ours.
	MetaOperationID

	// NumMetaFields is the number of metadata values.
	NumMetaFields
)

// OperationID identifies one pended operation.
type OperationID uint64

// FragmentData describes a fragment. Units: offset and length in bytes.
type FragmentData struct {
	Identification uint32
	Offset, Length uint16
}

// Meta holds the metadata of one indication. A value means something only where Has says that it is there.
type Meta struct {
	has uint64

	FlowID              FlowID
	Operation           OperationID
	Endpoint            uint64 // MetaTransportEndpointHandle
	ParentEndpoint      uint64
	ProcessPath         string
	ProcessID           int
	IPHeaderSize        int // bytes
	TransportHeaderSize int // bytes
	PathMTU             int // bytes
	CompartmentID       uint32
	RemoteScopeID       uint32
	ICMPID, ICMPSeq     uint16
	PacketDirection     Direction
	Fragment            FragmentData
	OriginalDestination netip.AddrPort
	DiscardReason       DiscardReason
}

// Reset forgets everything.
func (m *Meta) Reset() { *m = Meta{} }

// Has reports whether a metadata value is present.
func (m *Meta) Has(f MetaField) bool { return m.has&(1<<f) != 0 }

// Mark says that metadata values are present. For the stack and for tests of callouts.
func (m *Meta) Mark(fields ...MetaField) {
	for _, f := range fields {
		m.has |= 1 << f
	}
}
