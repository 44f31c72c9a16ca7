package layers

import "fmt"

// DiscardModule is the part of the stack that dropped a packet.
type DiscardModule uint8

// The modules.
const (
	// DiscardNetwork is the network layer.
	DiscardNetwork DiscardModule = iota
	// DiscardTransport is the transport layer.
	DiscardTransport
	// DiscardGeneral is policy, whatever the layer.
	DiscardGeneral
)

// String returns NETWORK, TRANSPORT or GENERAL.
func (m DiscardModule) String() string {
	switch m {
	case DiscardNetwork:
		return "NETWORK"
	case DiscardTransport:
		return "TRANSPORT"
	case DiscardGeneral:
		return "GENERAL"
	default:
		return fmt.Sprintf("MODULE(%d)", uint8(m))
	}
}

// DiscardReason is why a packet was dropped, the metadata of the discard layers. Source: "FWPS_DISCARD_METADATA0".
type DiscardReason struct {
	// Module is the part of the stack that dropped it; always Code.Module().
	Module DiscardModule
	// Code is the reason.
	Code DiscardCode
	// Filter is the filter that did it, zero where none did.
	Filter FilterID
}

// DiscardBy returns the reason that belongs to a code, with the filter that caused it or zero.
func DiscardBy(c DiscardCode, filter FilterID) DiscardReason {
	return DiscardReason{Module: c.Module(), Code: c, Filter: filter}
}

// String returns module and code, such as TRANSPORT/ENDPOINT_NOT_FOUND, and the filter's number where a filter did it.
func (r DiscardReason) String() string {
	if r.Filter != 0 {
		return fmt.Sprintf("%v/%v by filter %d", r.Module, r.Code, r.Filter)
	}
	return fmt.Sprintf("%v/%v", r.Module, r.Code)
}

// DiscardCode is the reason within a module. The numbers are ours and run through all modules, so that a code alone tells
// everything.
type DiscardCode uint8

// The reasons that belong to no layer. Module: DiscardGeneral.
const (
	// DiscardFirewallPolicy is a filter's or callout's block.
	DiscardFirewallPolicy DiscardCode = iota
	// DiscardIPsec is reserved.
	DiscardIPsec
)

// The reasons of the network layer. Module: DiscardNetwork. Source: "IP_DISCARD_REASON".
const (
	// DiscardNetworkBadSourceAddress is a source address that no packet may have.
	DiscardNetworkBadSourceAddress DiscardCode = iota + firstNetworkCode
	// DiscardNetworkNotLocallyDestined is a packet for an address that is not ours, with forwarding off.
	DiscardNetworkNotLocallyDestined
	// DiscardNetworkProtocolUnreachable is a protocol that nobody takes.
	DiscardNetworkProtocolUnreachable
	// DiscardNetworkPortUnreachable is a datagram for a port that nobody listens on.
	DiscardNetworkPortUnreachable
	// DiscardNetworkBadLength is a length field that disagrees with the packet.
	DiscardNetworkBadLength
	// DiscardNetworkMalformedHeader is a header with an impossible value.
	DiscardNetworkMalformedHeader
	// DiscardNetworkNoRoute is a destination that no route leads to.
	DiscardNetworkNoRoute
	// DiscardNetworkBeyondScope is a destination outside the scope of the source address.
	DiscardNetworkBeyondScope
	// DiscardNetworkInspectionDrop is a block at a network layer.
	DiscardNetworkInspectionDrop
	// DiscardNetworkTooManyDecapsulations is more nested tunnels than are followed.
	DiscardNetworkTooManyDecapsulations
	// DiscardNetworkAdministrativelyProhibited is a prohibition that is no filter's: a guard, a blackhole route.
	DiscardNetworkAdministrativelyProhibited
	// DiscardNetworkHopLimitExceeded is a hop limit that ran out.
	DiscardNetworkHopLimitExceeded
	// DiscardNetworkAddressUnreachable is a next hop that does not answer.
	DiscardNetworkAddressUnreachable
	// DiscardNetworkRscPacket is a coalesced packet where none may be.
	DiscardNetworkRscPacket
	// DiscardNetworkArbitrationUnhandled is a packet that no arbitration took.
	DiscardNetworkArbitrationUnhandled
	// DiscardNetworkInspectionAbsorb is a callout that took the packet.
	DiscardNetworkInspectionAbsorb
	// DiscardNetworkDontFragmentMTUExceeded is a packet above the path MTU that must not be fragmented.
	DiscardNetworkDontFragmentMTUExceeded
	// DiscardNetworkBufferLengthExceeded is a packet longer than its buffer.
	DiscardNetworkBufferLengthExceeded
	// DiscardNetworkAddressResolutionTimeout is a neighbour that did not answer in time.
	DiscardNetworkAddressResolutionTimeout
	// DiscardNetworkAddressResolutionFailure is a neighbour that cannot be found.
	DiscardNetworkAddressResolutionFailure
	// DiscardNetworkIPsecFailure is a packet that failed its IPsec check.
	DiscardNetworkIPsecFailure
	// DiscardNetworkExtensionHeadersFailure is extension headers that cannot be walked.
	DiscardNetworkExtensionHeadersFailure
	// DiscardNetworkAllocationFailure is memory or a bounded table that had no room.
	DiscardNetworkAllocationFailure
)

