package gateway

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// inputICMP takes one ICMP message from a program. Echo requests are sent on by sockets of the host, and real answers come
// back; the stack answers only for its own addresses. Everything else has no flow it could belong to.
func (l *loop) inputICMP(p *packet) {
	request := uint8(header.ICMPv4Echo)
	if p.h.V6 {
		request = uint8(header.ICMPv6EchoRequest)
	}
	if p.transport[0] != request || p.transport[1] != 0 {
		l.g.counters.drop(dropNoFlow)
		return
	}
	if l.g.isStackAddr(p.h.Dst) {
		if l.outboundPacket(p, &subject{proto: p.h.Protocol, local: p.local, remote: p.remote}) {
			l.answerEcho(p)
		}
		return
	}
	id := binary.BigEndian.Uint16(p.transport[4:])
	key := keyOf(p.h.Protocol, netip.AddrPortFrom(p.h.Src, id), netip.AddrPortFrom(p.h.Dst, 0))
	l.inputDatagram(key, p, id)
}

// answerEcho answers an echo request to the stack's own address.
func (l *loop) answerEcho(p *packet) {
	message := append(append([]byte(nil), p.transport...), p.payload()...)
	message[0] = uint8(header.ICMPv4EchoReply)
	if p.h.V6 {
		message[0] = uint8(header.ICMPv6EchoReply)
	}
	who := subject{proto: p.h.Protocol, local: netip.AddrPortFrom(p.h.Src, uint16(message[0])), remote: netip.AddrPortFrom(p.h.Dst, 0)}
	l.deliverMessage(&who, message)
}

// deliverMessage sends an ICMP message to the program, in fragments where it is longer than the device takes.
func (l *loop) deliverMessage(who *subject, message []byte) {
	l.sendToProgram(who, buildPacket(who.remote.Addr(), who.local.Addr(), who.proto, message), 0, layers.InboundTransport)
}

// payload copies the payload of a consumed packet.
func (p *packet) payload() []byte {
	out := make([]byte, 0, p.h.PayloadEnd-p.h.PayloadStart)
	for _, v := range appendPayload(nil, p.buf) {
		out = append(out, sliceOf(v)...)
	}
	return out
}

// echoSocket makes an unprivileged ping socket, or a raw one where the host allows only that.
//
// Errors: EACCES or EPERM where the host allows neither: the caller's group is outside net.ipv4.ping_group_range and it has no
// CAP_NET_RAW.
func echoSocket(family, flags int) (fd int, raw bool, err error) {
	proto := unix.IPPROTO_ICMP
	if family == unix.AF_INET6 {
		proto = unix.IPPROTO_ICMPV6
	}
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|flags, proto); err == nil {
		return fd, false, nil
	}
	if fd, rawErr := unix.Socket(family, unix.SOCK_RAW|flags, proto); rawErr == nil {
		return fd, true, nil
	}
	return -1, false, err
}

// sendEcho sends an echo request on. A ping socket puts its own identifier in; a raw one takes ours.
func (f *datagramFlow) sendEcho(p *packet) {
	message := append(append([]byte(nil), p.transport...), p.payload()...)
	if f.raw && !p.h.V6 {
		message[2], message[3] = 0, 0
		binary.BigEndian.PutUint16(message[2:], ^uint16(wire.Sum(0, message)))
	}
	err := unix.Send(f.fd, message, unix.MSG_NOSIGNAL)
	if err != nil && err != unix.EAGAIN {
		err = unix.Send(f.fd, message, unix.MSG_NOSIGNAL) // the first error may be that of an earlier request
	}
	if err != nil {
		f.l.g.counters.drop(dropSend)
		switch err {
		case unix.EMSGSIZE:
			f.tooBig(p)
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM:
			f.l.replyUnreachable(p, unreachableOf(err), 0)
		}
		return
	}
	f.bytesOut += uint64(len(message) - 8)
}

// deliverEcho passes an echo reply to the program under the identifier it used.
func (f *datagramFlow) deliverEcho(b []byte) {
	v6 := f.who.local.Addr().Is6()
	if f.raw && !v6 {
		// A raw IPv4 socket gives the IP header too.
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return
		}
		b = b[int(b[0]&15)*4:]
	}
	reply := uint8(header.ICMPv4EchoReply)
	if v6 {
		reply = uint8(header.ICMPv6EchoReply)
	}
	if len(b) < 8 || b[0] != reply || (f.raw && binary.BigEndian.Uint16(b[4:]) != f.id) {
		return
	}
	message := append([]byte(nil), b...)
	binary.BigEndian.PutUint16(message[4:], f.id)
	packet := buildPacket(f.who.remote.Addr(), f.who.local.Addr(), f.who.proto, message)
	f.l.g.counters.packetsIn.Add(1)
	if !f.indicateIn(packet) {
		return
	}
	if len(packet) <= int(f.l.g.link.MTU()) {
		f.l.write(packet)
		return
	}
	if h, err := wire.Parse(packet); err == nil {
		f.l.writeFragments(packet, &h)
	}
}

var _ layers.Pender = (*datagramFlow)(nil)
