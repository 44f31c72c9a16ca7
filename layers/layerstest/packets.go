package layerstest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/wfpstack/wfpstack/internal/wire"
)

// Protocol numbers, for the options that take one.
const (
	ICMP   uint8 = wire.ICMP
	TCP    uint8 = wire.TCP
	UDP    uint8 = wire.UDP
	ICMPv6 uint8 = wire.ICMPv6
)

// The TCP flags.
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

// Segment describes a TCP segment.
type Segment struct {
	Src, Dst netip.AddrPort
	Flags    uint8
	Seq, Ack uint32
	Options  []byte // padded with no-operations to a multiple of four
	Payload  []byte
}

// TCPPacket builds an IP packet with right checksums; the family is that of the addresses.
func TCPPacket(s Segment) []byte {
	options := s.Options
	for len(options)%4 != 0 {
		options = append(options[:len(options):len(options)], 1)
	}
	t := make([]byte, 20, 20+len(options)+len(s.Payload))
	binary.BigEndian.PutUint16(t[0:], s.Src.Port())
	binary.BigEndian.PutUint16(t[2:], s.Dst.Port())
	binary.BigEndian.PutUint32(t[4:], s.Seq)
	binary.BigEndian.PutUint32(t[8:], s.Ack)
	t[12], t[13] = byte(20+len(options))<<2, s.Flags
	binary.BigEndian.PutUint16(t[14:], 64240)
	t = append(append(t, options...), s.Payload...)
	return ipPacket(s.Src.Addr(), s.Dst.Addr(), TCP, t)
}

// UDPPacket builds an IP packet with right checksums; the family is that of the addresses.
func UDPPacket(src, dst netip.AddrPort, payload []byte) []byte {
	t := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(t[0:], src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint16(t[4:], uint16(8+len(payload)))
	return ipPacket(src.Addr(), dst.Addr(), UDP, append(t, payload...))
}

// Echo describes an ICMP echo message.
type Echo struct {
	Src, Dst netip.Addr
	Reply    bool
	ID, Seq  uint16
	Payload  []byte
}

// EchoPacket builds an ICMP or ICMPv6 packet with right checksums.
func EchoPacket(e Echo) []byte {
	proto, kind := ICMP, uint8(8)
	switch {
	case e.Src.Is4() && e.Reply:
		kind = 0
	case !e.Src.Is4() && e.Reply:
		proto, kind = ICMPv6, 129
	case !e.Src.Is4():
		proto, kind = ICMPv6, 128
	}
	t := make([]byte, 8, 8+len(e.Payload))
	t[0] = kind
	binary.BigEndian.PutUint16(t[4:], e.ID)
	binary.BigEndian.PutUint16(t[6:], e.Seq)
	return ipPacket(e.Src, e.Dst, proto, append(t, e.Payload...))
}

// ICMPErrorPacket builds an ICMP or ICMPv6 error of a type and code that quotes a packet: all of it up to 548 bytes in IPv4,
// up to 1,232 in IPv6. value is the second word of the message, such as an MTU.
func ICMPErrorPacket(src, dst netip.Addr, kind, code uint8, value uint32, quoted []byte) []byte {
	proto, limit := ICMP, 548
	if !src.Is4() {
		proto, limit = ICMPv6, 1232
	}
	quoted = quoted[:min(len(quoted), limit)]
	t := make([]byte, 8, 8+len(quoted))
	t[0], t[1] = kind, code
	binary.BigEndian.PutUint32(t[4:], value)
	return ipPacket(src, dst, proto, append(t, quoted...))
}

// ipPacket puts an IP header before a transport header and fills in all checksums.
func ipPacket(src, dst netip.Addr, proto uint8, t []byte) []byte {
	var b []byte
	switch {
	case src.Is4() && dst.Is4():
		b = make([]byte, 20, 20+len(t))
		b[0], b[6], b[8], b[9] = 0x45, 0x40, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(t)))
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
	case src.Is6() && dst.Is6():
		b = make([]byte, 40, 40+len(t))
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(len(t)))
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	default:
		panic(fmt.Sprintf("layerstest: packet from %v to %v: the addresses differ in family", src, dst))
	}
	b = append(b, t...)
	h, err := wire.Parse(b)
	if err != nil {
		panic(fmt.Sprintf("layerstest: packet from %v to %v: %v", src, dst, err))
	}
	h.SetChecksums(b)
	return b
}
