package layers

import (
	"strings"
	"testing"
)

// platformNames are the platform's names for our fields.
var platformNames = map[string]Field{
	"IP_PROTOCOL": FieldProtocol, "IP_LOCAL_ADDRESS": FieldLocalAddress, "IP_REMOTE_ADDRESS": FieldRemoteAddress,
	"IP_SOURCE_ADDRESS": FieldSourceAddress, "IP_DESTINATION_ADDRESS": FieldDestinationAddress,
	"IP_LOCAL_ADDRESS_TYPE": FieldLocalAddressType, "IP_DESTINATION_ADDRESS_TYPE": FieldDestinationAddressType,
	"EMBEDDED_LOCAL_ADDRESS_TYPE": FieldEmbeddedLocalAddressType, "IP_LOCAL_PORT": FieldLocalPort, "IP_REMOTE_PORT": FieldRemotePort,
	"ICMP_TYPE": FieldICMPType, "ICMP_CODE": FieldICMPCode, "ORIGINAL_ICMP_TYPE": FieldOriginalICMPType,
	"EMBEDDED_PROTOCOL": FieldEmbeddedProtocol, "EMBEDDED_LOCAL_PORT": FieldEmbeddedLocalPort,
	"EMBEDDED_REMOTE_PORT": FieldEmbeddedRemotePort, "EMBEDDED_REMOTE_ADDRESS": FieldEmbeddedRemoteAddress,
	"IP_LOCAL_INTERFACE": FieldLocalInterface, "IP_ARRIVAL_INTERFACE": FieldArrivalInterface,
	"IP_NEXTHOP_INTERFACE": FieldNextHopInterface, "IP_FORWARD_INTERFACE": FieldForwardInterface,
	"IP_PHYSICAL_ARRIVAL_INTERFACE": FieldPhysicalArrivalInterface, "IP_PHYSICAL_NEXTHOP_INTERFACE": FieldPhysicalNextHopInterface,
	"INTERFACE_INDEX": FieldInterfaceIndex, "SUB_INTERFACE_INDEX": FieldSubInterfaceIndex, "INTERFACE_TYPE": FieldInterfaceType,
	"TUNNEL_TYPE": FieldTunnelType, "LOCAL_INTERFACE_INDEX": FieldLocalInterfaceIndex, "LOCAL_INTERFACE_TYPE": FieldLocalInterfaceType,
	"LOCAL_TUNNEL_TYPE": FieldLocalTunnelType, "ARRIVAL_INTERFACE_INDEX": FieldArrivalInterfaceIndex,
	"ARRIVAL_SUB_INTERFACE_INDEX": FieldArrivalSubInterfaceIndex, "ARRIVAL_INTERFACE_TYPE": FieldArrivalInterfaceType,
	"ARRIVAL_TUNNEL_TYPE": FieldArrivalTunnelType, "ARRIVAL_INTERFACE_PROFILE_ID": FieldArrivalInterfaceProfileID,
	"NEXTHOP_SUB_INTERFACE_INDEX": FieldNextHopSubInterfaceIndex, "NEXTHOP_INTERFACE_TYPE": FieldNextHopInterfaceType,
	"NEXTHOP_TUNNEL_TYPE": FieldNextHopTunnelType, "NEXTHOP_INTERFACE_INDEX": FieldNextHopInterfaceIndex,
	"NEXTHOP_INTERFACE_PROFILE_ID": FieldNextHopInterfaceProfileID, "SOURCE_INTERFACE_INDEX": FieldSourceInterfaceIndex,
	"SOURCE_SUB_INTERFACE_INDEX": FieldSourceSubInterfaceIndex, "DESTINATION_INTERFACE_INDEX": FieldDestinationInterfaceIndex,
	"DESTINATION_SUB_INTERFACE_INDEX": FieldDestinationSubInterfaceIndex, "FLAGS": FieldFlags, "DIRECTION": FieldDirection,
	"ALE_APP_ID": FieldAppID, "ALE_ORIGINAL_APP_ID": FieldOriginalAppID, "ALE_USER_ID": FieldUserID,
	"ALE_REMOTE_USER_ID": FieldRemoteUserID, "ALE_REMOTE_MACHINE_ID": FieldRemoteMachineID, "ALE_PACKAGE_ID": FieldPackageID,
	"ALE_PROMISCUOUS_MODE": FieldPromiscuousMode, "ALE_NAP_CONTEXT": FieldNAPContext,
	"INTERFACE_QUARANTINE_EPOCH": FieldInterfaceQuarantineEpoch, "CURRENT_PROFILE_ID": FieldCurrentProfileID,
	"ORIGINAL_PROFILE_ID": FieldOriginalProfileID, "LOCAL_INTERFACE_PROFILE_ID": FieldLocalInterfaceProfileID,
	"IPSEC_SECURITY_REALM_ID": FieldIPsecSecurityRealmID, "SIO_FIREWALL_SYSTEM_PORT": FieldSIOFirewallSystemPort,
	"SOCKET_PROPERTY": FieldSocketProperty, "REAUTHORIZE_REASON": FieldReauthorizeReason, "PEER_NAME": FieldPeerName,
	"COMPARTMENT_ID": FieldCompartmentID, "FQBN": FieldFQBN, "EFFECTIVE_NAME": FieldEffectiveName,
}

