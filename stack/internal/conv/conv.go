// Package conv translates between netstack's types and those of the rest of the module: addresses, prefixes, protocol numbers,
// layer families and errors. It holds no state and knows no layer beyond their names.
//
// First calls: Addr, FullAddress, Errno.
package conv

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/layers"
)

// Addr returns a netstack address as a netip.Addr; an empty one gives the zero Addr. A v4-mapped address stays as it is.
//
// Hot path: does not allocate.
func Addr(a tcpip.Address) netip.Addr {
	switch a.Len() {
	case header.IPv4AddressSize:
		return netip.AddrFrom4(a.As4())
	case header.IPv6AddressSize:
		return netip.AddrFrom16(a.As16())
	default:
		return netip.Addr{}
	}
}

// Address returns a netip.Addr as a netstack address; the zero Addr gives an empty one. The zone is not kept: netstack has it
// in FullAddress.NIC.
//
// Hot path: does not allocate.
func Address(a netip.Addr) tcpip.Address {
	switch {
	case a.Is4():
		return tcpip.AddrFrom4(a.As4())
	case a.Is6():
		return tcpip.AddrFrom16(a.As16())
	default:
		return tcpip.Address{}
	}
}

// AddrPort returns address and port of a full address. A v4-mapped address is unmapped, because a program knows no difference.
func AddrPort(f tcpip.FullAddress) netip.AddrPort {
	return netip.AddrPortFrom(Addr(f.Addr).Unmap(), f.Port)
}

// FullAddress returns address and port for netstack; an unspecified address becomes the empty one, which is how netstack names
// the wildcard.
func FullAddress(ap netip.AddrPort) tcpip.FullAddress {
	f := tcpip.FullAddress{Port: ap.Port()}
	if a := ap.Addr().Unmap(); a.IsValid() && !a.IsUnspecified() {
		f.Addr = Address(a)
	}
	return f
}

// AddressWithPrefix returns an address with the length of its prefix.
func AddressWithPrefix(p netip.Prefix) tcpip.AddressWithPrefix {
	return tcpip.AddressWithPrefix{Address: Address(p.Addr()), PrefixLen: p.Bits()}
}

// Subnet returns the network of a prefix; bits beyond its length are cleared.
//
// Errors: the prefix is invalid.
func Subnet(p netip.Prefix) (tcpip.Subnet, error) {
	if !p.IsValid() {
		return tcpip.Subnet{}, errPrefix(p)
	}
	p = p.Masked()
	return tcpip.NewSubnet(Address(p.Addr()), tcpip.MaskFromBytes(mask(p)))
}

// mask returns the netmask of a prefix.
func mask(p netip.Prefix) []byte {
	m := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

// NetworkProtocol returns netstack's number of the network protocol of an address, IPv6 for a v4-mapped one.
func NetworkProtocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

// Family returns the layer family of a network protocol.
func Family(n tcpip.NetworkProtocolNumber) layers.Family {
	if n == header.IPv6ProtocolNumber {
		return layers.V6
	}
	return layers.V4
}

// HookFamily returns the layer family of the address family that netstack names at its packet hooks.
func HookFamily(af stack.AddressFamily) layers.Family {
	if af == stack.IP6 {
		return layers.V6
	}
	return layers.V4
}

// FamilyOf returns the layer family of an address; a v4-mapped one is IPv4.
func FamilyOf(a netip.Addr) layers.Family {
	if a.Unmap().Is4() {
		return layers.V4
	}
	return layers.V6
}
