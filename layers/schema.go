package layers

// The schema tells which fields and which metadata each kind of layer has. It is the same for both families, and a discard
// twin has the fields of its parent.
//
// Source: "filtering-conditions-available-at-each-filtering-layer", "metadata-fields-at-each-filtering-layer".

// packetFields are common to the layers that show single packets.
var packetFields = setOf(FieldLocalAddress, FieldRemoteAddress, FieldLocalInterface, FieldInterfaceIndex, FieldSubInterfaceIndex,
	FieldFlags, FieldInterfaceType, FieldTunnelType, FieldCompartmentID)

// programFields are common to the ALE layers.
var programFields = setOf(FieldAppID, FieldUserID, FieldLocalAddress, FieldLocalAddressType, FieldLocalPort, FieldFlags,
	FieldPackageID, FieldFQBN, FieldCompartmentID)

// remoteFields are common to the ALE layers that know a remote endpoint.
var remoteFields = programFields.with(FieldProtocol, FieldRemoteAddress, FieldRemotePort)

// transportFields are those of inbound transport.
var transportFields = packetFields.with(FieldProtocol, FieldLocalAddressType, FieldLocalPort, FieldRemotePort,
	FieldCurrentProfileID, FieldIPsecSecurityRealmID)

// authFields are common to auth connect and auth recv-accept.
var authFields = remoteFields.with(FieldRemoteUserID, FieldRemoteMachineID, FieldLocalInterface, FieldInterfaceType, FieldTunnelType,
	FieldInterfaceIndex, FieldSubInterfaceIndex, FieldArrivalInterface, FieldArrivalInterfaceType, FieldArrivalTunnelType,
	FieldArrivalInterfaceIndex, FieldNextHopInterface, FieldNextHopSubInterfaceIndex, FieldNextHopInterfaceType,
	FieldNextHopTunnelType, FieldNextHopInterfaceIndex, FieldOriginalProfileID, FieldCurrentProfileID, FieldReauthorizeReason,
	FieldOriginalICMPType, FieldInterfaceQuarantineEpoch)

// socketFields are those by which a bind or a listen is known beside programFields.
var socketFields = programFields.with(FieldLocalInterface, FieldInterfaceType, FieldTunnelType, FieldLocalInterfaceProfileID,
	FieldSocketProperty, FieldSIOFirewallSystemPort)

var kindFields = [NumKinds]FieldSet{
	InboundIPPacket:  packetFields.with(FieldLocalAddressType),
	OutboundIPPacket: packetFields.with(FieldLocalAddressType),
	IPForward: setOf(FieldSourceAddress, FieldDestinationAddress, FieldDestinationAddressType, FieldLocalInterface,
		FieldForwardInterface, FieldSourceInterfaceIndex, FieldSourceSubInterfaceIndex, FieldDestinationInterfaceIndex,
		FieldDestinationSubInterfaceIndex, FieldFlags, FieldPhysicalArrivalInterface, FieldPhysicalNextHopInterface,
		FieldArrivalInterfaceProfileID, FieldNextHopInterfaceProfileID, FieldCompartmentID),
	InboundTransport:  transportFields,
	OutboundTransport: transportFields.with(FieldDestinationAddressType),
	Stream: setOf(FieldLocalAddress, FieldLocalAddressType, FieldRemoteAddress, FieldLocalPort, FieldRemotePort, FieldDirection,
		FieldFlags, FieldCompartmentID),
	DatagramData: packetFields.with(FieldProtocol, FieldLocalAddressType, FieldLocalPort, FieldRemotePort, FieldDirection),
	InboundICMPError: setOf(FieldEmbeddedProtocol, FieldLocalAddress, FieldRemoteAddress, FieldEmbeddedRemoteAddress,
		FieldEmbeddedLocalAddressType, FieldEmbeddedLocalPort, FieldEmbeddedRemotePort, FieldLocalInterface, FieldICMPType,
		FieldICMPCode, FieldLocalInterfaceIndex, FieldLocalInterfaceType, FieldLocalTunnelType, FieldArrivalInterface,
		FieldArrivalInterfaceIndex, FieldArrivalSubInterfaceIndex, FieldArrivalInterfaceType, FieldArrivalTunnelType, FieldFlags,
		FieldArrivalInterfaceProfileID, FieldInterfaceQuarantineEpoch, FieldCompartmentID),
	OutboundICMPError: packetFields.with(FieldLocalAddressType, FieldICMPType, FieldICMPCode, FieldNextHopInterfaceProfileID,
		FieldInterfaceQuarantineEpoch),
	ALEResourceAssignment: socketFields.with(FieldProtocol, FieldPromiscuousMode),
	ALEAuthListen:         socketFields, // no protocol: it is always TCP
	ALEAuthRecvAccept: authFields.with(FieldNAPContext, FieldSIOFirewallSystemPort, FieldSocketProperty, FieldArrivalSubInterfaceIndex,
		FieldLocalInterfaceIndex, FieldLocalInterfaceType, FieldLocalTunnelType),
	ALEAuthConnect: authFields.with(FieldDestinationAddressType, FieldPeerName, FieldOriginalAppID, FieldEffectiveName),
	ALEFlowEstablished: remoteFields.with(FieldRemoteUserID, FieldRemoteMachineID, FieldDestinationAddressType, FieldLocalInterface,
		FieldDirection, FieldInterfaceType, FieldTunnelType, FieldOriginalAppID),
	ALEResourceRelease:  programFields.with(FieldProtocol, FieldLocalInterface),
	ALEEndpointClosure:  remoteFields.with(FieldLocalInterface),
	ALEConnectRedirect:  remoteFields.with(FieldDestinationAddressType, FieldOriginalAppID),
	ALEBindRedirect:     programFields.with(FieldProtocol),
	StreamPacket:        packetFields.with(FieldLocalPort, FieldRemotePort, FieldDirection),
	NameResolutionCache: setOf(FieldUserID, FieldAppID, FieldRemoteAddress, FieldPeerName),
}