// fieldTable is the platform's table, one row a kind, written out in the platform's words.
var fieldTable = map[Kind]string{
	InboundIPPacket:  ipPacketRow,
	OutboundIPPacket: ipPacketRow,
	IPForward: `IP_SOURCE_ADDRESS IP_DESTINATION_ADDRESS IP_DESTINATION_ADDRESS_TYPE IP_LOCAL_INTERFACE IP_FORWARD_INTERFACE
		SOURCE_INTERFACE_INDEX SOURCE_SUB_INTERFACE_INDEX DESTINATION_INTERFACE_INDEX DESTINATION_SUB_INTERFACE_INDEX FLAGS
		IP_PHYSICAL_ARRIVAL_INTERFACE IP_PHYSICAL_NEXTHOP_INTERFACE ARRIVAL_INTERFACE_PROFILE_ID NEXTHOP_INTERFACE_PROFILE_ID COMPARTMENT_ID`,
	InboundTransport:  inboundTransportRow,
	OutboundTransport: inboundTransportRow + ` IP_DESTINATION_ADDRESS_TYPE`,
	Stream: `IP_LOCAL_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_REMOTE_ADDRESS IP_LOCAL_PORT IP_REMOTE_PORT DIRECTION FLAGS
		COMPARTMENT_ID`,
	StreamPacket: `IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS IP_LOCAL_PORT IP_REMOTE_PORT IP_LOCAL_INTERFACE INTERFACE_INDEX
		SUB_INTERFACE_INDEX DIRECTION FLAGS INTERFACE_TYPE TUNNEL_TYPE COMPARTMENT_ID`,
	DatagramData: `IP_PROTOCOL IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_LOCAL_PORT IP_REMOTE_PORT
		IP_LOCAL_INTERFACE INTERFACE_INDEX SUB_INTERFACE_INDEX DIRECTION FLAGS INTERFACE_TYPE TUNNEL_TYPE COMPARTMENT_ID`,
	InboundICMPError: `EMBEDDED_PROTOCOL IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS EMBEDDED_REMOTE_ADDRESS EMBEDDED_LOCAL_ADDRESS_TYPE
		EMBEDDED_LOCAL_PORT EMBEDDED_REMOTE_PORT IP_LOCAL_INTERFACE ICMP_TYPE ICMP_CODE LOCAL_INTERFACE_INDEX LOCAL_INTERFACE_TYPE
		LOCAL_TUNNEL_TYPE IP_ARRIVAL_INTERFACE ARRIVAL_INTERFACE_INDEX ARRIVAL_SUB_INTERFACE_INDEX ARRIVAL_INTERFACE_TYPE
		ARRIVAL_TUNNEL_TYPE FLAGS ARRIVAL_INTERFACE_PROFILE_ID INTERFACE_QUARANTINE_EPOCH COMPARTMENT_ID`,
	OutboundICMPError: `IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_LOCAL_INTERFACE ICMP_TYPE ICMP_CODE
		INTERFACE_INDEX SUB_INTERFACE_INDEX FLAGS INTERFACE_TYPE TUNNEL_TYPE NEXTHOP_INTERFACE_PROFILE_ID INTERFACE_QUARANTINE_EPOCH
		COMPARTMENT_ID`,
	ALEBindRedirect: programRow + ` IP_PROTOCOL`,
	ALEResourceAssignment: programRow + ` IP_PROTOCOL ALE_PROMISCUOUS_MODE IP_LOCAL_INTERFACE INTERFACE_TYPE TUNNEL_TYPE
		LOCAL_INTERFACE_PROFILE_ID SOCKET_PROPERTY SIO_FIREWALL_SYSTEM_PORT`,
	ALEResourceRelease: programRow + ` IP_PROTOCOL IP_LOCAL_INTERFACE`,
	ALEAuthListen: programRow + ` IP_LOCAL_INTERFACE INTERFACE_TYPE TUNNEL_TYPE LOCAL_INTERFACE_PROFILE_ID SOCKET_PROPERTY
		SIO_FIREWALL_SYSTEM_PORT`,
	ALEConnectRedirect: programRow + ` IP_PROTOCOL IP_REMOTE_ADDRESS IP_DESTINATION_ADDRESS_TYPE IP_REMOTE_PORT ALE_ORIGINAL_APP_ID`,
	ALEAuthConnect:     authRow + ` IP_DESTINATION_ADDRESS_TYPE PEER_NAME ALE_ORIGINAL_APP_ID EFFECTIVE_NAME`,
	ALEAuthRecvAccept: authRow + ` ALE_NAP_CONTEXT SIO_FIREWALL_SYSTEM_PORT SOCKET_PROPERTY ARRIVAL_SUB_INTERFACE_INDEX
		LOCAL_INTERFACE_INDEX LOCAL_INTERFACE_TYPE LOCAL_TUNNEL_TYPE`,
	ALEFlowEstablished: programRow + ` IP_PROTOCOL IP_REMOTE_ADDRESS IP_REMOTE_PORT ALE_REMOTE_USER_ID ALE_REMOTE_MACHINE_ID
		IP_DESTINATION_ADDRESS_TYPE IP_LOCAL_INTERFACE DIRECTION INTERFACE_TYPE TUNNEL_TYPE ALE_ORIGINAL_APP_ID`,
	ALEEndpointClosure:  programRow + ` IP_PROTOCOL IP_REMOTE_ADDRESS IP_REMOTE_PORT IP_LOCAL_INTERFACE`,
	NameResolutionCache: `ALE_USER_ID ALE_APP_ID IP_REMOTE_ADDRESS PEER_NAME`,
}

