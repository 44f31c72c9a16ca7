package identity

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// The query and its answer as they travel, host byte order except ports and addresses:
//
//	nlmsghdr 16           inet_diag_req_v2 56
//	len type flags seq pid │ family proto ext pad states │ sockid 48
//	                         inet_diag_msg 72
//	                       │ family state timer retrans  │ sockid 48 │ expires rqueue wqueue uid inode
//	sockid: sport dport src[16] dst[16] if cookie[8]
//
// Source: Linux include/uapi/linux/inet_diag.h.
const (
	headerLen  = 16
	requestLen = headerLen + 56
	answerLen  = 72
	// diagByFamily is SOCK_DIAG_BY_FAMILY, the type of query and answer.
	diagByFamily = 20
	// noCookie asks for any cookie (INET_DIAG_NOCOOKIE).
	noCookie = ^uint64(0)
	// allStates selects sockets in every state.
	allStates = ^uint32(0)
)

var errShort = errors.New("sock_diag: answer is shorter than it says")

// request is one query; it is rebuilt for each.
type request [requestLen]byte

// sockID is the key of a query in the kernel's order. For UDP the kernel wants the two sides swapped.
type sockID struct {
	src, dst netip.AddrPort
	ifindex  uint32
	cookie   uint64
}

// encode writes one exact query. The addresses of id are of one family and unmapped.
func (r *request) encode(seq uint32, proto Proto, id sockID, flags uint16, states uint32) {
	*r = request{}
	ne := binary.NativeEndian
	ne.PutUint32(r[0:], requestLen)
	ne.PutUint16(r[4:], diagByFamily)
	ne.PutUint16(r[6:], flags)
	ne.PutUint32(r[8:], seq)
	b := r[headerLen:]
	b[0] = unix.AF_INET
	b[1] = byte(proto)
	ne.PutUint32(b[4:], states)
	binary.BigEndian.PutUint16(b[8:], id.src.Port())
	binary.BigEndian.PutUint16(b[10:], id.dst.Port())
	if id.src.Addr().Is4() {
		src, dst := id.src.Addr().As4(), id.dst.Addr().As4()
		copy(b[12:], src[:])
		copy(b[28:], dst[:])
	} else if id.src.Addr().Is6() {
		b[0] = unix.AF_INET6
		src, dst := id.src.Addr().As16(), id.dst.Addr().As16()
		copy(b[12:], src[:])
		copy(b[28:], dst[:])
	}
	ne.PutUint32(b[44:], id.ifindex)
	// The cookie travels as two words, the low one first, whatever the byte order.
	ne.PutUint32(b[48:], uint32(id.cookie))
	ne.PutUint32(b[52:], uint32(id.cookie>>32))
}

// next cuts the first netlink message off b. ok is false where b ends; err where a length lies.
func next(b []byte) (typ uint16, seq uint32, body, rest []byte, err error) {
	ne := binary.NativeEndian
	if len(b) < headerLen {
		return 0, 0, nil, nil, errShort
	}
	n := int(ne.Uint32(b))
	if n < headerLen || n > len(b) {
		return 0, 0, nil, nil, errShort
	}
	end := min((n+3)&^3, len(b)) // messages are padded to four bytes
	return ne.Uint16(b[4:]), ne.Uint32(b[8:]), b[headerLen:n], b[end:], nil
}

// decode reads an inet_diag_msg.
func decode(proto Proto, b []byte) (Socket, error) {
	if len(b) < answerLen {
		return Socket{}, errShort
	}
	ne := binary.NativeEndian
	s := Socket{
		Proto:     proto,
		State:     State(b[1]),
		Interface: ne.Uint32(b[40:]),
		Cookie:    uint64(ne.Uint32(b[44:])) | uint64(ne.Uint32(b[48:]))<<32,
		UID:       ne.Uint32(b[64:]),
		Inode:     ne.Uint32(b[68:]),
	}
	var src, dst netip.Addr
	switch b[0] {
	case unix.AF_INET:
		src, dst = netip.AddrFrom4([4]byte(b[8:12])), netip.AddrFrom4([4]byte(b[24:28]))
	case unix.AF_INET6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])).Unmap(), netip.AddrFrom16([16]byte(b[24:40])).Unmap()
	default:
		return Socket{}, errors.New("sock_diag: answer of an unknown address family")
	}
	s.Local = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b[4:]))
	s.Remote = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[6:]))
	return s, nil
}
