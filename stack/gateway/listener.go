package gateway

import (
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// listener is netstack's endpoint that performs the handshakes with programs, one a family for all ports.
type listener struct {
	ep tcpip.Endpoint
	te stack.TransportEndpoint
}

func (g *Gateway) isListener(te stack.TransportEndpoint) bool {
	return te == g.listeners[layers.V4].te || te == g.listeners[layers.V6].te
}

// establish raises flow established, once, before the packet that completes the handshake.
func (f *tcpFlow) establish(l *loop) {
	if f.established {
		return
	}
	f.established = true
	g := l.g
	g.counters.flows.Add(1)
	id := layers.ALEFlowEstablished.Layer(f.who.family())
	if g.wanted(id) {
		s := &g.loopScratch
		dir := layers.Outbound
		if f.inbound != nil {
			dir = layers.Inbound
		}
		g.fill(s, layers.ALEFlowEstablished, &f.who, dir)
		if d := g.decide(s); d.Blocked() {
			g.record(layers.RecordVerdict, id, &f.who, &d, nil)
			l.post(func() { f.reset("blocked at flow established") })
			return
		}
	}
	g.record(layers.RecordFlow, id, &f.who, nil, nil)
}

// open makes the listener of a family.
func (ln *listener) open(g *Gateway, f layers.Family) error {
	proto, addr := header.IPv4ProtocolNumber, tcpip.AddrFrom4([4]byte{})
	if f == layers.V6 {
		proto, addr = header.IPv6ProtocolNumber, tcpip.AddrFrom16([16]byte{})
	}
	wq := &waiter.Queue{}
	ep, err := g.stack.NewEndpoint(tcp.ProtocolNumber, proto, wq)
	if err != nil {
		return fmt.Errorf("make %v listener: %v", f, err)
	}
	ep.SocketOptions().SetV6Only(true)
	entry := waiter.NewFunctionEntry(waiter.ReadableEvents, func(waiter.EventMask) {
		g.acceptReady.Store(true)
		g.loop.wake()
	})
	wq.EventRegister(&entry)
	if err := ep.Bind(tcpip.FullAddress{Addr: addr, Port: 1}); err != nil {
		return fmt.Errorf("bind %v listener: %v", f, err)
	}
	if err := ep.Listen(g.opts.MaxFlows); err != nil {
		return fmt.Errorf("listen %v: %v", f, err)
	}
	te, ok := ep.(stack.TransportEndpoint)
	if !ok {
		return fmt.Errorf("this version of netstack has no packet-taking %v listener", f)
	}
	ln.ep, ln.te = ep, te
	return nil
}

// acceptFlows takes the connections whose handshake finished.
func (l *loop) acceptFlows() bool {
	if !l.g.acceptReady.Swap(false) {
		return false
	}
	for i := range l.g.listeners {
		for {
			ep, wq, err := l.g.listeners[i].ep.Accept(nil)
			if err != nil {
				break // nothing left; a listener of ours has no other error
			}
			l.accepted(ep, wq)
		}
	}
	return true
}

// accepted joins netstack's endpoint to its flow.
func (l *loop) accepted(ep tcpip.Endpoint, wq *waiter.Queue) {
	local, _ := ep.GetLocalAddress() // these fail for unconnected endpoints only
	remote, _ := ep.GetRemoteAddress()
	key := keyOf(wire.TCP, netip.AddrPortFrom(addrOf(remote.Addr), remote.Port), netip.AddrPortFrom(addrOf(local.Addr), local.Port))
	f := l.g.tcp[key]
	if f == nil || f.state != stateHandshake {
		ep.Abort()
		return
	}
	f.open(ep, wq)
}

// open starts the relay between both sides.
func (f *tcpFlow) open(ep tcpip.Endpoint, wq *waiter.Queue) {
	l := f.l
	l.stop(f.timer)
	f.establish(l)
	f.state = stateOpen
	f.countEmbryonic(-1)
	f.ep, f.wq = ep, wq
	if te, ok := ep.(stack.TransportEndpoint); ok {
		f.te = te
	}
	o := ep.SocketOptions()
	o.SetDelayOption(false)
	idle := tcpip.KeepaliveIdleOption(keepAliveIdle)
	_ = ep.SetSockOpt(&idle) // cannot fail for TCP
	o.SetKeepAlive(true)
	f.entry.Init(f, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	wq.EventRegister(&f.entry)
	f.relay.start(f)
	l.markDirty(f)
}