// Groups of metadata that come together.
const (
	metaHeaders  = 1<<MetaIPHeaderSize | 1<<MetaTransportHeaderSize
	metaProcess  = 1<<MetaToken | 1<<MetaProcessID | 1<<MetaSubProcessTag
	metaProgram  = metaProcess | 1<<MetaProcessPath
	metaEndpoint = 1 << MetaTransportEndpointHandle
	metaSend     = 1<<MetaTransportControlData | 1<<MetaRemoteScopeID
	metaCompart  = 1 << MetaCompartmentID
	metaFlow     = 1 << MetaFlowID
	metaEcho     = 1 << MetaICMPIDAndSequence
	metaParent   = 1 << MetaParentEndpointHandle
	metaSystem   = 1 << MetaSystemFlags
	// The operation's id is in the classification that its completion causes, so wherever there is a completion handle.
	metaPend = 1<<MetaCompletionHandle | 1<<MetaOperationID
)

var kindMeta = [NumKinds]uint64{
	InboundIPPacket:   1<<MetaIPHeaderSize | metaCompart | 1<<MetaFragmentData,
	OutboundIPPacket:  metaHeaders | metaCompart | 1<<MetaFragmentData | 1<<MetaPathMTU,
	IPForward:         metaCompart | 1<<MetaForwardInboundPassThru | 1<<MetaForwardOutboundPassThru,
	InboundTransport:  metaFlow | metaHeaders | metaCompart | metaEndpoint | 1<<MetaALEClassifyRequired | metaEcho | metaSystem,
	OutboundTransport: metaFlow | 1<<MetaTransportHeaderSize | metaCompart | metaEndpoint | metaSend | metaEcho | metaSystem | 1<<MetaTransportHeaderIncludeHeader,
	Stream:            metaFlow | metaSystem,
	DatagramData:      metaFlow | metaHeaders | metaCompart | metaEndpoint | metaSend | metaEcho | metaSystem,
	InboundICMPError:  metaHeaders | metaCompart | metaEndpoint,
	OutboundICMPError: 1<<MetaTransportHeaderSize | metaCompart | metaEndpoint | metaSend | metaSystem,

	ALEResourceAssignment: metaProgram | metaPend | metaEndpoint,
	ALEAuthListen:         metaProgram | metaPend | metaEndpoint,
	ALEAuthRecvAccept:     metaFlow | metaHeaders | metaProgram | metaCompart | metaPend | metaEndpoint | metaParent | 1<<MetaPacketDirection | metaEcho,
	ALEAuthConnect: metaFlow | 1<<MetaTransportHeaderSize | metaProgram | metaCompart | metaPend | metaEndpoint | metaParent |
		1<<MetaRemoteScopeID | 1<<MetaPacketDirection | metaEcho | 1<<MetaOriginalDestination | 1<<MetaLocalRedirectTargetPID,
	ALEFlowEstablished: metaFlow | metaProgram | metaEndpoint | metaParent | metaEcho,
	ALEResourceRelease: metaProcess | metaCompart | metaEndpoint,
	ALEEndpointClosure: metaProcess | metaCompart | metaEndpoint | metaParent,
	ALEConnectRedirect: metaProcess | metaEndpoint | metaParent | metaEcho | 1<<MetaLocalRedirectTargetPID | 1<<MetaRedirectRecordHandle,
	ALEBindRedirect:    metaProcess | metaEndpoint | 1<<MetaLocalRedirectTargetPID,
	StreamPacket:       metaFlow | metaHeaders | metaCompart | metaEndpoint | metaSend | metaSystem,
}

func setOf(fields ...Field) FieldSet { return FieldSet{}.with(fields...) }

// with returns the set with more fields.
func (s FieldSet) with(fields ...Field) FieldSet {
	for _, f := range fields {
		s.Add(f)
	}
	return s
}

// Len returns how many fields the set holds.
func (s FieldSet) Len() int {
	n := 0
	for f := range NumFields {
		if s.Has(f) {
			n++
		}
	}
	return n
}

// Fields returns the fields that the layer has. A condition on any other field can never be met there, and adding it is an
// error. A field that the layer has may still be empty in one indication.
func (id ID) Fields() FieldSet {
	if !id.Valid() {
		return FieldSet{}
	}
	return kindFields[id.Kind()]
}

// HasField reports whether the layer has a field.
func (id ID) HasField(f Field) bool {
	return id.Valid() && f < NumFields && kindFields[id.Kind()].Has(f)
}

// HasMeta reports whether indications of the layer may carry a metadata value. Whether one does is told by Meta.Has.
func (id ID) HasMeta(m MetaField) bool {
	if !id.Valid() || m >= NumMetaFields {
		return false
	}
	if m == MetaDiscardReason {
		return id.IsDiscard()
	}
	return kindMeta[id.Kind()]&(1<<m) != 0
}

// CanPend reports whether first authorisations at the layer can be pended by Indication.Pend.
func (id ID) CanPend() bool {
	return id.HasMeta(MetaCompletionHandle) && !id.IsDiscard()
}
