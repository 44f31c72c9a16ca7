// Package wire finds the headers in an IP packet and computes its checksums. It trusts nothing: every length is checked
// against the bytes that are there.
//
// First calls: Parse, Header.SetChecksums, Header.ChecksumsValid.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Protocol numbers that the headers of which are understood here. Source: IANA protocol-numbers.
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58
)

// ErrTruncated and ErrHeader are wrapped by the errors of Parse.
var (
	// ErrTruncated says that the packet ends before its headers say so.
	ErrTruncated = errors.New("truncated packet")
	// ErrHeader says that a header field has an impossible value.
	ErrHeader = errors.New("bad header")
)

// Header tells where the parts of one IP packet are. Units: bytes, from the start of the packet.
type Header struct {
	V6             bool
	Protocol       uint8 // of the transport, after extension headers
	Src, Dst       netip.Addr
	SrcPort        uint16 // ports of TCP and UDP; type and code of ICMP
	DstPort        uint16
	TransportStart int // = size of the IP header with options and extension headers
	PayloadStart   int // after the transport header; equals TransportStart for a later fragment and unknown protocols
	PayloadEnd     int // where the payload ends: at End, or earlier by the length field of UDP
	End            int // where the packet ends by its own length field; bytes after it are padding
	Fragment       bool
	FirstFragment  bool
}

// Source and Destination return address and port.
func (h *Header) Source() netip.AddrPort { return netip.AddrPortFrom(h.Src, h.SrcPort) }

// Destination returns address and port.
func (h *Header) Destination() netip.AddrPort { return netip.AddrPortFrom(h.Dst, h.DstPort) }

// Parse finds the headers of an IPv4 or IPv6 packet.
//
// Errors: ErrTruncated, ErrHeader, wrapped with what is wrong.
// Source: RFC 791, 3.1; RFC 8200, 3 and 4; RFC 9293, 3.1; RFC 768.
func Parse(b []byte) (Header, error) { return ParseHead(b, len(b)) }

// ParseHead is Parse for a packet of total bytes of which only the first are at hand, in b: enough when they hold all headers.
//
// Errors: as Parse; also ErrTruncated where b ends within the headers.
func ParseHead(b []byte, total int) (Header, error) {
	if len(b) == 0 {
		return Header{}, fmt.Errorf("%w: empty", ErrTruncated)
	}
	b = b[:min(len(b), total)]
	var h Header
	var err error
	switch b[0] >> 4 {
	case 4:
		err = h.parseV4(b, total)
	case 6:
		err = h.parseV6(b, total)
	default:
		err = fmt.Errorf("%w: IP version %d", ErrHeader, b[0]>>4)
	}
	if err != nil {
		return Header{}, err
	}
	if err := h.parseTransport(b[:min(len(b), h.End)]); err != nil {
		return Header{}, err
	}
	return h, nil
}

func (h *Header) parseV4(b []byte, size int) error {
	if len(b) < 20 {
		return fmt.Errorf("%w: IPv4 header needs 20 bytes, has %d", ErrTruncated, len(b))
	}
	ihl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if ihl < 20 || total < ihl {
		return fmt.Errorf("%w: IPv4 header length %d, total length %d", ErrHeader, ihl, total)
	}
	if total > size {
		return fmt.Errorf("%w: IPv4 total length %d, has %d", ErrTruncated, total, size)
	}
	if ihl > len(b) {
		return fmt.Errorf("%w: IPv4 header needs %d bytes, has %d", ErrTruncated, ihl, len(b))
	}
	frag := binary.BigEndian.Uint16(b[6:])
	h.Fragment = frag&0x3fff != 0
	h.FirstFragment = h.Fragment && frag&0x1fff == 0
	h.Protocol = b[9]
	h.Src, h.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	h.TransportStart, h.End = ihl, total
	return nil
}

// maxExtensionHeaders bounds the walk; a kernel would follow more, a filter need not.
const maxExtensionHeaders = 8

func (h *Header) parseV6(b []byte, size int) error {
	if len(b) < 40 {
		return fmt.Errorf("%w: IPv6 header needs 40 bytes, has %d", ErrTruncated, len(b))
	}
	h.V6 = true
	h.End = 40 + int(binary.BigEndian.Uint16(b[4:]))
	if h.End > size {
		return fmt.Errorf("%w: IPv6 payload length %d, has %d", ErrTruncated, h.End-40, size-40)
	}
	end := min(h.End, len(b))
	h.Src, h.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	next, at := b[6], 40
	for range maxExtensionHeaders {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if at+8 > end || at+8+int(b[at+1])*8 > end {
				return fmt.Errorf("%w: IPv6 extension header %d", ErrTruncated, next)
			}
			next, at = b[at], at+8+int(b[at+1])*8
		case 44: // fragment
			if at+8 > end {
				return fmt.Errorf("%w: IPv6 fragment header", ErrTruncated)
			}
			off := binary.BigEndian.Uint16(b[at+2:])
			h.Fragment = off&^6 != 0
			h.FirstFragment = h.Fragment && off&^7 == 0
			next, at = b[at], at+8
			if h.Fragment && !h.FirstFragment {
				h.Protocol, h.TransportStart = next, at
				return nil
			}
		default:
			h.Protocol, h.TransportStart = next, at
			return nil
		}
	}
	return fmt.Errorf("%w: more than %d IPv6 extension headers", ErrHeader, maxExtensionHeaders)
}