const (
	ipPacketRow = `IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_LOCAL_INTERFACE INTERFACE_INDEX
		SUB_INTERFACE_INDEX FLAGS INTERFACE_TYPE TUNNEL_TYPE COMPARTMENT_ID`
	inboundTransportRow = `IP_PROTOCOL IP_LOCAL_ADDRESS IP_REMOTE_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_LOCAL_PORT IP_REMOTE_PORT
		IP_LOCAL_INTERFACE INTERFACE_INDEX SUB_INTERFACE_INDEX FLAGS INTERFACE_TYPE TUNNEL_TYPE CURRENT_PROFILE_ID
		IPSEC_SECURITY_REALM_ID COMPARTMENT_ID`
	programRow = `ALE_APP_ID ALE_USER_ID IP_LOCAL_ADDRESS IP_LOCAL_ADDRESS_TYPE IP_LOCAL_PORT FLAGS ALE_PACKAGE_ID FQBN
		COMPARTMENT_ID`
	authRow = programRow + ` IP_PROTOCOL IP_REMOTE_ADDRESS IP_REMOTE_PORT ALE_REMOTE_USER_ID ALE_REMOTE_MACHINE_ID IP_LOCAL_INTERFACE
		INTERFACE_TYPE TUNNEL_TYPE INTERFACE_INDEX SUB_INTERFACE_INDEX IP_ARRIVAL_INTERFACE ARRIVAL_INTERFACE_TYPE ARRIVAL_TUNNEL_TYPE
		ARRIVAL_INTERFACE_INDEX IP_NEXTHOP_INTERFACE NEXTHOP_SUB_INTERFACE_INDEX NEXTHOP_INTERFACE_TYPE NEXTHOP_TUNNEL_TYPE
		NEXTHOP_INTERFACE_INDEX ORIGINAL_PROFILE_ID CURRENT_PROFILE_ID REAUTHORIZE_REASON ORIGINAL_ICMP_TYPE
		INTERFACE_QUARANTINE_EPOCH`
)

