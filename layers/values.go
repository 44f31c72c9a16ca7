package layers

import "net/netip"

// Direction is inbound or outbound; the numbers are those of the platform.
type Direction uint32

// The directions, as seen from the local endpoint.
const (
	Outbound Direction = 0
	Inbound  Direction = 1
)

// String returns "outbound" or "inbound".
func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// AddressType classifies an address.
type AddressType uint8

// The address types.
const (
	// AddressUnspecified is no address, or the unspecified one.
	AddressUnspecified AddressType = 0
	// AddressUnicast is one host.
	AddressUnicast AddressType = 1
	// AddressAnycast is the nearest of several hosts; only the routing table can tell.
	AddressAnycast AddressType = 2
	// AddressMulticast is a group.
	AddressMulticast AddressType = 3
	// AddressBroadcast is everybody on the link; IPv4 only.
	AddressBroadcast AddressType = 4
)

// AddressTypeOf classifies what can be told from the address alone; a subnet's broadcast address cannot. An IPv4-mapped address
// is classified as the IPv4 address that it is.
func AddressTypeOf(a netip.Addr) AddressType {
	a = a.Unmap()
	switch {
	case !a.IsValid() || a.IsUnspecified():
		return AddressUnspecified
	case a.IsMulticast():
		return AddressMulticast
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return AddressBroadcast
	default:
		return AddressUnicast
	}
}

// Flags is the set of condition flags, the value of FieldFlags. Source: "filtering-condition-flags".
type Flags uint32

// The condition flags. Several are of the platform only and are kept so that the numbers agree.
const (
	// FlagIsLoopback is traffic that does not leave the machine; both its sides carry it.
	FlagIsLoopback Flags = 0x1
	// FlagIsIPsecSecured is traffic that IPsec protects; never set here.
	FlagIsIPsecSecured Flags = 0x2
	// FlagIsReauthorize marks an authorisation of a flow or pended operation that was authorised or pended before.
	FlagIsReauthorize Flags = 0x4
	// FlagIsWildcardBind is a bind that left the address or the port open.
	FlagIsWildcardBind Flags = 0x8
	// FlagIsRawEndpoint is a raw socket.
	FlagIsRawEndpoint Flags = 0x10
	// FlagIsFragment is a single IP fragment.
	FlagIsFragment Flags = 0x20
	// FlagIsFragmentGroup is a chain of fragments on the forward path.
	FlagIsFragmentGroup Flags = 0x40
	// FlagIsIPsecNATTReclassify is a packet shown again after decapsulation from UDP port 4500; never set here.
	FlagIsIPsecNATTReclassify Flags = 0x80
	// FlagRequiresALEClassify says that the packet is shown to auth recv-accept next; MetaALEClassifyRequired says the same.
	FlagRequiresALEClassify Flags = 0x100
	// FlagIsImplicitBind is a bind that the program did not ask for; deprecated on the platform.
	FlagIsImplicitBind Flags = 0x200
	// FlagIsReassembled is a packet put together from fragments.
	FlagIsReassembled Flags = 0x400
	// FlagIsNameAppSpecified says that the peer name was given by the program itself.
	FlagIsNameAppSpecified Flags = 0x4000
	// FlagIsPromiscuous is reserved.
	FlagIsPromiscuous Flags = 0x8000
	// FlagIsAuthFW is traffic exempted by an authenticated firewall; never set here.
	FlagIsAuthFW Flags = 0x10000
	// FlagIsReclassify is a bind or listen that is judged again.
	FlagIsReclassify Flags = 0x20000
	// FlagIsOutboundPassThru is a forwarded packet that this machine sent.
	FlagIsOutboundPassThru Flags = 0x40000
	// FlagIsInboundPassThru is a forwarded packet that this machine receives.
	FlagIsInboundPassThru Flags = 0x80000
	// FlagIsConnectionRedirected is a connection that a redirect callout sent elsewhere.
	FlagIsConnectionRedirected Flags = 0x100000
	// FlagIsProxyConnection is a connection made by a proxy, with redirect records.
	FlagIsProxyConnection Flags = 0x200000
	// FlagIsAppContainerLoopback is loopback traffic of a contained program.
	FlagIsAppContainerLoopback Flags = 0x400000
	// FlagIsNonAppContainerLoopback is loopback traffic of an ordinary program.
	FlagIsNonAppContainerLoopback Flags = 0x800000
	// FlagIsHonoringPolicyAuthorize is an extra authorisation with the destination before redirection; normally permitted.
	FlagIsHonoringPolicyAuthorize Flags = 0x2000000
)

