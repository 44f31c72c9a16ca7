// Package link connects netstack to a tun.Device: a link endpoint that writes, and a reader that turns what the device delivers
// into packet buffers. It decides nothing about packets and knows no layer.
//
// First calls: New, Endpoint.NewReader, Reader.TryRead.
package link

import (
	"errors"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/tun"
)

// MarkTrusted is set in the mark of a received packet whose transport checksum the kernel on the other side vouches for. All
// others are to be verified by whoever takes them from the network layer. Netstack keeps the mark through reassembly and
// clones, but has only one answer for a whole NIC, so that it cannot do this itself.
const MarkTrusted uint32 = 1 << 31

// Stats counts what the link could not pass on, each under one reason.
type Stats struct {
	WriteQueueFull atomic.Uint64 // the device's queue was full
	WriteGone      atomic.Uint64 // the device is gone or closed
	WriteFailed    atomic.Uint64 // any other refusal of the device
	ReadNotIP      atomic.Uint64 // neither IPv4 nor IPv6
}

// Endpoint is netstack's link endpoint over a device. WritePackets may be called from any goroutine.
//
// It returns nothing but nil, ErrNoBufferSpace and ErrClosedForSend to netstack, whose forwarding code panics on others.
type Endpoint struct {
	dev   tun.Device
	caps  tun.Capabilities
	stats Stats
	mtu   atomic.Uint32

	dispatcher atomic.Pointer[dispatcherBox]

	// writeMu serialises writers of the queue; a queue takes one at a time.
	writeMu sync.Mutex
	// +checklocks:writeMu
	queue tun.Queue
	// +checklocks:writeMu
	out []tun.Packet
}

type dispatcherBox struct{ stack.NetworkDispatcher }

var (
	_ stack.LinkEndpoint = (*Endpoint)(nil)
	_ stack.GSOEndpoint  = (*Endpoint)(nil)
)

// New returns a link endpoint that writes to the first queue of dev.
func New(dev tun.Device) *Endpoint {
	e := &Endpoint{dev: dev, caps: dev.Offloads(), queue: dev.Queues()[0]}
	e.mtu.Store(uint32(dev.MTU()))
	return e
}

// Device returns the device below.
func (e *Endpoint) Device() tun.Device { return e.dev }

// Stats returns the live counters.
func (e *Endpoint) Stats() *Stats { return &e.stats }

// MTU implements stack.LinkEndpoint.
func (e *Endpoint) MTU() uint32 { return e.mtu.Load() }

// SetMTU implements stack.LinkEndpoint.
func (e *Endpoint) SetMTU(mtu uint32) { e.mtu.Store(mtu) }

