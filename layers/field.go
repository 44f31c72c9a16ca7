package layers

import "fmt"

// Field names one value of an indication that filters can test. Which fields a layer has is told by ID.HasField; a field that
// is not known for one indication is empty there.
//
// Source: "filtering-condition-identifiers", "data-offset-positions" and the pages of the single layers.
type Field uint8

// The fields. Numbers first, then addresses, then strings: the groups share storage in Values.
const (
	// FieldProtocol is the IANA protocol number of the transport. Type: uint8.
	FieldProtocol Field = iota
	// FieldLocalPort is the port of the local endpoint, or the ICMP type where the protocol is ICMP. Type: uint16.
	FieldLocalPort
	// FieldRemotePort is the port of the remote endpoint, or the ICMP code where the protocol is ICMP. Type: uint16.
	FieldRemotePort
	// FieldICMPType is the type of an ICMP error. Type: uint16.
	FieldICMPType
	// FieldICMPCode is the code of an ICMP error. Type: uint16.
	FieldICMPCode
	// FieldOriginalICMPType is the type of the message that created an ICMP flow. Type: uint16.
	FieldOriginalICMPType
	// FieldEmbeddedProtocol is the protocol of the packet quoted in an ICMP error. Type: uint8.
	FieldEmbeddedProtocol
	// FieldEmbeddedLocalPort is the local port of the quoted packet. Type: uint16.
	FieldEmbeddedLocalPort
	// FieldEmbeddedRemotePort is the remote port of the quoted packet. Type: uint16.
	FieldEmbeddedRemotePort
	// FieldLocalAddressType is the AddressType of the local address. Type: uint8.
	FieldLocalAddressType
	// FieldDestinationAddressType is the AddressType of the destination. Type: uint8.
	FieldDestinationAddressType
	// FieldEmbeddedLocalAddressType is the AddressType of the quoted packet's local address. Type: uint8.
	FieldEmbeddedLocalAddressType
	// FieldFlags is the set of condition flags. Type: uint32, see Flags.
	FieldFlags
	// FieldDirection is the direction of the packet at datagram data and stream packet, of the connection at stream and flow
	// established. Type: uint32, see Direction.
	FieldDirection
	// FieldInterfaceIndex is the index of the interface that owns the local address. Type: uint32.
	FieldInterfaceIndex
	// FieldSubInterfaceIndex is the index of the sub-interface. Type: uint32.
	FieldSubInterfaceIndex
	// FieldInterfaceType is the IANA ifType. Type: uint32.
	FieldInterfaceType
	// FieldTunnelType is the IANA tunnelType. Type: uint32.
	FieldTunnelType
	// FieldLocalInterface is the LUID of the local interface. Type: uint64.
	FieldLocalInterface
	// FieldLocalInterfaceIndex is FieldInterfaceIndex under its name at the ICMP error layer. Type: uint32.
	FieldLocalInterfaceIndex
	// FieldLocalInterfaceType is FieldInterfaceType under its name at the ICMP error layer. Type: uint32.
	FieldLocalInterfaceType
	// FieldLocalTunnelType is FieldTunnelType under its name at the ICMP error layer. Type: uint32.
	FieldLocalTunnelType
	// FieldArrivalInterface is the LUID of the interface on which the packet arrived. Type: uint64.
	FieldArrivalInterface
	// FieldArrivalInterfaceIndex is the index of the arrival interface. Type: uint32.
	FieldArrivalInterfaceIndex
	// FieldArrivalSubInterfaceIndex is the sub-interface index of the arrival interface. Type: uint32.
	FieldArrivalSubInterfaceIndex
	// FieldArrivalInterfaceType is the ifType of the arrival interface. Type: uint32.
	FieldArrivalInterfaceType
	// FieldArrivalTunnelType is the tunnelType of the arrival interface. Type: uint32.
	FieldArrivalTunnelType
	// FieldArrivalInterfaceProfileID is the network profile of the arrival interface. Type: uint32.
	FieldArrivalInterfaceProfileID
	// FieldNextHopInterface is the LUID of the interface by which the packet leaves. Type: uint64.
	FieldNextHopInterface
	// FieldNextHopInterfaceIndex is the index of the next-hop interface. Type: uint32.
	FieldNextHopInterfaceIndex
	// FieldNextHopSubInterfaceIndex is the sub-interface index of the next-hop interface. Type: uint32.
	FieldNextHopSubInterfaceIndex
	// FieldNextHopInterfaceType is the ifType of the next-hop interface. Type: uint32.
	FieldNextHopInterfaceType
	// FieldNextHopTunnelType is the tunnelType of the next-hop interface. Type: uint32.
	FieldNextHopTunnelType
	// FieldNextHopInterfaceProfileID is the network profile of the next-hop interface. Type: uint32.
	FieldNextHopInterfaceProfileID
	// FieldForwardInterface is the LUID of the interface a forwarded packet leaves by. Type: uint64.
	FieldForwardInterface
	// FieldPhysicalArrivalInterface is the LUID of the physical arrival interface of a forwarded packet. Type: uint64.
	FieldPhysicalArrivalInterface
	// FieldPhysicalNextHopInterface is the LUID of the physical next-hop interface of a forwarded packet. Type: uint64.
	FieldPhysicalNextHopInterface
	// FieldSourceInterfaceIndex is the index of the interface a forwarded packet came by. Type: uint32.
	FieldSourceInterfaceIndex
	// FieldSourceSubInterfaceIndex is its sub-interface index. Type: uint32.
	FieldSourceSubInterfaceIndex
	// FieldDestinationInterfaceIndex is the index of the interface a forwarded packet leaves by. Type: uint32.
	FieldDestinationInterfaceIndex
	// FieldDestinationSubInterfaceIndex is its sub-interface index. Type: uint32.
	FieldDestinationSubInterfaceIndex
	// FieldUserID is the uid of the program behind the local endpoint. Type: uint32.
	FieldUserID
	// FieldRemoteUserID is the authenticated user of the peer; never known here. Type: uint32.
	FieldRemoteUserID
	// FieldRemoteMachineID is the authenticated machine of the peer; never known here. Type: uint32.
	FieldRemoteMachineID
	// FieldPromiscuousMode is the promiscuous mode that a bind asks for. Type: uint32.
	FieldPromiscuousMode
	// FieldNAPContext is the health state of the peer; never known here. Type: uint32.
	FieldNAPContext
	// FieldInterfaceQuarantineEpoch is the quarantine epoch of the interface. Type: uint64.
	FieldInterfaceQuarantineEpoch
	// FieldCurrentProfileID is the present network profile. Type: uint32.
	FieldCurrentProfileID
	// FieldOriginalProfileID is the network profile at the first authorisation. Type: uint32.
	FieldOriginalProfileID
	// FieldLocalInterfaceProfileID is the network profile of the local interface. Type: uint32.
	FieldLocalInterfaceProfileID
	// FieldIPsecSecurityRealmID is the IPsec realm. Type: uint32.
	FieldIPsecSecurityRealmID
	// FieldSIOFirewallSystemPort is the system-port property of a socket. Type: uint32.
	FieldSIOFirewallSystemPort
	// FieldSocketProperty is the firewall property of a socket. Type: uint32.
	FieldSocketProperty
	// FieldReauthorizeReason tells why a flow is authorised again. Type: uint32, see ReauthorizeReason.
	FieldReauthorizeReason
	// FieldCompartmentID is the routing compartment, here the network namespace. Type: uint32.
	FieldCompartmentID

	// FieldLocalAddress is the address of the local endpoint in both directions. Type: address.
	FieldLocalAddress
	// FieldRemoteAddress is the address of the remote endpoint in both directions. Type: address.
	FieldRemoteAddress
	// FieldSourceAddress is the source of a forwarded packet. Type: address.
	FieldSourceAddress
	// FieldDestinationAddress is the destination of a forwarded packet. Type: address.
	FieldDestinationAddress
	// FieldEmbeddedRemoteAddress is where the packet quoted in an ICMP error was sent. Type: address.
	FieldEmbeddedRemoteAddress

	// FieldAppID is the path of the program behind the local endpoint. Type: string.
	FieldAppID
	// FieldOriginalAppID is the program that asked for a connection which a proxy makes. Type: string.
	FieldOriginalAppID
	// FieldPackageID is the package or container the program runs in. Type: string.
	FieldPackageID
	// FieldPackageFamilyName is the family name of that package. Type: string.
	FieldPackageFamilyName
	// FieldFQBN is the code identity of the program. Type: string.
	FieldFQBN
	// FieldEffectiveName is the name under which a connection is judged. Type: string.
	FieldEffectiveName
	// FieldPeerName is a name that the program looked up and that had the remote address as answer; an address may have several
	// such names, and a condition holds when it holds for one of them. Type: string (domain name).
	FieldPeerName

	// NumFields is the number of fields; every Field is below it.
	NumFields
)

