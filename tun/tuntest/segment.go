package tuntest

import (
	"encoding/binary"

	"github.com/wfpstack/wfpstack/tun"
)

// segmenter cuts a UDP super-packet into datagrams, as the kernel does before anybody reads it.
type segmenter struct {
	whole   []byte
	segment []byte
}

// udpCsumOffset is where a UDP header has its checksum.
const udpCsumOffset = 6

// protocolUDP is UDP's number in an IP header.
const protocolUDP = 17

// cut calls push with each datagram of p, which is size bytes long. A push that fails ends it: the datagrams before
// have arrived, those after have not, as when a queue of the kernel overflows within a burst.
//
// Errors: tun.ErrInvalid if p is no UDP packet; those of push for the first datagram. Later ones are lost silently,
// because the packet was partly accepted.
func (s *segmenter) cut(p *tun.Packet, size int, push func(*[tun.HeaderLen]byte, [][]byte) error) error {
	s.whole = s.whole[:0]
	for _, b := range p.Bufs {
		s.whole = append(s.whole, b...)
	}
	start := int(p.Offload.CsumStart)
	if !p.Offload.NeedsCsum || !isUDP(s.whole, start) || start+8 > size {
		return tun.ErrInvalid
	}
	payload := s.whole[start+8:]
	step := int(p.Offload.GSOSize)
	for i, number := 0, 0; i < len(payload) || i == 0; i, number = i+step, number+1 {
		part := payload[i:min(i+step, len(payload))]
		s.segment = append(append(s.segment[:0], s.whole[:start+8]...), part...)
		s.patch(start, number)
		var h [tun.HeaderLen]byte
		off := tun.Offload{NeedsCsum: true, CsumStart: uint16(start), CsumOffset: udpCsumOffset}
		if _, ok := tun.EncodeHeader(&h, off, len(s.segment)); !ok {
			return tun.ErrInvalid
		}
		if err := push(&h, [][]byte{s.segment}); err != nil {
			if number > 0 {
				return nil
			}
			return err
		}
	}
	return nil
}

// isUDP reports whether b is an IP packet with a UDP header at start.
func isUDP(b []byte, start int) bool {
	switch b[0] >> 4 {
	case 4:
		return len(b) >= 20 && b[9] == protocolUDP && int(b[0]&15)*4 == start
	case 6:
		return len(b) >= 40 && b[6] == protocolUDP && start == 40
	default:
		return false
	}
}

// patch makes the headers of the segment right for its own length: IP length, identification and checksum, UDP length,
// and the pseudo-header's sum in the UDP checksum.
func (s *segmenter) patch(start, number int) {
	b := s.segment
	udp := b[start:]
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	var pseudo uint32
	if b[0]>>4 == 4 {
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[4:], binary.BigEndian.Uint16(b[4:])+uint16(number))
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^fold(sum(b[:start], 0)))
		pseudo = sum(b[12:20], 0)
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(len(udp)))
		pseudo = sum(b[8:40], 0)
	}
	pseudo += protocolUDP + uint32(len(udp))
	binary.BigEndian.PutUint16(udp[udpCsumOffset:], fold(pseudo))
}

// sum adds b, as 16-bit words, to start.
func sum(b []byte, start uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		start += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	return start
}

// fold makes a 16-bit one's complement sum of s.
func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
