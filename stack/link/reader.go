package link

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/tun"
)

// sizes are the views that one packet is scattered into. The first holds the headers, so that looking at them never copies a
// large chunk; the others grow so that a small packet does not pin 64 KiB.
var sizes = [...]int{128, 2048, 16384, 65536}

// Received is one packet from the device, not yet seen by the network layer.
type Received struct {
	Proto   tcpip.NetworkProtocolNumber
	Packet  *stack.PacketBuffer
	Offload tun.Offload
}

// Reader reads one queue. It is used by one goroutine.
type Reader struct {
	ep    *Endpoint
	queue tun.Queue
	slots []slot
	pkts  []tun.Packet
}

// slot is the memory for one packet: views that were filled are given away with it and made anew.
type slot struct {
	views [len(sizes)]*buffer.View
	bufs  [len(sizes)][]byte
}

// NewReader returns a reader of one queue that takes up to batch packets a call.
func (e *Endpoint) NewReader(q tun.Queue, batch int) *Reader {
	return &Reader{ep: e, queue: q, slots: make([]slot, batch), pkts: make([]tun.Packet, batch)}
}

func (s *slot) prepare() [][]byte {
	for i, v := range s.views {
		if v == nil {
			v = buffer.NewViewSize(sizes[i])
			s.views[i], s.bufs[i] = v, v.AsSlice()
		}
	}
	return s.bufs[:]
}

// take gives the filled views away as one buffer.
func (s *slot) take(size int) buffer.Buffer {
	var b buffer.Buffer
	for i := 0; size > 0 && i < len(s.views); i++ {
		v := s.views[i]
		n := min(size, v.Size())
		v.CapLength(n)
		b.Append(v)
		s.views[i], s.bufs[i] = nil, nil
		size -= n
	}
	return b
}

// TryRead reads what the device has, at most max packets and a batch, without waiting, and hands each packet to deliver, which
// is lent the packet. It returns how many packets it read; an error is tun.ErrWouldBlock when nothing is left, or why the device
// ended.
//
// Hot path: no lock, no allocation besides the pooled packet buffers.
func (r *Reader) TryRead(max int, deliver func(*Received)) (int, error) {
	return r.read(min(max, len(r.slots)), r.queue.TryRead, deliver)
}

// Read is TryRead of a whole batch, but waits for the first packet.
func (r *Reader) Read(deliver func(*Received)) (int, error) {
	return r.read(len(r.slots), r.queue.Read, deliver)
}

func (r *Reader) read(max int, read func([]tun.Packet) (int, error), deliver func(*Received)) (int, error) {
	for i := range r.slots[:max] {
		r.pkts[i] = tun.Packet{Bufs: r.slots[i].prepare()}
	}
	n, err := read(r.pkts[:max])
	for i := range r.pkts[:n] {
		r.deliver(&r.slots[i], &r.pkts[i], deliver)
	}
	return n, err
}

func (r *Reader) deliver(s *slot, p *tun.Packet, deliver func(*Received)) {
	var proto tcpip.NetworkProtocolNumber
	switch header.IPVersion(s.bufs[0][:min(p.Size, sizes[0])]) {
	case header.IPv4Version:
		proto = header.IPv4ProtocolNumber
	case header.IPv6Version:
		proto = header.IPv6ProtocolNumber
	default:
		r.ep.stats.ReadNotIP.Add(1)
		return
	}
	o := stack.PacketBufferOptions{Payload: s.take(p.Size)}
	if p.Offload.NeedsCsum || p.Offload.CsumValid {
		o.Mark = MarkTrusted
	}
	pkt := stack.NewPacketBuffer(o)
	deliver(&Received{Proto: proto, Packet: pkt, Offload: p.Offload})
	pkt.DecRef()
}

// Close gives back the memory held for packets to come.
func (r *Reader) Close() {
	for i := range r.slots {
		for j, v := range r.slots[i].views {
			if v != nil {
				v.Release()
				r.slots[i].views[j], r.slots[i].bufs[j] = nil, nil
			}
		}
	}
}