func TestSchemaFields(t *testing.T) {
	for id := range NumLayers {
		row, ok := fieldTable[id.Kind()]
		if !ok {
			t.Fatalf("%v: no row in the test's table", id)
		}
		var want FieldSet
		for _, name := range strings.Fields(row) {
			f, ok := platformNames[name]
			if !ok {
				t.Fatalf("%v: the test does not know %s", id, name)
			}
			want.Add(f)
		}
		if got := id.Fields(); got != want {
			for f := range NumFields {
				if got.Has(f) != want.Has(f) {
					t.Errorf("%v: has %v = %v, the platform says %v", id, f, got.Has(f), want.Has(f))
				}
			}
		}
		for f := range NumFields {
			if id.HasField(f) != want.Has(f) {
				t.Errorf("%v.HasField(%v) = %v, want %v", id, f, id.HasField(f), want.Has(f))
			}
		}
		if id.Fields().Len() != len(strings.Fields(row)) {
			t.Errorf("%v: %d fields, the platform lists %d", id, id.Fields().Len(), len(strings.Fields(row)))
		}
	}
	if NumLayers.HasField(FieldProtocol) || NumLayers.Fields() != (FieldSet{}) || ALEAuthConnectV4.HasField(NumFields) {
		t.Error("a layer or field that does not exist has a schema")
	}
}

// metaTable is the platform's table of metadata, one row a kind, in the short words of its columns.
var metaTable = map[Kind]string{
	InboundIPPacket:       "IPH COMPART FRAGMENT_DATA",
	OutboundIPPacket:      "IPH TPH COMPART FRAGMENT_DATA PATH_MTU",
	IPForward:             "COMPART PASS_THRU",
	InboundTransport:      "FLOW IPH TPH COMPART ENDPOINT ALE_REQ ICMP_ID SYSTEM_FLAGS",
	OutboundTransport:     "FLOW TPH COMPART ENDPOINT CTRL SCOPE ICMP_ID SYSTEM_FLAGS HEADER_INCLUDE",
	Stream:                "FLOW SYSTEM_FLAGS",
	StreamPacket:          "FLOW IPH TPH COMPART ENDPOINT CTRL SCOPE SYSTEM_FLAGS",
	DatagramData:          "FLOW IPH TPH COMPART ENDPOINT CTRL SCOPE ICMP_ID SYSTEM_FLAGS",
	InboundICMPError:      "IPH TPH COMPART ENDPOINT",
	OutboundICMPError:     "TPH COMPART ENDPOINT CTRL SCOPE SYSTEM_FLAGS",
	ALEResourceAssignment: "PATH PROCESS COMPLETION ENDPOINT",
	ALEAuthListen:         "PATH PROCESS COMPLETION ENDPOINT",
	ALEAuthRecvAccept:     "FLOW IPH TPH PATH PROCESS COMPART COMPLETION ENDPOINT PARENT PKT_DIR ICMP_ID",
	ALEAuthConnect: "FLOW TPH PATH PROCESS COMPART COMPLETION ENDPOINT PARENT SCOPE PKT_DIR ICMP_ID ORIGINAL_DESTINATION " +
		"LOCAL_REDIRECT_TARGET_PID",
	ALEFlowEstablished:  "FLOW PATH PROCESS ENDPOINT PARENT ICMP_ID",
	ALEResourceRelease:  "PROCESS COMPART ENDPOINT",
	ALEEndpointClosure:  "PROCESS COMPART ENDPOINT PARENT",
	ALEConnectRedirect:  "PROCESS ENDPOINT PARENT ICMP_ID LOCAL_REDIRECT_TARGET_PID REDIRECT_RECORD_HANDLE",
	ALEBindRedirect:     "PROCESS ENDPOINT LOCAL_REDIRECT_TARGET_PID",
	NameResolutionCache: "",
}

