package gateway

import (
	"encoding/binary"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/internal/wire"
)

// Datagrams to the host are collected over one turn of the loop and sent in as few system calls as possible: those of equal
// size as one with UDP_SEGMENT, others with sendmmsg. Datagrams from the host are received in batches.

// outDatagram is one datagram on its way to the host.
type outDatagram struct {
	buf  *stack.PacketBuffer // one reference held
	size int                 // bytes of payload
	df   bool
}

const (
	// maxBatch bounds what one flow collects before it is sent at once. Source: UDP_MAX_SEGMENTS of older kernels.
	maxBatch = 64
	// maxSegmented is the most one UDP_SEGMENT send may carry. Units: bytes.
	maxSegmented = 65507 - 40
	recvBatch    = 16
)

// send hands a datagram to the batch of its flow.
func (f *datagramFlow) send(p *packet) {
	if f.port != nil {
		f.port.sendTo(f, p)
		return
	}
	f.applyHeader(p)
	if f.who.proto != wire.UDP {
		f.sendEcho(p)
		return
	}
	if len(f.batch) == 0 {
		f.l.sending = append(f.l.sending, f)
	}
	f.batch = append(f.batch, outDatagram{buf: p.buf.IncRef(), size: p.h.PayloadEnd - p.h.PayloadStart, df: f.df})
	if len(f.batch) == maxBatch {
		f.flush()
	}
}

// flushDatagrams sends what the turn collected.
func (l *loop) flushDatagrams() {
	for i, f := range l.sending {
		f.flush()
		l.sending[i] = nil
	}
	l.sending = l.sending[:0]
}

func (f *datagramFlow) releaseBatch() {
	for i := range f.batch {
		f.batch[i].buf.DecRef()
		f.batch[i] = outDatagram{}
	}
	f.batch = f.batch[:0]
}

// flush sends the batch in order.
func (f *datagramFlow) flush() {
	for at := 0; at < len(f.batch) && f.fd >= 0; {
		n := f.sameSize(at)
		f.sendRun(f.batch[at : at+n])
		at += n
	}
	f.releaseBatch()
}

// sameSize counts how many datagrams from at on can go as segments of one send: equal sizes, the last may be shorter.
func (f *datagramFlow) sameSize(at int) int {
	size, total, n := f.batch[at].size, 0, 0
	for _, d := range f.batch[at:] {
		if d.size > size || d.size == 0 || total+d.size > maxSegmented {
			break
		}
		total += d.size
		n++
		if d.size < size {
			break
		}
	}
	return max(n, 1)
}

// datagramScratch is the loop's memory for sending and receiving.
type datagramScratch struct {
	iov     []unix.Iovec
	control [32]byte
	// for recvmmsg
	bufs []byte
	iovs [recvBatch]unix.Iovec
	msgs [recvBatch]mmsghdr
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// headroom is kept before each received datagram for IP and UDP headers.
const headroom = header.IPv6MinimumSize + header.UDPMinimumSize

const recvSlot = headroom + 65536

func (s *datagramScratch) init() {
	s.bufs = make([]byte, recvBatch*recvSlot)
	for i := range s.msgs {
		b := s.bufs[i*recvSlot+headroom : (i+1)*recvSlot]
		s.iovs[i].Base = &b[0]
		s.iovs[i].SetLen(len(b))
		s.msgs[i].hdr.Iov = &s.iovs[i]
		s.msgs[i].hdr.SetIovlen(1)
	}
}

// sendRun sends datagrams of one size.
//
// Hot path: one system call, no copy, no allocation.
func (f *datagramFlow) sendRun(run []outDatagram) {
	s := &f.l.g.dgram
	s.iov = s.iov[:0]
	total := 0
	for i := range run {
		s.iov = appendPayload(s.iov, run[i].buf)
		total += run[i].size
	}
	var msg unix.Msghdr
	if len(s.iov) > 0 {
		msg.Iov = &s.iov[0]
		msg.SetIovlen(len(s.iov))
	}
	if len(run) > 1 {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&s.control[0]))
		h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		h.SetLen(unix.CmsgLen(2))
		binary.NativeEndian.PutUint16(s.control[unix.CmsgLen(0):], uint16(run[0].size))
		msg.Control = &s.control[0]
		msg.SetControllen(unix.CmsgSpace(2))
	}
	errno := sysSendmsg(f.fd, &msg)
	switch {
	case errno == 0:
		f.bytesOut += uint64(total)
	case len(run) > 1:
		// A kernel or path that does not segment, or a queued error of an earlier datagram: one by one.
		for i := range run {
			f.sendRun(run[i : i+1])
		}
	default:
		// The first error may be that of an earlier datagram, which the error queue tells too; this one was not sent then.
		if errno != syscall.EAGAIN {
			if errno = sysSendmsg(f.fd, &msg); errno == 0 {
				f.bytesOut += uint64(total)
				return
			}
		}
		f.sendFailed(&run[0], errno)
	}
}

// sendFailed acts on a datagram that the host's kernel did not take.
func (f *datagramFlow) sendFailed(d *outDatagram, errno syscall.Errno) {
	f.l.g.counters.drop(dropSend)
	p := packetOf(d.buf)
	switch errno {
	case syscall.EMSGSIZE:
		f.tooBig(&p)
	case syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.EACCES, syscall.EPERM:
		f.l.replyUnreachable(&p, unreachableOf(errno), 0)
	}
}

// appendPayload describes the payload of a consumed packet.
func appendPayload(iov []unix.Iovec, pkt *stack.PacketBuffer) []unix.Iovec {
	views, skip := pkt.AsViewList()
	skip += pkt.HeaderSize()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		e := unix.Iovec{Base: &b[skip]}
		e.SetLen(len(b) - skip)
		iov = append(iov, e)
		skip = 0
	}
	return iov
}

