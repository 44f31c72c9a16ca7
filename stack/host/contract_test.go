package host

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// The tests of this file hold on to facts about netstack that this package relies on, or that are the reason why it does something
// the long way round. When a new version of netstack fails one of them, the code that it names has to be thought over.

type wrappedTCP struct{ stack.TransportProtocol }

// TestContractT3TCPProtocolCannotBeWrapped: that is why segments are intercepted at the dispatcher, not at the protocol.
func TestContractT3TCPProtocolCannotBeWrapped(t *testing.T) {
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{func(s *stack.Stack) stack.TransportProtocol {
			return &wrappedTCP{tcp.NewProtocol(s)}
		}},
	})
	defer s.Destroy()
	defer func() {
		if recover() == nil {
			t.Error("netstack works with a wrapped TCP protocol now: the dispatcher might be done without")
		}
	}()
	tcp.NewForwarder(s, 0, 1, func(*tcp.ForwarderRequest) {})
}

// TestContractT4OutboundHooksRunUnderTheEndpointLock: that is why nothing there calls an endpoint, and why all injection is the
// worker's.
func TestContractT4OutboundHooksRunUnderTheEndpointLock(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{quiet: true})
		var locked, free atomic.Int64
		var armed atomic.Bool
		a.callout(t, layers.OutboundTransport, "look", func(in *layers.Indication) layers.Verdict {
			if !armed.Load() || in.Packet.PayloadLen() == 0 {
				return layers.PermitSoft()
			}
			tp := tuple{proto: protoTCP, local: in.Values.Local(), remote: in.Values.Remote()}
			switch ep, ok := a.endpoint(&tp).(*tcp.Endpoint); {
			case !ok:
			case lockable(ep):
				free.Add(1)
			default:
				locked.Add(1)
			}
			return layers.PermitSoft()
		})
		c, s := connected(t, a, b, f)
		armed.Store(true)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		armed.Store(false)
		if locked.Load() == 0 || free.Load() != 0 {
			t.Errorf("endpoint locked %d times, free %d times", locked.Load(), free.Load())
		}
	})
}

// lockable reports whether nobody holds an endpoint's lock.
//
// +checklocksignore
func lockable(ep *tcp.Endpoint) bool {
	if !ep.TryLock() {
		return false
	}
	ep.ResumeWork()
	return true
}

// TestContractT4InjectionFromAnOutboundHookDoesNotDeadlock injects what deadlocks when it is done in place: an ICMP error for the
// flow whose segment is being sent.
func TestContractT4InjectionFromAnOutboundHookDoesNotDeadlock(t *testing.T) {
	a, b := pair(t, pairOptions{quiet: true})
	f := families[0]
	i, err := layers.NewInjector("icmp", a)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	var sent atomic.Int64
	a.callout(t, layers.OutboundTransport, "icmp", func(in *layers.Indication) layers.Verdict {
		if in.Values.Protocol() != wire.TCP || in.Packet.PayloadLen() == 0 {
			return layers.PermitSoft()
		}
		quote := append(append([]byte(nil), in.Packet.IPHeader()...), in.Packet.TransportHeader()...)
		body := make([]byte, 8, 8+len(quote))
		body[0], body[1] = 3, 4 // fragmentation needed
		binary.BigEndian.PutUint16(body[6:], 1400)
		c, err := layers.NewClone(ipPacket(f.b, f.a, wire.ICMP, append(body, quote...)), "icmp", books)
		if err != nil {
			t.Errorf("clone: %v", err)
			return layers.PermitSoft()
		}
		if err := i.Receive(c, nil); err == nil {
			sent.Add(1)
		}
		return layers.PermitSoft()
	})
	c, s := connected(t, a, b, f)
	data := pattern(64<<10, 9)
	errs := make(chan error, 1) // of the one write
	go func() { _, err := c.Write(data); errs <- err }()
	got := make([]byte, len(data))
	s.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != string(data) {
		t.Fatalf("read: %v", err)
	}
	if err := <-errs; err != nil || sent.Load() == 0 {
		t.Errorf("write: %v, %d injected", err, sent.Load())
	}
}

// TestContractT6HooksComeBeforeTheInterface: packets that wait in the device when the stack is made are seen by the hooks, and the
// race detector has nothing to say.
func TestContractT6HooksComeBeforeTheInterface(t *testing.T) {
	dev := tuntest.New(tuntest.Options{})
	f := families[0]
	for n := range 100 {
		if err := dev.Inject(udpPacket(netip.AddrPortFrom(f.b, 1), netip.AddrPortFrom(f.a, uint16(n+1)), []byte("early")), noOffload); err != nil {
			t.Fatal(err)
		}
	}
	s := newSide(t, dev, pairOptions{}, 0)
	eventually(t, "every packet is seen", func() bool { return len(s.log.indications(layers.InboundIPPacket)) == 100 })
}

