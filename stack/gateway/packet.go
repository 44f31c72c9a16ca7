package gateway

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// endpointID is the packet's identity as netstack names it.
func (p *packet) endpointID() stack.TransportEndpointID {
	return stack.TransportEndpointID{
		LocalPort: p.remote.Port(), LocalAddress: addressOf(p.remote.Addr()),
		RemotePort: p.local.Port(), RemoteAddress: addressOf(p.local.Addr()),
	}
}

func addressOf(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

// addrOf translates an address of netstack.
func addrOf(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice()) // invalid for the empty address
	return addr.Unmap()
}

// packetOf finds the headers of a packet that was consumed before.
func packetOf(b *stack.PacketBuffer) packet {
	p := packet{buf: b, ip: b.NetworkHeader().Slice(), transport: b.TransportHeader().Slice()}
	p.h.V6 = b.NetworkProtocolNumber == header.IPv6ProtocolNumber
	p.h.Protocol = uint8(b.TransportProtocolNumber)
	p.h.TransportStart, p.h.PayloadStart = len(p.ip), len(p.ip)+len(p.transport)
	n := b.Network()
	p.h.Src, p.h.Dst = addrOf(n.SourceAddress()), addrOf(n.DestinationAddress())
	p.h.SrcPort, p.h.DstPort = binary.BigEndian.Uint16(p.transport), binary.BigEndian.Uint16(p.transport[2:])
	p.local, p.remote = p.h.Source(), p.h.Destination()
	p.h.PayloadEnd = p.h.PayloadStart + b.Data().Size()
	p.h.End = p.h.PayloadEnd
	return p
}
