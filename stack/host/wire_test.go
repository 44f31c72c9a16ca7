package host

import (
	"encoding/binary"
	"net/netip"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/tun"
)

// noOffload is the offload header of a packet with complete checksums for which nobody vouches.
var noOffload tun.Offload

// ipPacket puts an IP header before a transport part and completes the checksums.
func ipPacket(src, dst netip.Addr, proto byte, part []byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, 20, 20+len(part))
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(part)))
	} else {
		b = make([]byte, 40, 40+len(part))
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(len(part)))
	}
	if src.Is4() {
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
	} else {
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	}
	b = append(b, part...)
	h, err := wire.Parse(b)
	if err != nil {
		panic(err)
	}
	h.SetChecksums(b)
	return b
}

// echoRequest is a ping.
func echoRequest(src, dst netip.Addr, id, seq uint16) []byte {
	p := make([]byte, 8+16)
	p[0] = 8
	proto := byte(wire.ICMP)
	if src.Is6() {
		p[0], proto = 128, wire.ICMPv6
	}
	binary.BigEndian.PutUint16(p[4:], id)
	binary.BigEndian.PutUint16(p[6:], seq)
	return ipPacket(src, dst, proto, p)
}

// udpPacket is a datagram.
func udpPacket(src, dst netip.AddrPort, data []byte) []byte {
	p := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(p, src.Port())
	binary.BigEndian.PutUint16(p[2:], dst.Port())
	binary.BigEndian.PutUint16(p[4:], uint16(8+len(data)))
	return ipPacket(src.Addr(), dst.Addr(), wire.UDP, append(p, data...))
}

// TCP flags.
const (
	flagSYN = 2
	flagRST = 4
	flagACK = 16
)

// tcpPacket is a segment without data and options.
func tcpPacket(src, dst netip.AddrPort, seq, ack uint32, flags byte) []byte {
	p := make([]byte, 20)
	binary.BigEndian.PutUint16(p, src.Port())
	binary.BigEndian.PutUint16(p[2:], dst.Port())
	binary.BigEndian.PutUint32(p[4:], seq)
	binary.BigEndian.PutUint32(p[8:], ack)
	p[12], p[13] = 5<<4, flags
	binary.BigEndian.PutUint16(p[14:], 65535)
	return ipPacket(src.Addr(), dst.Addr(), wire.TCP, p)
}