// TestContractT8HandleLocalDropsWhatClaimsToBeFromUs: with HandleLocal a packet from outside with one of our own addresses as its
// source is dropped. On a promiscuous interface that is every packet, which is why ours is not.
func TestContractT8HandleLocalDropsWhatClaimsToBeFromUs(t *testing.T) {
	a, _ := pair(t, pairOptions{})
	f := families[0]
	p := a.packets(t, "udp", netip.AddrPortFrom(f.a, 53).String())
	for _, src := range []netip.Addr{f.a, f.b} {
		if err := a.dev.Inject(udpPacket(netip.AddrPortFrom(src, 1), netip.AddrPortFrom(f.a, 53), []byte(src.String())), noOffload); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 64)
	if n, _, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != f.b.String() {
		t.Errorf("read %q, %v; want what came from %v alone", buf[:n], err, f.b)
	}
	if n := a.stack.Stats().IP.InvalidSourceAddressesReceived.Value(); n != 1 {
		t.Errorf("%d packets with our own source address dropped, want 1", n)
	}
}

// TestContractT11HeaderViewsKeepTheDataUncopied: looking at a header copies the chunk that holds it once it is shared. The link
// reads headers into a view of their own, so that the data is not copied.
func TestContractT11HeaderViewsKeepTheDataUncopied(t *testing.T) {
	for _, c := range []struct {
		name  string
		sizes []int
		copy  bool
	}{{"one chunk", []int{4096}, true}, {"headers apart", []int{128, 3968}, false}} {
		var b buffer.Buffer
		for _, n := range c.sizes {
			b.Append(buffer.NewViewSize(n))
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: b})
		clone := pkt.Clone()
		last := func(p *stack.PacketBuffer) *byte {
			views, _ := p.AsViewList()
			v := views.Back().AsSlice()
			return &v[len(v)-1]
		}
		before := last(clone)
		if _, ok := clone.TransportHeader().Consume(20); !ok {
			t.Fatal("consume failed")
		}
		clone.TransportHeader().Slice()
		if copied := last(clone) != before; copied != c.copy {
			t.Errorf("%s: data copied: %v, want %v", c.name, copied, c.copy)
		}
		clone.DecRef()
		pkt.DecRef()
	}
}

// TestContractT12ViewsBypassCopyOnWrite: a write through a view reaches a clone of the packet. A layers.Clone is a copy.
func TestContractT12ViewsBypassCopyOnWrite(t *testing.T) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData([]byte("abc"))})
	clone := pkt.Clone()
	views, _ := pkt.AsViewList()
	views.Front().AsSlice()[0] = 'X'
	if got := string(clone.Data().AsRange().ToSlice()); got != "Xbc" {
		t.Errorf("the clone reads %q: views copy on write now", got)
	}
	clone.DecRef()
	pkt.DecRef()

	a, b := pair(t, pairOptions{quiet: true})
	a.callout(t, layers.OutboundTransport, "scribble", func(in *layers.Indication) layers.Verdict {
		c, err := in.Packet.Clone("scribble")
		if err != nil {
			t.Errorf("clone: %v", err)
			return layers.PermitSoft()
		}
		clear(c.Bytes())
		c.Release()
		return layers.PermitSoft()
	})
	c, s := connected(t, a, b, families[0])
	if _, err := c.Write([]byte("untouched")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 9)
	if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "untouched" {
		t.Errorf("read %q, %v", buf, err)
	}
}

// TestContractT13CalloutsHoldHandlesNotBuffers: what a callout keeps of a packet gives nothing after Classify, and a clone cannot be
// released twice, or after it was given away.
func TestContractT13CalloutsHoldHandlesNotBuffers(t *testing.T) {
	a, b := pair(t, pairOptions{quiet: true})
	var kept *layers.Packet
	var clone *layers.Clone
	a.callout(t, layers.OutboundTransport, "keep", func(in *layers.Indication) layers.Verdict {
		if kept == nil {
			kept = in.Packet
			clone, _ = in.Packet.Clone("keep")
		}
		return layers.PermitSoft()
	}, remotePort(53))
	p := a.packets(t, "udp", ":0")
	if _, err := p.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(families[0].b, 53)); err != nil {
		t.Fatal(err)
	}
	_ = b
	if kept.Len() != 0 || kept.IPHeader() != nil {
		t.Errorf("a kept packet still shows %d bytes", kept.Len())
	}
	if _, err := kept.Clone("late"); !errors.Is(err, layers.ErrReleased) {
		t.Errorf("clone of a kept packet = %v", err)
	}
	i, err := layers.NewInjector("keep", a)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	clone.Release()
	clone.Release()
	if err := i.Send(clone, nil); !errors.Is(err, layers.ErrReleased) {
		t.Errorf("injection of a released clone = %v", err)
	}
}