// The reasons of the transport layer. Module: DiscardTransport. Source: "INET_DISCARD_REASON".
const (
	// DiscardTransportSourceUnspecified is a source address or port of zero.
	DiscardTransportSourceUnspecified DiscardCode = iota + firstTransportCode
	// DiscardTransportDestinationMulticast is a connection to a multicast or broadcast address.
	DiscardTransportDestinationMulticast
	// DiscardTransportHeaderInvalid is a transport header with an impossible value.
	DiscardTransportHeaderInvalid
	// DiscardTransportChecksumInvalid is a wrong transport checksum.
	DiscardTransportChecksumInvalid
	// DiscardTransportEndpointNotFound is no endpoint and no listener.
	DiscardTransportEndpointNotFound
	// DiscardTransportConnectedPath is a datagram from another remote than the one the endpoint is connected to.
	DiscardTransportConnectedPath
	// DiscardTransportSessionState is a segment that does not fit the state of its connection.
	DiscardTransportSessionState
	// DiscardTransportReceiveInspection is a block at a layer of the receive path.
	DiscardTransportReceiveInspection
	// DiscardTransportAckInvalid is an acknowledgement of what was never sent.
	DiscardTransportAckInvalid
	// DiscardTransportExpectedSyn is a segment without SYN where one had to come.
	DiscardTransportExpectedSyn
	// DiscardTransportRst is a reset.
	DiscardTransportRst
	// DiscardTransportSynRcvdSyn is a SYN while the handshake is being answered.
	DiscardTransportSynRcvdSyn
	// DiscardTransportSimultaneousConnect is a SYN that crosses ours.
	DiscardTransportSimultaneousConnect
	// DiscardTransportPAWSFailed is a timestamp from the past.
	DiscardTransportPAWSFailed
	// DiscardTransportLandAttack is a SYN whose source is its destination.
	DiscardTransportLandAttack
	// DiscardTransportMissedReset is a segment after a reset that was not seen.
	DiscardTransportMissedReset
	// DiscardTransportOutsideWindow is bytes outside the receive window.
	DiscardTransportOutsideWindow
	// DiscardTransportDuplicateSegment is bytes that were received before.
	DiscardTransportDuplicateSegment
	// DiscardTransportClosedWindow is bytes while the window is closed.
	DiscardTransportClosedWindow
	// DiscardTransportTCBRemoved is a connection that is being removed.
	DiscardTransportTCBRemoved
	// DiscardTransportFinWait2 is bytes after the program closed.
	DiscardTransportFinWait2
	// DiscardTransportReassemblyConflict is bytes that contradict those already held.
	DiscardTransportReassemblyConflict
	// DiscardTransportFinReceived is bytes after a FIN.
	DiscardTransportFinReceived
	// DiscardTransportListenerInvalidFlags is flags that a listener does not take.
	DiscardTransportListenerInvalidFlags
	// DiscardTransportUrgentDeliveryAllocationFailure is no memory for urgent data.
	DiscardTransportUrgentDeliveryAllocationFailure
	// DiscardTransportTCBNotInTCBTable is a connection that is no longer in the table.
	DiscardTransportTCBNotInTCBTable
	// DiscardTransportTimeWaitTCBReceivedRstOutsideWindow is a reset outside the window of a connection in TIME-WAIT.
	DiscardTransportTimeWaitTCBReceivedRstOutsideWindow
	// DiscardTransportTimeWaitTCBSynAndOtherFlags is a SYN with other flags for a connection in TIME-WAIT.
	DiscardTransportTimeWaitTCBSynAndOtherFlags
	// DiscardTransportTimeWaitTCB is a connection in TIME-WAIT.
	DiscardTransportTimeWaitTCB

	// NumDiscardCodes is the number of codes; every DiscardCode is below it.
	NumDiscardCodes
)

// Where the modules begin in the one enumeration.
const (
	firstNetworkCode   = DiscardIPsec + 1
	firstTransportCode = DiscardNetworkAllocationFailure + 1
)

