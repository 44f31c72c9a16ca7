package tun

import "encoding/binary"

// HeaderLen is the length of the virtio-net header before every packet of the fast path.
//
// Units: bytes.
const HeaderLen = 10

// The header, as the kernel lays it out in the machine's own byte order:
//
//	 0        1         2          4           6            8             10
//	+--------+---------+----------+-----------+------------+-------------+
//	| flags  | gso     | hdr_len  | gso_size  | csum_start | csum_offset |
//	+--------+---------+----------+-----------+------------+-------------+
const (
	flagNeedsCsum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	flagDataValid = 2 // VIRTIO_NET_HDR_F_DATA_VALID

	virtioGSONone  = 0 // VIRTIO_NET_HDR_GSO_NONE
	virtioGSOTCPv4 = 1 // VIRTIO_NET_HDR_GSO_TCPV4
	virtioGSOTCPv6 = 4 // VIRTIO_NET_HDR_GSO_TCPV6
	virtioGSOUDP   = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
)

// DecodeHeader reads the virtio-net header h of a packet of size bytes (without the header) that a device delivered.
// ok is false if the packet is to be refused for the reason given; then off is zero.
//
// What follows from it may be relied on: MinPacket ≤ size; with NeedsCsum the two checksum bytes lie inside the packet
// and behind an IP header, otherwise CsumStart and CsumOffset are zero; with GSO, 1 ≤ GSOSize ≤ size, otherwise GSOSize
// is zero; HdrLen ≤ size; GSO is never GSOUDP.
//
// Hot path: does not allocate.
func DecodeHeader(h *[HeaderLen]byte, size int) (off Offload, reason DropReason, ok bool) {
	if size < MinPacket {
		return Offload{}, DropShort, false
	}
	if *h == ([HeaderLen]byte{}) {
		return Offload{}, 0, true
	}
	flags := h[0]
	if flags&^(flagNeedsCsum|flagDataValid) != 0 {
		return Offload{}, DropFlags, false
	}
	switch h[1] {
	case virtioGSONone:
	case virtioGSOTCPv4:
		off.GSO = GSOTCPv4
	case virtioGSOTCPv6:
		off.GSO = GSOTCPv6
	default:
		// Also the ECN bit and UDP_L4: the kernel sends them only to whoever asked for them, and we do not.
		return Offload{}, DropGSOType, false
	}
	off.HdrLen = binary.NativeEndian.Uint16(h[2:])
	if off.GSO != GSONone {
		off.GSOSize = binary.NativeEndian.Uint16(h[4:])
	}
	off.CsumValid = flags&flagDataValid != 0
	if flags&flagNeedsCsum != 0 {
		off.NeedsCsum = true
		off.CsumStart = binary.NativeEndian.Uint16(h[6:])
		off.CsumOffset = binary.NativeEndian.Uint16(h[8:])
	}
	if reason, ok = off.fits(size); !ok {
		return Offload{}, reason, false
	}
	return off, 0, true
}

// EncodeHeader writes the virtio-net header of a packet of size bytes to h. ok is false if o does not fit such a packet.
// Unlike DecodeHeader it takes GSOUDP.
//
// Hot path: does not allocate.
func EncodeHeader(h *[HeaderLen]byte, o Offload, size int) (reason DropReason, ok bool) {
	if o == (Offload{}) {
		*h = [HeaderLen]byte{}
		return 0, true
	}
	if reason, ok = o.fits(size); !ok {
		return reason, false
	}
	if !PutHeader(h, o) {
		return DropGSOType, false
	}
	return 0, true
}

// PutHeader writes the virtio-net header that says o to h, whether it fits a packet or not, for whoever plays the other
// side. It is false if o has a GSO type that no header can say.
func PutHeader(h *[HeaderLen]byte, o Offload) bool {
	*h = [HeaderLen]byte{}
	if o.NeedsCsum {
		h[0] = flagNeedsCsum
	}
	if o.CsumValid {
		h[0] |= flagDataValid
	}
	switch o.GSO {
	case GSONone:
		h[1] = virtioGSONone
	case GSOTCPv4:
		h[1] = virtioGSOTCPv4
	case GSOTCPv6:
		h[1] = virtioGSOTCPv6
	case GSOUDP:
		h[1] = virtioGSOUDP
	default:
		return false
	}
	binary.NativeEndian.PutUint16(h[2:], o.HdrLen)
	binary.NativeEndian.PutUint16(h[4:], o.GSOSize)
	binary.NativeEndian.PutUint16(h[6:], o.CsumStart)
	binary.NativeEndian.PutUint16(h[8:], o.CsumOffset)
	return true
}

// fits checks the lengths and offsets of o against a packet of size bytes. The sums are made in int: two 16-bit fields
// that wrap around are the classic way past such a check.
func (o *Offload) fits(size int) (DropReason, bool) {
	if int(o.HdrLen) > size {
		return DropHdrLen, false
	}
	if o.GSO != GSONone && (o.GSOSize == 0 || int(o.GSOSize) > size) {
		return DropGSOSize, false
	}
	if o.NeedsCsum && (o.CsumStart < MinPacket || int(o.CsumStart)+int(o.CsumOffset)+2 > size) {
		return DropCsum, false
	}
	return 0, true
}

// CheckWrite checks a packet of size bytes to write against the limits and against what a device with caps does, and
// encodes its header to h. The error is ErrShort, ErrTooLong or ErrOffload, to be counted under the reason.
//
// Hot path: does not allocate.
func CheckWrite(h *[HeaderLen]byte, off Offload, size int, caps Capabilities) (DropReason, error) {
	if size < MinPacket {
		return DropShort, ErrShort
	}
	if size > MaxPacket {
		return DropTooLong, ErrTooLong
	}
	if reason, ok := EncodeHeader(h, off, size); !ok {
		return reason, ErrOffload
	}
	if !caps.carry(off) {
		return DropNoOffload, ErrOffload
	}
	return 0, nil
}

// carry reports whether a device with c takes a packet with o.
func (c Capabilities) carry(o Offload) bool {
	switch o.GSO {
	case GSONone:
		return c.Checksum || !o.NeedsCsum
	case GSOTCPv4:
		return c.TSO4 && (c.Checksum || !o.NeedsCsum)
	case GSOTCPv6:
		return c.TSO6 && (c.Checksum || !o.NeedsCsum)
	default:
		// The kernel cuts datagrams for whoever has its other offloads; it is not a capability of its own.
		return c.Checksum
	}
}
