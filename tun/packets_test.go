package tun_test

import (
	"encoding/binary"
	"net/netip"
)

// udpPacket returns a UDP datagram in an IP packet of src's family, all checksums complete.
func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	b := ipHeader(src.Addr(), dst.Addr(), 17, 8+len(payload))
	start := len(b)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	b = append(b, 0, 0)
	b = append(b, payload...)
	c := ^foldSum(pseudoSum(b, start) + byteSum(b[start:]))
	if c == 0 {
		c = 0xffff // RFC 768: zero means none
	}
	binary.BigEndian.PutUint16(b[start+6:], c)
	return b
}

// ipHeader returns an IP header for a payload of size bytes.
func ipHeader(src, dst netip.Addr, protocol byte, size int) []byte {
	if src.Is4() {
		b := []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0}
		binary.BigEndian.PutUint16(b[2:], uint16(20+size))
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(b[10:], ^foldSum(byteSum(b)))
		return b
	}
	b := []byte{0x60, 0, 0, 0, 0, 0, protocol, 64}
	binary.BigEndian.PutUint16(b[4:], uint16(size))
	return append(append(b, src.AsSlice()...), dst.AsSlice()...)
}

// ipHeaderLen returns the length of the IP header of b (which has no extension headers).
func ipHeaderLen(b []byte) int {
	if b[0]>>4 == 4 {
		return int(b[0]&15) * 4
	}
	return 40
}

// protocolOf returns the transport protocol of b.
func protocolOf(b []byte) byte {
	if b[0]>>4 == 4 {
		return b[9]
	}
	return b[6]
}

// addrsOf returns source and destination of b.
func addrsOf(b []byte) (src, dst netip.Addr) {
	lo, mid, hi := 12, 16, 20
	if b[0]>>4 == 6 {
		lo, mid, hi = 8, 24, 40
	}
	src, _ = netip.AddrFromSlice(b[lo:mid])
	dst, _ = netip.AddrFromSlice(b[mid:hi])
	return src, dst
}

// pseudoSum sums the pseudo-header of the transport packet at start.
func pseudoSum(b []byte, start int) uint32 {
	addrs := b[12:20]
	if b[0]>>4 == 6 {
		addrs = b[8:40]
	}
	return byteSum(addrs) + uint32(protocolOf(b)) + uint32(len(b)-start)
}

// byteSum sums b as 16-bit words, the plain way.
func byteSum(b []byte) uint32 {
	var s uint32
	for i, c := range b {
		if i%2 == 0 {
			s += uint32(c) << 8
		} else {
			s += uint32(c)
		}
		s = s&0xffff + s>>16
	}
	return s
}

// foldSum makes a 16-bit one's complement sum of s.
func foldSum(s uint32) uint16 {
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