// parseTransport reads ports and finds the payload; b ends where the packet ends.
func (h *Header) parseTransport(b []byte) error {
	h.PayloadStart, h.PayloadEnd = h.TransportStart, h.End
	if h.Fragment && !h.FirstFragment {
		return nil
	}
	t := b[h.TransportStart:]
	switch h.Protocol {
	case TCP:
		if len(t) < 20 {
			return fmt.Errorf("%w: TCP header needs 20 bytes, has %d", ErrTruncated, len(t))
		}
		size := int(t[12]>>4) * 4
		if size < 20 {
			return fmt.Errorf("%w: TCP data offset %d", ErrHeader, size)
		}
		if size > len(t) {
			return fmt.Errorf("%w: TCP header needs %d bytes, has %d", ErrTruncated, size, len(t))
		}
		h.PayloadStart += size
	case UDP:
		if len(t) < 8 {
			return fmt.Errorf("%w: UDP header needs 8 bytes, has %d", ErrTruncated, len(t))
		}
		h.PayloadStart += 8
		if n, has := int(binary.BigEndian.Uint16(t[4:])), h.End-h.TransportStart; !h.Fragment {
			if n < 8 || n > has {
				return fmt.Errorf("%w: UDP length %d, has %d", ErrHeader, n, has)
			}
			h.PayloadEnd = h.TransportStart + n
		}
	case ICMP, ICMPv6:
		if len(t) < 8 {
			return fmt.Errorf("%w: ICMP header needs 8 bytes, has %d", ErrTruncated, len(t))
		}
		h.SrcPort, h.DstPort = uint16(t[0]), uint16(t[1])
		h.PayloadStart += 8
		return nil
	default:
		return nil
	}
	h.SrcPort, h.DstPort = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	return nil
}

// Sum adds bytes to a running one's-complement sum. An odd-length b may only be the last part. Source: RFC 1071.
func Sum(sum uint32, b []byte) uint32 {
	acc := uint64(sum)
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		acc += v >> 32
		acc += v & 0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		acc += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		acc += uint64(b[0]) << 8
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint32(acc)
}

// PseudoSum is the sum of the pseudo header. Source: RFC 9293, 3.1; RFC 8200, 8.1.
func PseudoSum(src, dst netip.Addr, protocol uint8, length int) uint32 {
	var sum uint32
	for _, a := range [2]netip.Addr{src, dst} {
		if a.Is4() {
			b := a.As4()
			sum = Sum(sum, b[:])
		} else {
			b := a.As16()
			sum = Sum(sum, b[:])
		}
	}
	return Sum(sum, []byte{0, protocol, byte(length >> 8), byte(length)})
}

// checksumOffset returns where the transport checksum is within the transport header.
func (h *Header) checksumOffset() (off int, ok bool) {
	switch h.Protocol {
	case TCP:
		return 16, true
	case UDP:
		return 6, true
	case ICMP, ICMPv6:
		return 2, true
	default:
		return 0, false
	}
}

// transportSum sums the transport part of b, with the pseudo header where the protocol has one.
func (h *Header) transportSum(b []byte) uint32 {
	t := b[h.TransportStart:h.PayloadEnd]
	if h.Protocol == ICMP {
		return Sum(0, t)
	}
	return Sum(PseudoSum(h.Src, h.Dst, h.Protocol, len(t)), t)
}

// SetChecksums writes the IP and transport checksums into b, the packet that h was parsed from. A fragment gets only the IP
// checksum.
func (h *Header) SetChecksums(b []byte) {
	if !h.V6 {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^uint16(Sum(0, b[:h.TransportStart])))
	}
	off, ok := h.checksumOffset()
	if !ok || h.Fragment {
		return
	}
	at := h.TransportStart + off
	b[at], b[at+1] = 0, 0
	c := ^uint16(h.transportSum(b))
	if c == 0 && h.Protocol == UDP {
		c = 0xffff // zero means "no checksum"
	}
	binary.BigEndian.PutUint16(b[at:], c)
}

// ChecksumsValid reports whether the IP and transport checksums of b are right. A UDP/IPv4 datagram may have none; the
// transport checksum of a fragment and of an unknown protocol is not looked at.
func (h *Header) ChecksumsValid(b []byte) bool {
	if !h.V6 && Sum(0, b[:h.TransportStart]) != 0xffff {
		return false
	}
	off, ok := h.checksumOffset()
	if !ok || h.Fragment {
		return true
	}
	if h.Protocol == UDP && binary.BigEndian.Uint16(b[h.TransportStart+off:]) == 0 {
		return !h.V6
	}
	return h.transportSum(b) == 0xffff
}