// TestContractT14HeldSegmentsAreOvertaken: a TCP segment that is taken away is sent again, so that holding it does not hold the data.
// Who holds data does so at the stream layer.
func TestContractT14HeldSegmentsAreOvertaken(t *testing.T) {
	a, b := pair(t, pairOptions{quiet: true})
	var taken atomic.Int64
	a.callout(t, layers.OutboundTransport, "hold", func(in *layers.Indication) layers.Verdict {
		if in.Packet.PayloadLen() > 0 && taken.CompareAndSwap(0, 1) {
			return layers.Absorbed()
		}
		return layers.PermitSoft()
	})
	c, s := connected(t, a, b, families[0])
	if _, err := c.Write([]byte("held?")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	s.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "held?" || taken.Load() != 1 {
		t.Errorf("read %q, %v, %d taken", buf, err, taken.Load())
	}
}

// TestContractT16NothingLeavesUnseen: group messages would bypass the hooks; netstack sends none as it is configured here.
func TestContractT16NothingLeavesUnseen(t *testing.T) {
	dev := tuntest.New(tuntest.Options{})
	s := newSide(t, dev, pairOptions{}, 0)
	if err := s.stack.JoinGroup(header.IPv4ProtocolNumber, nicDevice, header.IPv4AllRoutersGroup); err != nil {
		t.Fatal(err)
	}
	if err := s.stack.JoinGroup(header.IPv6ProtocolNumber, nicDevice, header.IPv6AllRoutersLinkLocalMulticastAddress); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if p, err := dev.Collect(ctx); err == nil {
		t.Errorf("a packet left: % x", p.Bytes)
	}
}

// TestContractT17HeldClonesDoNotFillTheSendBuffer: a datagram's buffer counts against its socket as long as it is held. A clone is
// a copy, so that a callout can hold more than the socket may have under way.
func TestContractT17HeldClonesDoNotFillTheSendBuffer(t *testing.T) {
	a, _ := pair(t, pairOptions{quiet: true})
	var clones []*layers.Clone
	a.callout(t, layers.DatagramData, "hold", func(in *layers.Indication) layers.Verdict {
		c, err := in.Packet.Clone("hold")
		if err != nil {
			t.Errorf("clone: %v", err)
		}
		clones = append(clones, c)
		return layers.Absorbed()
	})
	p := a.packets(t, "udp", ":0")
	data := make([]byte, 8<<10)
	n := 4 * datagramBuffer / len(data)
	for range n {
		if _, err := p.WriteToUDPAddrPort(data, netip.AddrPortFrom(families[0].b, 53)); err != nil {
			t.Fatalf("write: %v", err)
		}
	}
	if len(clones) != n {
		t.Errorf("%d clones, want %d", len(clones), n)
	}
	for _, c := range clones {
		c.Release()
	}
}

// TestPermitAllocatesNothing: the packet layers, with a filter at each that has something to compare.
func TestPermitAllocatesNothing(t *testing.T) {
	if need.Race {
		t.Skip("the race detector lets sync.Pool forget at random")
	}
	eachFamily(t, func(t *testing.T, f family) {
		a, _ := pair(t, pairOptions{quiet: true})
		for _, kind := range []layers.Kind{layers.OutboundTransport, layers.DatagramData, layers.InboundTransport} {
			a.add(t, kind, filter.Filter{Name: "permit", Action: filter.ActionPermit, Conditions: []filter.Condition{remotePort(53)}})
		}
		raw := udpPacket(netip.AddrPortFrom(f.a, 1000), netip.AddrPortFrom(f.b, 53), []byte("question"))
		h, err := wire.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		pkt := a.parsed(raw, &h, 0)
		defer pkt.DecRef()
		if n := testing.AllocsPerRun(200, func() {
			if !a.outboundTransport(pkt) || !a.outboundIP(pkt, f.v) {
				t.Fatal("blocked")
			}
		}); n != 0 {
			t.Errorf("outbound: %v allocations, want 0", n)
		}
		in := udpPacket(netip.AddrPortFrom(f.b, 53), netip.AddrPortFrom(f.a, 1000), []byte("answer"))
		if h, err = wire.Parse(in); err != nil {
			t.Fatal(err)
		}
		pkt2 := a.parsed(in, &h, 0)
		defer pkt2.DecRef()
		flow := a.newFlow(tupleOf(pkt2, layers.Inbound), layers.Outbound, flowEstablished, 0)
		a.enter(flow, false)
		defer a.dropFlow(flow)
		if n := testing.AllocsPerRun(200, func() {
			if !a.inbound(header.UDPProtocolNumber, pkt2) {
				t.Fatal("blocked")
			}
		}); n != 0 {
			t.Errorf("inbound: %v allocations, want 0", n)
		}
	})
}