// MaxHeaderLength implements stack.LinkEndpoint; there is no link header.
func (*Endpoint) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.LinkEndpoint; a TUN device has none.
func (*Endpoint) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.LinkEndpoint; a TUN device has none to set.
func (*Endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements stack.LinkEndpoint. Received checksums are declared valid for the whole NIC; MarkTrusted tells which
// are. Checksum offload for sending is not declared: netstack would leave the checksum out of packets that carry no GSO options
// and say so nowhere. Those that do carry them are offloaded all the same.
func (*Endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

// GSOMaxSize implements stack.GSOEndpoint.
func (*Endpoint) GSOMaxSize() uint32 { return 65535 }

// SupportedGSO implements stack.GSOEndpoint.
func (e *Endpoint) SupportedGSO() stack.SupportedGSO {
	if e.caps.TSO4 && e.caps.TSO6 && e.caps.Checksum {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// Attach implements stack.LinkEndpoint.
func (e *Endpoint) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		e.dispatcher.Store(nil)
		return
	}
	e.dispatcher.Store(&dispatcherBox{d})
}

// IsAttached implements stack.LinkEndpoint.
func (e *Endpoint) IsAttached() bool { return e.dispatcher.Load() != nil }

// Wait implements stack.LinkEndpoint; the endpoint has no goroutine.
func (*Endpoint) Wait() {}

// ARPHardwareType implements stack.LinkEndpoint.
func (*Endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.LinkEndpoint; there is no link header.
func (*Endpoint) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements stack.LinkEndpoint; there is no link header.
func (*Endpoint) ParseHeader(*stack.PacketBuffer) bool { return true }

// Close implements stack.LinkEndpoint; the device belongs to whoever opened it.
func (*Endpoint) Close() {}

// SetOnCloseAction implements stack.LinkEndpoint; there is nothing to run.
func (*Endpoint) SetOnCloseAction(func()) {}

// Deliver hands a packet to the network layer. Ownership: lends pkt.
func (e *Endpoint) Deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := e.dispatcher.Load(); d != nil {
		d.DeliverNetworkPacket(proto, pkt)
	}
}

// WritePackets implements stack.LinkWriter. What the device does not take is dropped and counted; TCP sends it again.
//
// Hot path: no allocation once the scratch has grown.
func (e *Endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	e.writeMu.Lock()
	defer e.writeMu.Unlock()
	n := 0
	for _, pkt := range pkts.AsSlice() {
		if n == len(e.out) {
			e.out = append(e.out, tun.Packet{Bufs: make([][]byte, 0, 8)})
		}
		fill(&e.out[n], pkt)
		n++
	}
	done, err := e.writeLocked(e.out[:n])
	for i := range e.out[:n] {
		clear(e.out[i].Bufs)
	}
	return done, err
}

// WriteRaw writes one packet that did not come from netstack. Ownership: lends p.
func (e *Endpoint) WriteRaw(p []tun.Packet) (int, tcpip.Error) {
	e.writeMu.Lock()
	defer e.writeMu.Unlock()
	return e.writeLocked(p)
}

// +checklocks:e.writeMu
func (e *Endpoint) writeLocked(p []tun.Packet) (int, tcpip.Error) {
	done := 0
	for done < len(p) {
		n, err := e.queue.Write(p[done:])
		done += n
		switch {
		case err == nil && n > 0:
		case errors.Is(err, tun.ErrWouldBlock):
			e.stats.WriteQueueFull.Add(uint64(len(p) - done))
			return done, &tcpip.ErrNoBufferSpace{}
		case errors.Is(err, tun.ErrClosed), errors.Is(err, tun.ErrGone):
			e.stats.WriteGone.Add(uint64(len(p) - done))
			return done, &tcpip.ErrClosedForSend{}
		default:
			// This packet is refused for good; the ones behind it may still pass.
			e.stats.WriteFailed.Add(1)
			done++
		}
	}
	return done, nil
}

// fill describes a packet buffer to the device without copying it.
func fill(p *tun.Packet, pkt *stack.PacketBuffer) {
	p.Bufs = p.Bufs[:0]
	views, offset := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if offset >= len(b) {
			offset -= len(b)
			continue
		}
		p.Bufs = append(p.Bufs, b[offset:])
		offset = 0
	}
	p.Offload = offloadOf(pkt)
}

// offloadOf translates netstack's GSO options. There is no Ethernet header, so checksum offsets count from the IP header.
func offloadOf(pkt *stack.PacketBuffer) tun.Offload {
	g := &pkt.GSOOptions
	if !g.NeedsCsum {
		return tun.Offload{}
	}
	o := tun.Offload{NeedsCsum: true, CsumStart: g.L3HdrLen, CsumOffset: g.CsumOffset, HdrLen: uint16(pkt.HeaderSize())}
	if g.Type == stack.GSONone || pkt.Data().Size() <= int(g.MSS) {
		return o
	}
	switch g.Type {
	case stack.GSOTCPv4:
		o.GSO = tun.GSOTCPv4
	case stack.GSOTCPv6:
		o.GSO = tun.GSOTCPv6
	}
	o.GSOSize = g.MSS
	return o
}
