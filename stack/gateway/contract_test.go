package gateway

import (
	"bytes"
	"context"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// The contract tests state what the gateway relies on in this version of netstack, and what it must avoid. Where one fails after
// an update, the code that relies on the fact is wrong now, however well its own tests do.

// TestContractLinkErrors: netstack's forwarding code panics on any link error but the three that the link endpoint gives.
func TestContractLinkErrors(t *testing.T) {
	dev := tuntest.New(tuntest.Options{QueueLen: 1})
	ep := link.New(dev)
	write := func() tcpip.Error {
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, 40))})
		defer p.DecRef()
		p.NetworkProtocolNumber = header.IPv4ProtocolNumber
		var l stack.PacketBufferList
		l.PushBack(p)
		_, err := ep.WritePackets(l)
		return err
	}
	allowed := func(what string, err tcpip.Error) {
		t.Helper()
		switch err.(type) {
		case nil, *tcpip.ErrNoBufferSpace, *tcpip.ErrClosedForSend:
		default:
			t.Errorf("%s: %v", what, err)
		}
	}
	for range 3 {
		allowed("full queue", write())
	}
	dev.SetDown()
	allowed("interface down", write())
	dev.SetUp()
	dev.Delete()
	allowed("device gone", write())
	dev.Close()
	allowed("device closed", write())
}

// TestContractTimeWait: a SYN that meets an endpoint in TIME_WAIT is dropped by netstack, and Abort makes room for it.
func TestContractTimeWait(t *testing.T) {
	s := newScene(t, sceneOptions{})
	f := families[0]
	l := (*space)(nil).listenTCP(t, loopbackOf(f))
	c, err := s.prog.begin(addrPort(f.prog, 5998), portOf(f, l.Addr())).wait(patience)
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	server.Close()
	_, _ = c.Read(make([]byte, 1))
	c.Close()
	id := (&packet{local: addrPort(f.prog, 5998), remote: portOf(f, l.Addr())}).endpointID()
	var ep *tcp.Endpoint
	until(t, "TIME_WAIT", func() bool {
		te := s.g.stack.FindTransportEndpoint(header.IPv4ProtocolNumber, tcp.ProtocolNumber, id, nicID)
		e, ok := te.(*tcp.Endpoint)
		if ok && e.EndpointState() == tcp.StateTimeWait {
			ep = e
		}
		return ep != nil
	})
	ep.Abort()
	if te := s.g.stack.FindTransportEndpoint(header.IPv4ProtocolNumber, tcp.ProtocolNumber, id, nicID); te != nil && !s.g.isListener(te) {
		t.Errorf("after Abort the tuple still leads to %v", te)
	}
}

// TestContractQueuePacket: TCP's protocol object takes packets for an endpoint that was found already, and a listener found by
// nothing but its wildcard address serves every port.
func TestContractQueuePacket(t *testing.T) {
	b := newBench(t, Options{})
	if _, ok := b.g.stack.TransportProtocolInstance(tcp.ProtocolNumber).(packetQueuer); !ok {
		t.Error("the TCP protocol has no QueuePacket")
	}
	for i := range b.g.listeners {
		if _, ok := b.g.listeners[i].ep.(stack.TransportEndpoint); !ok {
			t.Errorf("listener %d takes no packets", i)
		}
	}
}

// TestContractChecksumIsPerNIC: netstack has one answer for a whole NIC, so that the loop verifies what nobody vouches for.
func TestContractChecksumIsPerNIC(t *testing.T) {
	b := newBench(t, Options{})
	f := families[0]
	pkt := udpPacket(addrPort(f.prog, 1), addrPort(f.stack, 53), []byte("x"))
	pkt[26] ^= 1
	b.inject(pkt)
	until(t, "drop", func() bool { return b.g.Stats().Drops["checksum"] == 1 })
	if b.g.link.Capabilities()&stack.CapabilityRXChecksumOffload == 0 {
		t.Error("the link no longer says that checksums were verified: netstack verifies them a second time")
	}
}

// TestContractHandleLocal: with HandleLocal a promiscuous NIC drops all that comes in; the gateway's stack must not set it.
func TestContractHandleLocal(t *testing.T) {
	for _, local := range []bool{false, true} {
		s := stack.New(stack.Options{NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol}, TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol}, HandleLocal: local})
		ep := channel.New(16, 1500, "")
		if err := s.CreateNIC(1, ep); err != nil {
			t.Fatal(err)
		}
		s.SetPromiscuousMode(1, true)
		s.SetSpoofing(1, true)
		s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
		f := families[0]
		raw := tcpPacket(addrPort(f.prog, 1), addrPort(f.far, 2), header.TCPFlagSyn, 1, 0, nil)
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(raw)})
		ep.InjectInbound(header.IPv4ProtocolNumber, p)
		p.DecRef()
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		answer := ep.ReadContext(ctx)
		cancel()
		if (answer == nil) != local {
			t.Errorf("HandleLocal %v: answered %v", local, answer != nil)
		}
		if answer != nil {
			answer.DecRef()
		}
		s.Destroy()
		ep.Close()
	}
}

// TestContractPullUpCopies: a header read from a shared chunk copies all of it; the reader's first view is small for that reason.
func TestContractPullUpCopies(t *testing.T) {
	big := make([]byte, 60000)
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(big)})
	defer p.DecRef()
	before, _ := p.Data().PullUp(40)
	c := p.Clone()
	defer c.DecRef()
	after, _ := c.Data().PullUp(40)
	if &before[0] == &after[0] {
		t.Error("a read through a clone shares memory now: small first views are no longer needed")
	}
}