// Storage groups inside Values.
const (
	firstAddrField   = FieldLocalAddress
	firstStringField = FieldAppID
	numNumberFields  = int(firstAddrField)
	numAddrFields    = int(firstStringField - firstAddrField)
	numStringFields  = int(FieldPeerName - firstStringField) // all but the peer name, which is a list
)

// fieldInfo is what is known about a field besides its number.
type fieldInfo struct {
	name string
	kind ValueKind
}

var fieldInfos = [NumFields]fieldInfo{
	FieldProtocol: {"protocol", KindUint8}, FieldLocalPort: {"local_port", KindUint16}, FieldRemotePort: {"remote_port", KindUint16},
	FieldICMPType: {"icmp_type", KindUint16}, FieldICMPCode: {"icmp_code", KindUint16}, FieldOriginalICMPType: {"original_icmp_type", KindUint16},
	FieldEmbeddedProtocol: {"embedded_protocol", KindUint8}, FieldEmbeddedLocalPort: {"embedded_local_port", KindUint16},
	FieldEmbeddedRemotePort: {"embedded_remote_port", KindUint16}, FieldLocalAddressType: {"local_address_type", KindUint8},
	FieldDestinationAddressType: {"destination_address_type", KindUint8}, FieldEmbeddedLocalAddressType: {"embedded_local_address_type", KindUint8},
	FieldFlags: {"flags", KindUint32}, FieldDirection: {"direction", KindUint32}, FieldInterfaceIndex: {"interface_index", KindUint32},
	FieldSubInterfaceIndex: {"sub_interface_index", KindUint32}, FieldInterfaceType: {"interface_type", KindUint32},
	FieldTunnelType: {"tunnel_type", KindUint32}, FieldLocalInterface: {"local_interface", KindUint64},
	FieldLocalInterfaceIndex: {"local_interface_index", KindUint32}, FieldLocalInterfaceType: {"local_interface_type", KindUint32},
	FieldLocalTunnelType: {"local_tunnel_type", KindUint32}, FieldArrivalInterface: {"arrival_interface", KindUint64},
	FieldArrivalInterfaceIndex: {"arrival_interface_index", KindUint32}, FieldArrivalSubInterfaceIndex: {"arrival_sub_interface_index", KindUint32},
	FieldArrivalInterfaceType: {"arrival_interface_type", KindUint32}, FieldArrivalTunnelType: {"arrival_tunnel_type", KindUint32},
	FieldArrivalInterfaceProfileID: {"arrival_interface_profile_id", KindUint32}, FieldNextHopInterface: {"nexthop_interface", KindUint64},
	FieldNextHopInterfaceIndex: {"nexthop_interface_index", KindUint32}, FieldNextHopSubInterfaceIndex: {"nexthop_sub_interface_index", KindUint32},
	FieldNextHopInterfaceType: {"nexthop_interface_type", KindUint32}, FieldNextHopTunnelType: {"nexthop_tunnel_type", KindUint32},
	FieldNextHopInterfaceProfileID: {"nexthop_interface_profile_id", KindUint32}, FieldForwardInterface: {"forward_interface", KindUint64},
	FieldPhysicalArrivalInterface: {"physical_arrival_interface", KindUint64}, FieldPhysicalNextHopInterface: {"physical_nexthop_interface", KindUint64},
	FieldSourceInterfaceIndex: {"source_interface_index", KindUint32}, FieldSourceSubInterfaceIndex: {"source_sub_interface_index", KindUint32},
	FieldDestinationInterfaceIndex: {"destination_interface_index", KindUint32}, FieldDestinationSubInterfaceIndex: {"destination_sub_interface_index", KindUint32},
	FieldUserID: {"user_id", KindUint32}, FieldRemoteUserID: {"remote_user_id", KindUint32}, FieldRemoteMachineID: {"remote_machine_id", KindUint32},
	FieldPromiscuousMode: {"promiscuous_mode", KindUint32}, FieldNAPContext: {"nap_context", KindUint32},
	FieldInterfaceQuarantineEpoch: {"interface_quarantine_epoch", KindUint64}, FieldCurrentProfileID: {"current_profile_id", KindUint32},
	FieldOriginalProfileID: {"original_profile_id", KindUint32}, FieldLocalInterfaceProfileID: {"local_interface_profile_id", KindUint32},
	FieldIPsecSecurityRealmID: {"ipsec_security_realm_id", KindUint32}, FieldSIOFirewallSystemPort: {"sio_firewall_system_port", KindUint32},
	FieldSocketProperty: {"socket_property", KindUint32}, FieldReauthorizeReason: {"reauthorize_reason", KindUint32},
	FieldCompartmentID: {"compartment_id", KindUint32},
	FieldLocalAddress:  {"local_address", KindAddr}, FieldRemoteAddress: {"remote_address", KindAddr}, FieldSourceAddress: {"source_address", KindAddr},
	FieldDestinationAddress: {"destination_address", KindAddr}, FieldEmbeddedRemoteAddress: {"embedded_remote_address", KindAddr},
	FieldAppID: {"app", KindString}, FieldOriginalAppID: {"original_app", KindString}, FieldPackageID: {"package_id", KindString},
	FieldPackageFamilyName: {"package_family_name", KindString}, FieldFQBN: {"fqbn", KindString}, FieldEffectiveName: {"effective_name", KindString},
	FieldPeerName: {"remote_name", KindString},
}

// String returns the name used in policy files and events, such as remote_port.
func (f Field) String() string {
	if f < NumFields {
		return fieldInfos[f].name
	}
	return fmt.Sprintf("field(%d)", uint8(f))
}

// Kind returns the type of the field's value.
func (f Field) Kind() ValueKind {
	if f < NumFields {
		return fieldInfos[f].kind
	}
	return KindEmpty
}

// FieldByName finds a field by the name that String prints.
func FieldByName(name string) (Field, bool) {
	for f := range NumFields {
		if fieldInfos[f].name == name {
			return f, true
		}
	}
	return 0, false
}

// FieldSet is a set of fields.
type FieldSet [2]uint64

// Add puts a field into the set.
func (s *FieldSet) Add(f Field) { s[f/64] |= 1 << (f % 64) }

// Remove takes a field out of the set.
func (s *FieldSet) Remove(f Field) { s[f/64] &^= 1 << (f % 64) }

// Has reports whether the set holds a field.
func (s FieldSet) Has(f Field) bool { return s[f/64]&(1<<(f%64)) != 0 }
