package host

import (
	"fmt"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

var _ layers.InjectBackend = (*Stack)(nil)

// injectors are the identities that are given out.
type injectors struct {
	mu sync.Mutex
	// names are those of the open injectors, by identity - 1.
	// +checklocks:mu
	names [layers.MaxInjectors]string
	// +checklocks:mu
	used [layers.MaxInjectors]bool
	// next is where the search for a free identity begins, so that one is not given out again at once.
	// +checklocks:mu
	next int
}

// markFor returns the mark of a packet that a completion by holder lets in: that of the injector of the same name, if one is open.
func (i *injectors) markFor(holder string, m layers.InjectionMark) layers.InjectionMark {
	i.mu.Lock()
	defer i.mu.Unlock()
	for n, used := range i.used {
		if used && i.names[n] == holder {
			return m.By(uint8(n + 1))
		}
	}
	return m
}

// NewInjector implements layers.InjectBackend.
func (s *Stack) NewInjector(name string) (uint8, error) {
	if s.isClosing() {
		return 0, layers.ErrClosing
	}
	i := &s.injectors
	i.mu.Lock()
	defer i.mu.Unlock()
	for k := range i.used {
		n := (i.next + k) % len(i.used)
		if !i.used[n] {
			i.used[n], i.names[n], i.next = true, name, n+1
			return uint8(n + 1), nil
		}
	}
	return 0, fmt.Errorf("%d injectors are open, which is the limit: %w: close one", len(i.used), layers.ErrQueueFull)
}

// FreeInjector implements layers.InjectBackend.
func (s *Stack) FreeInjector(id uint8) {
	i := &s.injectors
	i.mu.Lock()
	defer i.mu.Unlock()
	if n := int(id) - 1; n >= 0 && n < len(i.used) {
		i.used[n], i.names[n] = false, ""
	}
}

// Inject implements layers.InjectBackend. The worker carries it out.
func (s *Stack) Inject(target layers.InjectTarget, t *layers.Taken, mark layers.InjectionMark, done func(error)) error {
	entry := s.opts.Ledger.Enter(ledger.Item, "injection queue", len(t.Bytes))
	ok := s.queue.packet(s.opts.InjectionQueue, func(late bool) {
		err := error(layers.ErrClosing)
		switch {
		case late:
		case target == layers.InjectSend:
			err = s.send(t, uint32(mark))
		default:
			err = s.receive(t, uint32(mark))
		}
		if err != nil {
			s.counters.injectionsFailed.Add(1)
		} else {
			s.counters.injected.Add(1)
		}
		t.Done()
		entry.Release()
		done(err)
	})
	if ok {
		return nil
	}
	t.Done()
	entry.Release()
	s.counters.injectionsFailed.Add(1)
	if s.isClosing() {
		return layers.ErrClosing
	}
	return fmt.Errorf("injection queue (limit %d): %w", s.opts.InjectionQueue, layers.ErrQueueFull)
}

// receive lets a packet in at the bottom of the inbound path. It runs on the worker.
//
// Ownership: lends t.
func (s *Stack) receive(t *layers.Taken, mark uint32) error {
	h, err := wire.Parse(t.Bytes)
	if err != nil {
		return fmt.Errorf("%w: %w", layers.ErrMalformed, err)
	}
	var in port = s.device
	if s.isLocal(h.Src) {
		in = s.loopback
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(t.Bytes), Mark: mark})
	defer pkt.DecRef()
	proto := conv.NetworkProtocol(h.Src)
	setSegments(pkt, t.GSOSize, h.V6)
	in.Deliver(proto, pkt)
	return nil
}

// setSegments notes the segment size of a super-packet.
func setSegments(pkt *stack.PacketBuffer, size int, v6 bool) {
	if size == 0 {
		return
	}
	pkt.GSOOptions.Type, pkt.GSOOptions.MSS = stack.GSOTCPv4, uint16(size)
	if v6 {
		pkt.GSOOptions.Type = stack.GSOTCPv6
	}
}

// send lets a packet out at the top of the outbound path: datagram data (for datagrams), outbound transport and outbound network see
// it, with its mark. It runs on the worker.
//
// Ownership: lends t.
func (s *Stack) send(t *layers.Taken, mark uint32) error {
	h, err := wire.Parse(t.Bytes)
	if err != nil {
		return fmt.Errorf("%w: %w", layers.ErrMalformed, err)
	}
	if h.Fragment {
		return fmt.Errorf("send: %w: a fragment; inject the whole packet", layers.ErrMalformed)
	}
	r, terr := s.stack.FindRoute(0, conv.Address(h.Src), conv.Address(h.Dst), conv.NetworkProtocol(h.Src), false)
	if terr != nil {
		return fmt.Errorf("send from %v to %v: %w", h.Src, h.Dst, conv.Errno(terr))
	}
	defer r.Release()
	pkt := s.parsed(t.Bytes, &h, mark)
	defer pkt.DecRef()
	super := t.GSOSize > 0 && h.Protocol == wire.TCP && h.End-h.PayloadStart > t.GSOSize
	if super {
		setSegments(pkt, t.GSOSize, h.V6)
	}
	if !s.outboundTransport(pkt) {
		return nil // a filter stopped it, and said so
	}
	if super && r.Loop()&stack.PacketOut != 0 {
		return s.sendSuper(r, pkt, &h, t.GSOSize)
	}
	raw := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(r.MaxHeaderLength()), Payload: buffer.MakeWithData(t.Bytes), Mark: mark,
	})
	defer raw.DecRef()
	if terr := r.WriteHeaderIncludedPacket(raw); terr != nil {
		return fmt.Errorf("send from %v to %v: %w", h.Src, h.Dst, conv.Errno(terr))
	}
	return nil
}

// parsed makes a packet buffer with its headers in place, as the hooks want it.
func (s *Stack) parsed(b []byte, h *wire.Header, mark uint32) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: h.PayloadStart, Payload: buffer.MakeWithData(b[h.PayloadStart:h.End]), Mark: mark})
	copy(pkt.TransportHeader().Push(h.PayloadStart-h.TransportStart), b[h.TransportStart:h.PayloadStart])
	copy(pkt.NetworkHeader().Push(h.TransportStart), b[:h.TransportStart])
	pkt.NetworkProtocolNumber = conv.NetworkProtocol(h.Src)
	pkt.TransportProtocolNumber = tcpip.TransportProtocolNumber(h.Protocol)
	return pkt
}

// sendSuper writes a TCP super-packet to the link, which cuts it; netstack would fragment it. Outbound network is raised here,
// as the packet does not pass netstack's hook.
func (s *Stack) sendSuper(_ *stack.Route, pkt *stack.PacketBuffer, h *wire.Header, size int) error {
	f := layers.V4
	if h.V6 {
		f = layers.V6
	}
	if !s.outboundIP(pkt, f) {
		return nil
	}
	length := h.End - h.TransportStart
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, conv.Address(h.Src), conv.Address(h.Dst), uint16(length))
	header.TCP(pkt.TransportHeader().Slice()).SetChecksum(sum)
	pkt.GSOOptions.NeedsCsum, pkt.GSOOptions.CsumOffset = true, header.TCPChecksumOffset
	pkt.GSOOptions.MSS, pkt.GSOOptions.L3HdrLen = uint16(size), uint16(h.TransportStart)
	var list stack.PacketBufferList
	list.PushBack(pkt)
	if _, err := s.device.WritePackets(list); err != nil {
		return fmt.Errorf("send from %v to %v: %w", h.Src, h.Dst, conv.Errno(err))
	}
	return nil
}
