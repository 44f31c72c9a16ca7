package gateway

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/wire"
)

// unreachableOf is how an errno of the host is told to the program.
func unreachableOf(err error) unreachable {
	switch err {
	case unix.ENETUNREACH:
		return unreachNet
	case unix.ECONNREFUSED:
		return unreachPort
	case unix.EACCES, unix.EPERM:
		return unreachProhibited
	default:
		return unreachHost
	}
}

// ordinaryMTU is the MTU of an ordinary link. Units: bytes.
const ordinaryMTU = 1500

// applyHeader makes the socket send what the program's IP header asks for: hop limit and path MTU discovery.
func (f *datagramFlow) applyHeader(p *packet) {
	if f.port != nil {
		return // shared by all clients
	}
	ttl, df := p.ip[7], true
	level, ttlOpt, mtuOpt := unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
	if !p.h.V6 {
		ttl, df = p.ip[8], header.IPv4(p.ip).Flags()&header.IPv4FlagDontFragment != 0
		level, ttlOpt, mtuOpt = unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER
	}
	if ttl != f.ttl && (f.ttl != 0 || ttl != defaultTTL) {
		f.ttl = ttl
		_ = unix.SetsockoptInt(f.fd, level, ttlOpt, int(ttl)) // a hop limit of 0 is refused: the packet goes with the last
	}
	// What came in fragments may go on in fragments. So may what no program on a machine with an ordinary link could send in one
	// piece: its kernel would cut it there, and it only fits the device here because that takes more.
	df = df && !p.reassembled && p.h.End <= ordinaryMTU
	if df != f.df {
		f.df = df
		mode := unix.IP_PMTUDISC_DONT
		if df {
			mode = unix.IP_PMTUDISC_DO
		}
		_ = unix.SetsockoptInt(f.fd, level, mtuOpt, mode) // exists on every Linux
	}
}

// tooBig answers a datagram that does not fit the path, as the router before the narrow link does.
func (f *datagramFlow) tooBig(p *packet) {
	level, opt := unix.IPPROTO_IP, unix.IP_MTU
	if p.h.V6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	mtu, err := unix.GetsockoptInt(f.fd, level, opt)
	if err != nil || p.h.End <= mtu {
		return
	}
	f.l.replyUnreachable(p, unreachTooBig, mtu)
}

// readErrors shows the program the ICMP errors that the host's kernel queued for the socket.
func (f *datagramFlow) readErrors() {
	var payload [2048]byte
	var oob [512]byte
	for f.fd >= 0 {
		n, oobn, _, _, err := unix.Recvmsg(f.fd, payload[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			_ = socketError(f.fd) // cleared, so that EPOLLERR ends
			return
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			continue
		}
		for i := range msgs {
			f.queuedError(&msgs[i], payload[:n])
		}
	}
}

// queuedError translates one sock_extended_err. Source: ip(7), IP_RECVERR.
func (f *datagramFlow) queuedError(m *unix.SocketControlMessage, sent []byte) {
	if len(m.Data) < 16 || !(m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR ||
		m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR) {
		return
	}
	origin, typ, code, info := m.Data[4], m.Data[5], m.Data[6], binary.NativeEndian.Uint32(m.Data[8:])
	v6 := f.who.local.Addr().Is6()
	var h icmpHeader
	switch {
	case origin == unix.SO_EE_ORIGIN_ICMP && !v6, origin == unix.SO_EE_ORIGIN_ICMP6 && v6:
		h = icmpHeader{typ, code, info}
		if !v6 && typ != uint8(header.ICMPv4DstUnreachable) {
			h.info = 0
		}
	default:
		return // a local error is what a send of ours returned: it was told then
	}
	from := offender(m.Data[16:])
	if !from.IsValid() || from.Is4() == v6 || from.IsLoopback() {
		from = f.who.remote.Addr()
	}
	f.l.sendICMPError(from, f.who.local.Addr(), h, f.quote(sent))
}

// offender reads the address of who sent the error, a sockaddr.
func offender(b []byte) netip.Addr {
	if len(b) < 8 {
		return netip.Addr{}
	}
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(b[4:8]))
	case unix.AF_INET6:
		if len(b) >= 24 {
			return netip.AddrFrom16([16]byte(b[8:24])).Unmap()
		}
	}
	return netip.Addr{}
}

// quote rebuilds the packet of the program that an error is about.
func (f *datagramFlow) quote(sent []byte) []byte {
	limit := 512
	sent = sent[:min(len(sent), limit)]
	var message []byte
	if f.who.proto == wire.UDP {
		message = make([]byte, 8, 8+len(sent))
		binary.BigEndian.PutUint16(message, f.who.local.Port())
		binary.BigEndian.PutUint16(message[2:], f.who.remote.Port())
		binary.BigEndian.PutUint16(message[4:], uint16(8+len(sent)))
		message = append(message, sent...)
	} else {
		message = append(message, sent...)
		if len(message) >= 8 {
			binary.BigEndian.PutUint16(message[4:], f.id)
		}
	}
	if len(message) < 8 {
		message = append(message, make([]byte, 8-len(message))...)
	}
	return buildPacket(f.who.local.Addr(), f.who.remote.Addr(), f.who.proto, message)
}