// ReauthorizeReason is the set of reasons why a flow is authorised again, the value of FieldReauthorizeReason.
type ReauthorizeReason uint32

// The reauthorisation reasons.
const (
	// ReauthPolicyChange is a filter added or deleted at the layer that authorised the flow.
	ReauthPolicyChange ReauthorizeReason = 0x1
	// ReauthNewArrivalInterface is a packet that came by another interface than the flow's.
	ReauthNewArrivalInterface ReauthorizeReason = 0x2
	// ReauthNewNextHopInterface is a packet that leaves by another interface than the flow's.
	ReauthNewNextHopInterface ReauthorizeReason = 0x4
	// ReauthProfileCrossing is a crossing between interfaces of different network profiles.
	ReauthProfileCrossing ReauthorizeReason = 0x8
	// ReauthClassifyCompletion is the completion of an operation pended at auth connect.
	ReauthClassifyCompletion ReauthorizeReason = 0x10
	// ReauthIPsecPropertiesChanged is a change of the connection's IPsec state.
	ReauthIPsecPropertiesChanged ReauthorizeReason = 0x20
	// ReauthMidStreamInspection is a callout that asked to see existing connections.
	ReauthMidStreamInspection ReauthorizeReason = 0x40
	// ReauthSocketPropertyChanged is a change of a socket option that matters to firewalls.
	ReauthSocketPropertyChanged ReauthorizeReason = 0x80
	// ReauthNewInboundMcastBcast is a new inbound multicast or broadcast; auth recv-accept only.
	ReauthNewInboundMcastBcast ReauthorizeReason = 0x100
	// ReauthEDPPolicyChanged is a change of data-protection policy; never set here.
	ReauthEDPPolicyChanged ReauthorizeReason = 0x200
	// ReauthProxyHandleChanged is a change of the proxy's redirect handle.
	ReauthProxyHandleChanged ReauthorizeReason = 0x4000
	// ReauthCheckOffload is an offload check; never set here.
	ReauthCheckOffload ReauthorizeReason = 0x10000
)

// Values holds the field values of one indication. A field that is not set is empty; asking for it gives the zero value, and
// Has tells the difference. Values are written by the stack before it classifies and never during Classify.
//
// Units: ports and numbers in host order.
type Values struct {
	has   FieldSet
	nums  [numNumberFields]uint64
	addrs [numAddrFields]netip.Addr
	strs  [numStringFields]string
	names []string // peer names; borrowed from the name table, never written through
}

// Reset empties all fields.
func (v *Values) Reset() { v.has = FieldSet{} }

// Has reports whether a field is known.
func (v *Values) Has(f Field) bool { return v.has.Has(f) }

// Num returns the number in a field, zero where it is empty or no number.
func (v *Values) Num(f Field) uint64 {
	if int(f) < numNumberFields && v.has.Has(f) {
		return v.nums[f]
	}
	return 0
}

// Address returns the address in a field, the zero Addr where it is empty or no address.
func (v *Values) Address(f Field) netip.Addr {
	if f >= firstAddrField && f < firstStringField && v.has.Has(f) {
		return v.addrs[f-firstAddrField]
	}
	return netip.Addr{}
}