// TestContractWritesThroughViewsReachClones: what AsViewList gives is shared, so that lent packets must not be written to.
func TestContractWritesThroughViewsReachClones(t *testing.T) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData([]byte("original"))})
	defer p.DecRef()
	c := p.Clone()
	defer c.DecRef()
	views, _ := p.AsViewList()
	copy(views.Front().AsSlice(), "EDITED")
	other, _ := c.AsViewList()
	if got := other.Front().AsSlice(); !bytes.HasPrefix(got, []byte("EDITED")) {
		t.Errorf("the clone has %q: it no longer shares", got)
	}
	// What callouts get is a copy of their own.
	var pkt layers.Packet
	raw := udpPacket(addrPort(families[0].prog, 1), addrPort(families[0].far, 2), []byte("payload"))
	pkt.Lend(layers.PacketView{IPHeader: raw[:20], TransportHeader: raw[20:28], Payload: [][]byte{raw[28:]}, PayloadLen: 7, Ledger: books})
	own, err := pkt.Clone("contract")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Release()
	raw[30] = '!'
	if string(own.Payload()) != "payload" {
		t.Errorf("a callout's clone changed with the packet: %q", own.Payload())
	}
}

// TestContractMarkIsCloned: a packet's mark survives Clone and reassembly; it carries who injected the packet.
func TestContractMarkIsCloned(t *testing.T) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData([]byte("x")), Mark: 77})
	defer p.DecRef()
	c := p.Clone()
	defer c.DecRef()
	if c.Mark != 77 {
		t.Errorf("the clone's mark is %d", c.Mark)
	}
}

// TestContractErrorIsToldOnce: netstack tells of a reset to one call and then says that the endpoint is closed for receiving, as
// it does after an end of stream; only the state tells which.
func TestContractErrorIsToldOnce(t *testing.T) {
	s := newScene(t, sceneOptions{})
	f := families[0]
	prog, _ := s.pair(t, f)
	var ep tcpip.Endpoint
	until(t, "endpoint", func() bool {
		s.onLoop(func() {
			for _, f := range s.g.tcp {
				ep = f.ep
				f.relay.programReset = true // keeps the relay's hands off
				f.relay.hostWritable = false
				f.relay.drain = &timer{index: -1}
			}
		})
		return ep != nil
	})
	_ = prog.SetLinger(0)
	prog.Close()
	until(t, "error state", func() bool { return ep.(*tcp.Endpoint).EndpointState() == tcp.StateError })
	var b bytes.Buffer
	if _, err := ep.Read(&b, tcpip.ReadOptions{}); !isA[*tcpip.ErrConnectionReset](err) {
		t.Errorf("first read: %v, want connection reset", err)
	}
	if _, err := ep.Read(&b, tcpip.ReadOptions{}); !isA[*tcpip.ErrClosedForReceive](err) {
		t.Errorf("second read: %v, want closed for receive", err)
	}
}

func isA[T tcpip.Error](err tcpip.Error) bool { _, ok := err.(T); return ok }

// TestContractShortPayloader: netstack reads a Payloader until it has Len bytes; an error ends that, an empty read does not.
func TestContractShortPayloader(t *testing.T) {
	r := &socketReader{fd: -1, n: 100}
	if _, err := r.Read(make([]byte, 10)); err == nil {
		t.Error("a read of a bad descriptor gave no error: netstack would spin")
	}
	r.n = 0
	if n, err := r.Read(make([]byte, 10)); n != 0 || err == nil {
		t.Errorf("at the end: %d, %v, want an error", n, err)
	}
}

// TestContractHooksRunUnderTheEndpointsLock: what netstack sends is shown to callouts while the endpoint is locked. A callout that
// pends, injects and aborts from there must not hang.
func TestContractHooksRunUnderTheEndpointsLock(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		inj, err := layers.NewInjector("hook", s.g)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 64) // more than one transfer of a few bytes makes
		reg := s.callout(f, "hook "+f.name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
			if inj.State(in.Packet).Mine() {
				return layers.PermitSoft()
			}
			c, err := layers.NewClone(udpPacket(addrPort(f.far, 1), addrPort(f.prog, 1), nil), "hook", books)
			if err == nil {
				_ = inj.Receive(c, func(err error) {
					select {
					case done <- err:
					default:
					}
				})
			}
			return layers.PermitSoft()
		}), layers.InboundTransport)
		prog, server := s.pair(t, f)
		mustWrite(t, server, "hello")
		if _, err := prog.Read(make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		<-done
		s.remove(t, reg)
		inj.Close()
	})
}

// TestContractReassembly: netstack puts fragments together before it dispatches, hands on echo requests, and leaves the headers of
// the first fragment.
func TestContractReassembly(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		if !b.answered(cut(echoPacket(f, f.stack, 3, make([]byte, 200)), 80, 9)) {
			t.Error("a fragmented echo request was not handed on")
		}
	})
}

// TestContractListenerEvents: a listener's readable event comes once there is something to accept, with the lock held that Accept
// takes; the loop is only woken.
func TestContractListenerEvents(t *testing.T) {
	s := stack.New(stack.Options{NetworkProtocols: []stack.NetworkProtocolFactory{ipv6.NewProtocol}, TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol}})
	defer s.Destroy()
	wq := &waiter.Queue{}
	ep, err := s.NewEndpoint(tcp.ProtocolNumber, header.IPv6ProtocolNumber, wq)
	if err != nil {
		t.Fatal(err)
	}
	defer ep.Close()
	if _, _, err := ep.Accept(nil); err == nil {
		t.Error("accepted from an endpoint that does not listen")
	}
	if _, ok := ep.(interface{ ModerateRecvBuf(int) }); !ok {
		t.Error("the endpoint no longer tunes its receive window: uploads halve")
	}
}