var metaNames = map[string][]MetaField{
	"FLOW": {MetaFlowID}, "IPH": {MetaIPHeaderSize}, "TPH": {MetaTransportHeaderSize}, "PATH": {MetaProcessPath},
	"PROCESS": {MetaProcessID, MetaToken, MetaSubProcessTag}, "COMPART": {MetaCompartmentID},
	"COMPLETION": {MetaCompletionHandle, MetaOperationID}, "ENDPOINT": {MetaTransportEndpointHandle}, "PARENT": {MetaParentEndpointHandle},
	"CTRL": {MetaTransportControlData}, "SCOPE": {MetaRemoteScopeID}, "PKT_DIR": {MetaPacketDirection}, "ALE_REQ": {MetaALEClassifyRequired},
	"ICMP_ID": {MetaICMPIDAndSequence}, "FRAGMENT_DATA": {MetaFragmentData}, "PATH_MTU": {MetaPathMTU},
	"PASS_THRU":    {MetaForwardInboundPassThru, MetaForwardOutboundPassThru},
	"SYSTEM_FLAGS": {MetaSystemFlags}, "HEADER_INCLUDE": {MetaTransportHeaderIncludeHeader},
	"ORIGINAL_DESTINATION": {MetaOriginalDestination}, "LOCAL_REDIRECT_TARGET_PID": {MetaLocalRedirectTargetPID},
	"REDIRECT_RECORD_HANDLE": {MetaRedirectRecordHandle},
}

func TestSchemaMeta(t *testing.T) {
	for id := range NumLayers {
		want := make(map[MetaField]bool)
		row, ok := metaTable[id.Kind()]
		if !ok {
			t.Fatalf("%v: no row in the test's table", id)
		}
		for _, name := range strings.Fields(row) {
			if metaNames[name] == nil {
				t.Fatalf("%v: the test does not know %s", id, name)
			}
			for _, m := range metaNames[name] {
				want[m] = true
			}
		}
		want[MetaDiscardReason] = id.IsDiscard()
		for m := range NumMetaFields {
			if id.HasMeta(m) != want[m] {
				t.Errorf("%v.HasMeta(%d) = %v, want %v", id, m, id.HasMeta(m), want[m])
			}
		}
	}
	if NumLayers.HasMeta(MetaFlowID) || ALEAuthConnectV4.HasMeta(NumMetaFields) {
		t.Error("a layer or metadata value that does not exist is there")
	}
}

func TestSchemaPend(t *testing.T) {
	want := map[Kind]bool{ALEResourceAssignment: true, ALEAuthListen: true, ALEAuthConnect: true, ALEAuthRecvAccept: true}
	for id := range NumLayers {
		if got := id.CanPend(); got != (want[id.Kind()] && !id.IsDiscard()) {
			t.Errorf("%v.CanPend() = %v", id, got)
		}
	}
}