// Text returns the string in a field, "" where it is empty or no string. For FieldPeerName it is the latest name.
func (v *Values) Text(f Field) string {
	switch {
	case f < firstStringField || f >= NumFields || !v.has.Has(f):
		return ""
	case f == FieldPeerName:
		return v.names[0]
	default:
		return v.strs[f-firstStringField]
	}
}

// Value returns a field as a Value; empty where it is unknown.
func (v *Values) Value(f Field) Value {
	switch {
	case f >= NumFields || !v.has.Has(f):
		return Value{}
	case f < firstAddrField:
		return Value{kind: fieldInfos[f].kind, lo: v.nums[f]}
	case f < firstStringField:
		return Value{kind: KindAddr, addr: v.addrs[f-firstAddrField]}
	default:
		return Value{kind: KindString, text: v.Text(f)}
	}
}

// SetNum sets a number field. For the stack and for tests of callouts.
func (v *Values) SetNum(f Field, n uint64) {
	v.nums[f] = n
	v.has.Add(f)
}

// SetAddress sets an address field; an invalid address empties it. For the stack and for tests of callouts.
func (v *Values) SetAddress(f Field, a netip.Addr) {
	if !a.IsValid() {
		v.has.Remove(f)
		return
	}
	v.addrs[f-firstAddrField] = a
	v.has.Add(f)
}

// SetText sets a string field other than FieldPeerName; "" empties it. For the stack and for tests of callouts.
func (v *Values) SetText(f Field, s string) {
	if s == "" {
		v.has.Remove(f)
		return
	}
	v.strs[f-firstStringField] = s
	v.has.Add(f)
}

// SetPeerNames sets the names known for the remote address, latest first; none empties the field. The slice is lent until the
// next SetPeerNames or Reset. For the stack and for tests of callouts.
func (v *Values) SetPeerNames(names []string) {
	v.names = names
	if len(names) == 0 {
		v.has.Remove(FieldPeerName)
		return
	}
	v.has.Add(FieldPeerName)
}

// Protocol returns the transport protocol number.
func (v *Values) Protocol() uint8 { return uint8(v.Num(FieldProtocol)) }

// LocalAddr returns the address of the local endpoint.
func (v *Values) LocalAddr() netip.Addr { return v.Address(FieldLocalAddress) }

// RemoteAddr returns the address of the remote endpoint.
func (v *Values) RemoteAddr() netip.Addr { return v.Address(FieldRemoteAddress) }

// LocalPort returns the port of the local endpoint, or the ICMP type.
func (v *Values) LocalPort() uint16 { return uint16(v.Num(FieldLocalPort)) }

// RemotePort returns the port of the remote endpoint, or the ICMP code.
func (v *Values) RemotePort() uint16 { return uint16(v.Num(FieldRemotePort)) }

// Local returns address and port of the local endpoint.
func (v *Values) Local() netip.AddrPort { return netip.AddrPortFrom(v.LocalAddr(), v.LocalPort()) }

// Remote returns address and port of the remote endpoint.
func (v *Values) Remote() netip.AddrPort { return netip.AddrPortFrom(v.RemoteAddr(), v.RemotePort()) }

// Direction returns the direction; see FieldDirection for whose.
func (v *Values) Direction() Direction { return Direction(v.Num(FieldDirection)) }

// Flags returns the condition flags.
func (v *Values) Flags() Flags { return Flags(v.Num(FieldFlags)) }

// AppID returns the path of the program behind the local endpoint.
func (v *Values) AppID() string { return v.Text(FieldAppID) }

// PeerName returns the name by which the program most recently looked up the remote address, "" if it did not.
func (v *Values) PeerName() string { return v.Text(FieldPeerName) }

// PeerNames returns all names known for the remote address, latest first. The slice is lent: do not keep or change it.
func (v *Values) PeerNames() []string {
	if !v.has.Has(FieldPeerName) {
		return nil
	}
	return v.names
}

// ReauthorizeReason returns why the flow is authorised again.
func (v *Values) ReauthorizeReason() ReauthorizeReason {
	return ReauthorizeReason(v.Num(FieldReauthorizeReason))
}