// sysSendmsg sends one message.
func sysSendmsg(fd int, msg *unix.Msghdr) syscall.Errno {
	for {
		_, _, e := syscall.RawSyscall(syscall.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(msg)), unix.MSG_NOSIGNAL)
		if e != syscall.EINTR {
			return e
		}
	}
}

// receive takes what the host sent and passes it to the program: one datagram, or a batch where they come in consecutive turns.
func (f *datagramFlow) receive() {
	s := &f.l.g.dgram
	burst := f.l.turn-f.turn <= 1
	f.turn = f.l.turn
	if !burst {
		n, errno := sysRead(f.fd, s.bufs[headroom:recvSlot])
		if errno != 0 {
			return // EAGAIN, or an error that the error queue explains
		}
		f.received(s.bufs[:recvSlot], n)
		return
	}
	n, _, errno := syscall.RawSyscall6(unix.SYS_RECVMMSG, uintptr(f.fd), uintptr(unsafe.Pointer(&s.msgs[0])), recvBatch, unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return // EAGAIN, or an error that the error queue explains
	}
	for i := range int(n) {
		f.received(s.bufs[i*recvSlot:(i+1)*recvSlot], int(s.msgs[i].len))
		if f.fd < 0 {
			return
		}
	}
}

// received passes one message of n bytes, behind the headroom of its slot, to the program.
func (f *datagramFlow) received(slot []byte, n int) {
	f.used = f.l.now
	f.l.g.datagrams.lru.MoveToFront(f.lru)
	f.bytesIn += uint64(n)
	if f.who.proto == wire.UDP {
		f.l.deliverUDP(f, slot, n)
		return
	}
	f.deliverEcho(slot[headroom : headroom+n])
}

// deliverUDP builds the headers in front of a received datagram and writes it to the device, in fragments where it is longer
// than the device takes. slot holds the payload after the headroom.
//
// Hot path: no copy, no allocation.
func (l *loop) deliverUDP(f *datagramFlow, slot []byte, n int) {
	src, dst := f.who.remote, f.who.local
	ipLen := header.IPv4MinimumSize
	if dst.Addr().Is6() {
		ipLen = header.IPv6MinimumSize
	}
	at := headroom - header.UDPMinimumSize - ipLen
	b := slot[at : headroom+n]
	udp := header.UDP(b[ipLen:])
	udp.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(header.UDPMinimumSize + n)})
	h := wire.Header{V6: ipLen == header.IPv6MinimumSize, Protocol: wire.UDP, Src: src.Addr(), Dst: dst.Addr(), TransportStart: ipLen, PayloadEnd: len(b), End: len(b)}
	l.encodeIP(b, &h)
	h.SetChecksums(b)
	l.g.counters.packetsIn.Add(1)
	if !f.indicateIn(b) {
		return
	}
	if len(b) > int(l.g.link.MTU()) {
		l.writeFragments(b, &h)
		return
	}
	l.write(b)
}

// encodeIP writes the IP header of a packet whose parts h names.
func (l *loop) encodeIP(b []byte, h *wire.Header) {
	if h.V6 {
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(h.End - h.TransportStart), TransportProtocol: header.UDPProtocolNumber,
			HopLimit: defaultTTL, SrcAddr: addressOf(h.Src), DstAddr: addressOf(h.Dst)})
		return
	}
	l.ipID++
	header.IPv4(b).Encode(&header.IPv4Fields{TotalLength: uint16(h.End), ID: l.ipID, TTL: defaultTTL, Protocol: h.Protocol,
		SrcAddr: addressOf(h.Src), DstAddr: addressOf(h.Dst)})
}

// writeFragments cuts a packet. Source: RFC 791, 2.3; RFC 8200, 4.5.
func (l *loop) writeFragments(b []byte, h *wire.Header) {
	const fragHeader = header.IPv6FragmentHeaderSize
	mtu, ipLen := int(l.g.link.MTU()), h.TransportStart
	extra := 0
	l.ipID++
	if h.V6 {
		extra = fragHeader
	} else {
		binary.BigEndian.PutUint16(b[4:], l.ipID) // fragments of two packets must not be taken for one another's
	}
	step := (mtu - ipLen - extra) &^ 7
	if step <= 0 {
		l.g.counters.drop(dropDevice)
		return
	}
	payload := b[ipLen:]
	frag := make([]byte, ipLen+extra+step)
	for at := 0; at < len(payload); at += step {
		part := payload[at:min(at+step, len(payload))]
		more := at+len(part) < len(payload)
		out := frag[:ipLen+extra+len(part)]
		copy(out, b[:ipLen])
		copy(out[ipLen+extra:], part)
		if h.V6 {
			binary.BigEndian.PutUint16(out[4:], uint16(extra+len(part)))
			out[6] = uint8(header.IPv6FragmentHeader)
			off := uint16(at)
			if more {
				off |= 1
			}
			out[ipLen], out[ipLen+1] = h.Protocol, 0
			binary.BigEndian.PutUint16(out[ipLen+2:], off)
			binary.BigEndian.PutUint32(out[ipLen+4:], uint32(l.ipID))
		} else {
			off := uint16(at / 8)
			if more {
				off |= 0x2000
			}
			binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
			binary.BigEndian.PutUint16(out[6:], off)
			out[10], out[11] = 0, 0
			binary.BigEndian.PutUint16(out[10:], ^uint16(wire.Sum(0, out[:ipLen])))
		}
		if !l.write(out) {
			return
		}
	}
}