var discardNames = [NumDiscardCodes]string{
	DiscardFirewallPolicy: "FIREWALL_POLICY", DiscardIPsec: "IPSEC",
	DiscardNetworkBadSourceAddress:                      "BAD_SOURCE_ADDRESS",
	DiscardNetworkNotLocallyDestined:                    "NOT_LOCALLY_DESTINED",
	DiscardNetworkProtocolUnreachable:                   "PROTOCOL_UNREACHABLE",
	DiscardNetworkPortUnreachable:                       "PORT_UNREACHABLE",
	DiscardNetworkBadLength:                             "BAD_LENGTH",
	DiscardNetworkMalformedHeader:                       "MALFORMED_HEADER",
	DiscardNetworkNoRoute:                               "NO_ROUTE",
	DiscardNetworkBeyondScope:                           "BEYOND_SCOPE",
	DiscardNetworkInspectionDrop:                        "INSPECTION_DROP",
	DiscardNetworkTooManyDecapsulations:                 "TOO_MANY_DECAPSULATIONS",
	DiscardNetworkAdministrativelyProhibited:            "ADMINISTRATIVELY_PROHIBITED",
	DiscardNetworkHopLimitExceeded:                      "HOP_LIMIT_EXCEEDED",
	DiscardNetworkAddressUnreachable:                    "ADDRESS_UNREACHABLE",
	DiscardNetworkRscPacket:                             "RSC_PACKET",
	DiscardNetworkArbitrationUnhandled:                  "ARBITRATION_UNHANDLED",
	DiscardNetworkInspectionAbsorb:                      "INSPECTION_ABSORB",
	DiscardNetworkDontFragmentMTUExceeded:               "DONT_FRAGMENT_MTU_EXCEEDED",
	DiscardNetworkBufferLengthExceeded:                  "BUFFER_LENGTH_EXCEEDED",
	DiscardNetworkAddressResolutionTimeout:              "ADDRESS_RESOLUTION_TIMEOUT",
	DiscardNetworkAddressResolutionFailure:              "ADDRESS_RESOLUTION_FAILURE",
	DiscardNetworkIPsecFailure:                          "IPSEC_FAILURE",
	DiscardNetworkExtensionHeadersFailure:               "EXTENSION_HEADERS_FAILURE",
	DiscardNetworkAllocationFailure:                     "ALLOCATION_FAILURE",
	DiscardTransportSourceUnspecified:                   "SOURCE_UNSPECIFIED",
	DiscardTransportDestinationMulticast:                "DESTINATION_MULTICAST",
	DiscardTransportHeaderInvalid:                       "HEADER_INVALID",
	DiscardTransportChecksumInvalid:                     "CHECKSUM_INVALID",
	DiscardTransportEndpointNotFound:                    "ENDPOINT_NOT_FOUND",
	DiscardTransportConnectedPath:                       "CONNECTED_PATH",
	DiscardTransportSessionState:                        "SESSION_STATE",
	DiscardTransportReceiveInspection:                   "RECEIVE_INSPECTION",
	DiscardTransportAckInvalid:                          "ACK_INVALID",
	DiscardTransportExpectedSyn:                         "EXPECTED_SYN",
	DiscardTransportRst:                                 "RST",
	DiscardTransportSynRcvdSyn:                          "SYN_RCVD_SYN",
	DiscardTransportSimultaneousConnect:                 "SIMULTANEOUS_CONNECT",
	DiscardTransportPAWSFailed:                          "PAWS_FAILED",
	DiscardTransportLandAttack:                          "LAND_ATTACK",
	DiscardTransportMissedReset:                         "MISSED_RESET",
	DiscardTransportOutsideWindow:                       "OUTSIDE_WINDOW",
	DiscardTransportDuplicateSegment:                    "DUPLICATE_SEGMENT",
	DiscardTransportClosedWindow:                        "CLOSED_WINDOW",
	DiscardTransportTCBRemoved:                          "TCB_REMOVED",
	DiscardTransportFinWait2:                            "FIN_WAIT_2",
	DiscardTransportReassemblyConflict:                  "REASSEMBLY_CONFLICT",
	DiscardTransportFinReceived:                         "FIN_RECEIVED",
	DiscardTransportListenerInvalidFlags:                "LISTENER_INVALID_FLAGS",
	DiscardTransportUrgentDeliveryAllocationFailure:     "URGENT_DELIVERY_ALLOCATION_FAILURE",
	DiscardTransportTCBNotInTCBTable:                    "TCB_NOT_IN_TCB_TABLE",
	DiscardTransportTimeWaitTCBReceivedRstOutsideWindow: "TIME_WAIT_TCB_RECEIVED_RST_OUTSIDE_WINDOW",
	DiscardTransportTimeWaitTCBSynAndOtherFlags:         "TIME_WAIT_TCB_SYN_AND_OTHER_FLAGS",
	DiscardTransportTimeWaitTCB:                         "TIME_WAIT_TCB",
}

// String returns the name used in events, such as CHECKSUM_INVALID.
func (c DiscardCode) String() string {
	if c < NumDiscardCodes {
		return discardNames[c]
	}
	return fmt.Sprintf("CODE(%d)", uint8(c))
}

// Module returns the module that the code belongs to.
func (c DiscardCode) Module() DiscardModule {
	switch {
	case c < firstNetworkCode:
		return DiscardGeneral
	case c < firstTransportCode:
		return DiscardNetwork
	default:
		return DiscardTransport
	}
}
