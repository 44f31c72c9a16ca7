package gateway

import (
	"fmt"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun"
)

// injection hands out the identities of injectors. Injected packets reach the loop through its queue, so that nothing is
// injected on the caller's goroutine.
type injection struct {
	mu sync.Mutex
	// +checklocks:mu
	names [layers.MaxInjectors + 1]string
	// +checklocks:mu
	used [layers.MaxInjectors + 1]bool
}

// NewInjector implements layers.InjectBackend.
func (g *Gateway) NewInjector(name string) (uint8, error) {
	i := &g.inject
	i.mu.Lock()
	defer i.mu.Unlock()
	for id := 1; id <= layers.MaxInjectors; id++ {
		if !i.used[id] {
			i.used[id], i.names[id] = true, name
			return uint8(id), nil
		}
	}
	return 0, fmt.Errorf("all %d injectors are open: %w", layers.MaxInjectors, layers.ErrQueueFull)
}

// FreeInjector implements layers.InjectBackend.
func (g *Gateway) FreeInjector(id uint8) {
	i := &g.inject
	i.mu.Lock()
	defer i.mu.Unlock()
	i.used[id], i.names[id] = false, ""
}

// Inject implements layers.InjectBackend. What is sent enters as if the program had sent it, what is received as if netstack
// had: both are indicated at every packet layer on their way.
func (g *Gateway) Inject(target layers.InjectTarget, t *layers.Taken, mark layers.InjectionMark, done func(error)) error {
	ok := g.loop.post(func() {
		var err error
		switch {
		case g.loop.stopping:
			err = layers.ErrClosing
		case target == layers.InjectSend:
			err = g.loop.injectSend(t, mark)
		default:
			err = g.loop.injectReceive(t, mark, nil)
		}
		t.Done()
		done(err)
	})
	if ok {
		return nil
	}
	t.Done()
	select {
	case <-g.loop.done:
		return layers.ErrClosing
	default:
		return layers.ErrQueueFull
	}
}

// injectSend enters a packet at the top of the outbound path.
func (l *loop) injectSend(t *layers.Taken, mark layers.InjectionMark) error {
	m := uint32(mark)
	if t.GSOSize > 0 {
		m |= link.MarkTrusted // a super-packet has no single checksum
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(t.Bytes), Mark: m})
	defer pkt.DecRef()
	if !t.Header.ChecksumsValid(t.Bytes) && t.GSOSize == 0 {
		l.g.counters.drop(dropChecksum)
		return fmt.Errorf("%w: wrong checksum", layers.ErrMalformed)
	}
	proto := header.IPv4ProtocolNumber
	if t.Header.V6 {
		proto = header.IPv6ProtocolNumber
	}
	l.input(&link.Received{Proto: proto, Packet: pkt, Offload: tun.Offload{GSOSize: uint16(t.GSOSize), CsumValid: true}})
	return nil
}

// markFor returns the mark of a packet that a completion by holder lets in: that of the injector of the same name, if one is open.
func (i *injection) markFor(holder string, m layers.InjectionMark) layers.InjectionMark {
	i.mu.Lock()
	defer i.mu.Unlock()
	for id := 1; id <= layers.MaxInjectors; id++ {
		if i.used[id] && i.names[id] == holder {
			return m.By(uint8(id))
		}
	}
	return m
}

// injectReceive enters a packet at the bottom of the inbound path. accept, which may be nil, authorises it after inbound network
// and inbound transport.
func (l *loop) injectReceive(t *layers.Taken, mark layers.InjectionMark, accept func(*scratch, layers.PacketView) bool) error {
	g := l.g
	h := &t.Header
	if t.GSOSize == 0 && !h.ChecksumsValid(t.Bytes) {
		g.counters.drop(dropChecksum)
		return fmt.Errorf("%w: wrong checksum", layers.ErrMalformed)
	}
	who := subject{proto: h.Protocol, local: h.Destination(), remote: h.Source()}
	if f := g.datagrams.flows[keyOf(h.Protocol, who.local, who.remote)]; f != nil {
		who.flow = f.who.flow
	} else if f := g.tcp[keyOf(h.Protocol, who.local, who.remote)]; f != nil {
		who.flow = f.who.flow
	}
	v := layers.PacketView{
		IPHeader: t.Bytes[:h.TransportStart:h.TransportStart], TransportHeader: t.Bytes[h.TransportStart:h.PayloadStart:h.PayloadStart],
		Payload: [][]byte{t.Bytes[h.PayloadStart:h.End:h.End]}, PayloadLen: h.End - h.PayloadStart, GSOSize: t.GSOSize, Direction: layers.Inbound, State: mark,
	}
	g.counters.packetsIn.Add(1)
	s := &g.loopScratch
	if g.inboundWanted() && !g.inboundLayers(s, &who, v) || accept != nil && !accept(s, v) {
		return fmt.Errorf("injected packet: %w", errBlocked)
	}
	if data := layers.DatagramData.Layer(who.family()); h.Protocol != wire.TCP && g.wanted(data) {
		in := g.fill(s, layers.DatagramData, &who, layers.Inbound)
		g.lend(s, v)
		if d := g.decide(s); d.Blocked() {
			g.blockedPacket(in.Layer, &who, &d)
			return fmt.Errorf("injected packet: %w", errBlocked)
		}
	}
	return l.writeTaken(t)
}

var errBlocked = fmt.Errorf("blocked by a filter")

// writeTaken writes an injected packet to the device, a super-packet with the offload that cuts it again.
func (l *loop) writeTaken(t *layers.Taken) error {
	s := &l.g.raw
	s.bufs[0] = t.Bytes
	p := tun.Packet{Bufs: s.bufs[:1]}
	if h := &t.Header; t.GSOSize > 0 && h.Protocol == wire.TCP && h.PayloadEnd-h.PayloadStart > t.GSOSize {
		p.Offload = tun.Offload{GSO: tun.GSOTCPv4, NeedsCsum: true, CsumStart: uint16(h.TransportStart), CsumOffset: header.TCPChecksumOffset,
			HdrLen: uint16(h.PayloadStart), GSOSize: uint16(t.GSOSize)}
		if h.V6 {
			p.Offload.GSO = tun.GSOTCPv6
		}
		setPseudoChecksum(t.Bytes, h)
	}
	s.pkt[0] = p
	_, err := l.g.link.WriteRaw(s.pkt[:])
	s.bufs[0], s.pkt[0] = nil, tun.Packet{}
	if err != nil {
		l.g.counters.drop(dropDevice)
		return deviceError(err)
	}
	return nil
}

// setPseudoChecksum leaves the sum of the pseudo header in the TCP checksum, as checksum offload expects it.
func setPseudoChecksum(b []byte, h *wire.Header) {
	sum := wire.PseudoSum(h.Src, h.Dst, h.Protocol, h.End-h.TransportStart)
	at := h.TransportStart + header.TCPChecksumOffset
	b[at], b[at+1] = byte(sum>>8), byte(sum)
}

func deviceError(err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrNoBufferSpace:
		return layers.ErrQueueFull
	default:
		return layers.ErrClosing
	}
}
