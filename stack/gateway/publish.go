package gateway

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// publishedPort is a port of the host that leads to a program. Its socket is the loop's once the loop runs.
type publishedPort struct {
	Publish
	l  *loop
	fd int
}

// publish opens the published ports and raises resource assignment and auth listen for each, as the program's listen.
//
// Errors: the errno of bind, with the port named; a filter's refusal.
func (g *Gateway) publish() error {
	for _, p := range g.opts.Publish {
		port, err := g.openPort(p)
		if err != nil {
			return err
		}
		g.published = append(g.published, port)
	}
	return nil
}

func (g *Gateway) openPort(p Publish) (*publishedPort, error) {
	who := subject{proto: wire.TCP, local: p.Program}
	kinds := []layers.Kind{layers.ALEResourceAssignment, layers.ALEAuthListen}
	typ := unix.SOCK_STREAM
	if p.UDP {
		who.proto, kinds, typ = wire.UDP, kinds[:1], unix.SOCK_DGRAM
	}
	for _, kind := range kinds {
		if id := kind.Layer(who.family()); g.wanted(id) {
			g.fill(&g.loopScratch, kind, &who, layers.Inbound)
			if d := g.decide(&g.loopScratch); d.Blocked() {
				g.record(layers.RecordVerdict, id, &who, &d, nil)
				return nil, fmt.Errorf("publish port %v: blocked by filter %q at %v", p.Host, d.FilterName, id)
			}
		}
	}
	fd, err := unix.Socket(familyOf(p.Host.Addr()), typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("publish port %v: socket: %w", p.Host, err)
	}
	port := &publishedPort{Publish: p, l: g.loop, fd: fd}
	if err := port.listen(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("publish port %v: %w", p.Host, err)
	}
	return port, nil
}

func (p *publishedPort) listen() error {
	_ = unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // without it a restart waits for TIME_WAIT
	if p.Host.Addr().Is6() {
		_ = unix.SetsockoptInt(p.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) // the other family has a socket of its own
	}
	if err := unix.Bind(p.fd, sockaddr(p.Host)); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if !p.UDP {
		if err := unix.Listen(p.fd, 4096); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
	}
	return p.l.epollAdd(p.fd, unix.EPOLLIN, p)
}

func (g *Gateway) closePublished() {
	for _, p := range g.published {
		if p.fd >= 0 {
			g.loop.forget(p.fd)
			unix.Close(p.fd)
			p.fd = -1
		}
	}
}

// acceptsPerTurn and datagramsPerTurn bound what one port takes before others get their turn.
const (
	acceptsPerTurn   = 64
	datagramsPerTurn = 64
)

// onReady implements pollable.
func (p *publishedPort) onReady(uint32) {
	if p.UDP {
		p.receive()
		return
	}
	for range acceptsPerTurn {
		fd, sa, err := unix.Accept4(p.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			p.accepted(fd, addrPortOf(sa))
		case unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS:
			p.pause(err)
			return
		default:
			return // EAGAIN, or a client that went away again
		}
	}
}

// acceptPause is how long a port waits where the system has no descriptor for a client: epoll would report it again at once.
const acceptPause = 100 * time.Millisecond

// pause stops looking at the port for a while.
func (p *publishedPort) pause(why error) {
	p.l.g.opts.Logger.Warn("accept on a published port; raise the limit of open files (ulimit -n)", "port", p.Host, "err", why)
	p.watch(0)
	p.l.after(acceptPause, func() {
		if p.fd >= 0 {
			p.watch(unix.EPOLLIN)
		}
	})
}

// watch changes what epoll reports of the port.
func (p *publishedPort) watch(events uint32) {
	ev := unix.EpollEvent{Events: events, Fd: int32(p.fd)}
	_ = unix.EpollCtl(p.l.epfd, unix.EPOLL_CTL_MOD, p.fd, &ev) // it is in the set
}

// clientAddr is what the program sees of a client: its own address, or the stack's for a client on the host's loopback, which
// could not be answered.
func (p *publishedPort) clientAddr(client netip.AddrPort) netip.AddrPort {
	g := p.l.g
	if !client.Addr().IsLoopback() && client.Addr().Is4() == p.Program.Addr().Is4() {
		return client
	}
	if p.Program.Addr().Is4() {
		return netip.AddrPortFrom(g.opts.Addr4, client.Port())
	}
	return netip.AddrPortFrom(g.opts.Addr6, client.Port())
}

// accepted connects netstack to the program for a client. The client is already connected to the host's kernel: a refusal
// reaches it as a reset.
func (p *publishedPort) accepted(fd int, client netip.AddrPort) {
	l := p.l
	g := l.g
	shown := p.clientAddr(client)
	f := &tcpFlow{l: l, fd: fd, started: l.now, seen: l.now, state: stateHandshake}
	f.who = subject{proto: wire.TCP, local: p.Program, remote: shown}
	f.key = keyOf(wire.TCP, p.Program, shown)
	if old := g.tcp[f.key]; old != nil || len(g.tcp) >= g.opts.MaxFlows || g.embryonic >= g.opts.MaxPending {
		g.counters.drop(dropTableFull)
		resetAndClose(fd)
		return
	}
	f.inbound = &inboundFlow{client: client}
	f.who.flow = g.newFlow(func() { f.reset("aborted by a callout") })
	g.tcp[f.key] = f
	f.countEmbryonic(1)
	prepareHostSocket(fd)
	if err := l.epollAdd(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff, f); err != nil {
		f.reset(err.Error())
		return
	}
	f.connectProgram()
}

// inboundFlow is what a connection from a published port has besides.
type inboundFlow struct {
	client  netip.AddrPort // as the host sees it
	decided bool           // auth recv-accept was raised and permitted
	blocked *layers.Decision
}

// connectProgram makes netstack connect to the program from the client's address. Netstack's SYN passes inboundSYN on its way.
func (f *tcpFlow) connectProgram() {
	g := f.l.g
	proto := header.IPv4ProtocolNumber
	if f.who.family() == layers.V6 {
		proto = header.IPv6ProtocolNumber
	}
	wq := &waiter.Queue{}
	ep, err := g.stack.NewEndpoint(tcp.ProtocolNumber, proto, wq)
	if err != nil {
		f.reset(err.String())
		return
	}
	f.ep, f.wq = ep, wq
	f.entry.Init(f, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	wq.EventRegister(&f.entry)
	ep.SocketOptions().SetReuseAddress(true)
	err = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: addressOf(f.who.remote.Addr()), Port: f.who.remote.Port()})
	if err == nil {
		g.syns.connecting.Store(f)
		err = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: addressOf(f.who.local.Addr()), Port: f.who.local.Port()})
		g.syns.connecting.Store(nil)
	}
	if _, started := err.(*tcpip.ErrConnectStarted); err != nil && !started {
		f.reset("connect to the program: " + err.String())
		return
	}
	if te, ok := ep.(stack.TransportEndpoint); ok {
		f.te = te
	}
	if f.inbound.blocked != nil {
		f.refuseClient()
		return
	}
	if f.op == nil {
		f.timer = f.l.after(handshakeTimeout, func() { f.reset("the program did not answer") })
	}
}

// checkConnected runs when netstack's endpoint has an event during the handshake.
func (f *tcpFlow) checkConnected() {
	te, ok := f.ep.(*tcp.Endpoint)
	if !ok {
		return
	}
	switch s := te.EndpointState(); s {
	case tcp.StateEstablished, tcp.StateCloseWait:
		f.wq.EventUnregister(&f.entry)
		f.open(f.ep, f.wq)
	case tcp.StateError, tcp.StateClose:
		f.reset("the program refused")
	}
}

// synGate stands where SYNs pass on their way to programs.
type synGate struct {
	connecting atomic.Pointer[tcpFlow] // whose SYN the loop is sending

	mu sync.Mutex
	// held are the connections whose SYN must not leave.
	// +checklocks:mu
	held map[flowKey]struct{}
}

func (s *synGate) hold(key flowKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = make(map[flowKey]struct{})
	}
	s.held[key] = struct{}{}
}

func (s *synGate) letGo(key flowKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, key)
}

func (s *synGate) holds(key flowKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, held := s.held[key]
	return held
}

// inboundSYN reports whether a SYN towards a program may leave. The first SYN of a connection, which is sent below Connect on
// the loop, is authorised; one that netstack's timer sends again goes the way of the first.
func (g *Gateway) inboundSYN(s *scratch, who *subject, v layers.PacketView) bool {
	key := keyOf(wire.TCP, who.local, who.remote)
	if f := g.syns.connecting.Load(); f != nil && f.key == key {
		if f.authorizeAccept(s, v) {
			return true
		}
		g.syns.hold(key)
		return false
	}
	if g.syns.holds(key) {
		g.counters.drop(dropPended)
		return false
	}
	return true
}

// authorizeAccept raises auth recv-accept for a connection from a published port, after inbound network and inbound transport.
func (f *tcpFlow) authorizeAccept(s *scratch, v layers.PacketView) bool {
	in := f.inbound
	g := f.l.g
	id := layers.ALEAuthRecvAccept.Layer(f.who.family())
	if !g.wanted(id) {
		in.decided = true
		return true
	}
	ind := g.fill(s, layers.ALEAuthRecvAccept, &f.who, layers.Inbound)
	ind.Pender = acceptPender{f}
	ind.Meta.Mark(layers.MetaCompletionHandle)
	g.lend(s, v)
	d := g.decide(s)
	if d.Blocked() && d.Absorb && f.op != nil {
		return false
	}
	if f.op != nil {
		f.endPend(layers.PendStopped) // a callout pended, and then the final decision was not its own
		f.l.stop(f.timer)
	}
	if d.Blocked() {
		in.blocked = &d
		return false
	}
	g.record(layers.RecordVerdict, id, &f.who, &d, func(r *layers.Record) { r.Original = in.client })
	in.decided = true
	return true
}

// refuseClient resets a client that is not allowed.
func (f *tcpFlow) refuseClient() {
	f.l.g.record(layers.RecordVerdict, layers.ALEAuthRecvAccept.Layer(f.who.family()), &f.who, f.inbound.blocked, func(r *layers.Record) { r.Original = f.inbound.client })
	f.l.g.counters.drop(dropPolicy)
	f.reset("blocked")
}

// acceptPender suspends the acceptance of a connection from a published port.
type acceptPender struct{ f *tcpFlow }

// Pend implements layers.Pender. It is called below Connect, on the loop.
func (a acceptPender) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	f := a.f
	if f.op != nil {
		return f.op, nil
	}
	l := f.l
	f.op = layers.NewPendedOp(l.g.opID(), layers.ALEAuthRecvAccept.Layer(f.who.family()), holder, l.g.opts.Ledger, func(op *layers.PendedOp, c *layers.Clone) {
		if !l.post(func() { f.acceptCompleted(op, c, holder) }) {
			c.Release()
		}
	})
	op := f.op
	l.g.counters.pended.Add(1)
	l.g.record(layers.RecordPend, op.Layer(), &f.who, nil, func(r *layers.Record) { r.Operation, r.Original = op.ID(), f.inbound.client })
	if d := l.g.opts.PendDeadline; d > 0 {
		f.timer = l.after(d, func() {
			if f.op == op {
				f.endPend(layers.PendDeadline)
				f.inbound.blocked = &layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout}
				f.refuseClient()
			}
		})
	}
	return op, nil
}

// acceptCompleted runs on the loop after the callout completed op: with the clone of the SYN the connection goes on, without it
// is refused. The clone is authorised on its way in, where the callout finds it injected by itself.
func (f *tcpFlow) acceptCompleted(op *layers.PendedOp, c *layers.Clone, holder string) {
	defer c.Release()
	if f.state != stateHandshake || f.op != op {
		return
	}
	f.endPend(layers.PendCompleted)
	f.l.stop(f.timer)
	if c == nil {
		f.inbound.blocked = &layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendDenied}
		f.refuseClient()
		return
	}
	t, err := c.Take("accept completion")
	if err != nil {
		f.reset(err.Error())
		return
	}
	defer t.Done()
	g := f.l.g
	err = f.l.injectReceive(t, g.inject.markFor(holder, t.Mark), func(s *scratch, v layers.PacketView) bool {
		d := g.authorizeCompleted(s, &f.who, v, op)
		if d.Blocked() {
			f.inbound.blocked = &d
			return false
		}
		g.record(layers.RecordVerdict, op.Layer(), &f.who, &d, func(r *layers.Record) { r.Original = f.inbound.client })
		f.inbound.decided = true
		g.syns.letGo(f.key)
		return true
	})
	switch {
	case f.inbound.blocked != nil:
		f.refuseClient()
	case err != nil:
		f.reset(err.Error())
	default:
		f.timer = f.l.after(handshakeTimeout, func() { f.reset("the program did not answer") })
	}
}

// authorizeCompleted raises auth recv-accept for the clone that a completion lets in; it cannot be pended again.
func (g *Gateway) authorizeCompleted(s *scratch, who *subject, v layers.PacketView, op *layers.PendedOp) layers.Decision {
	in := g.fill(s, layers.ALEAuthRecvAccept, who, layers.Inbound)
	in.Meta.Operation = op.ID()
	in.Meta.Mark(layers.MetaOperationID)
	g.lend(s, v)
	return g.decide(s)
}

// receive takes datagrams of clients and passes them to the program.
func (p *publishedPort) receive() {
	s := &p.l.g.dgram
	for range datagramsPerTurn {
		slot := s.bufs[:recvSlot]
		n, sa, err := unix.Recvfrom(p.fd, slot[headroom:], unix.MSG_DONTWAIT)
		if err != nil {
			return // EAGAIN; errors of clients that went away concern nobody here
		}
		if f := p.flowOf(addrPortOf(sa)); f != nil {
			f.used = p.l.now
			f.bytesIn += uint64(n)
			p.l.deliverUDP(f, slot, n)
		}
	}
}

// flowOf finds or makes the flow of a client. It is authorised by its first datagram.
func (p *publishedPort) flowOf(client netip.AddrPort) *datagramFlow {
	l := p.l
	t := &l.g.datagrams
	shown := p.clientAddr(client)
	key := keyOf(wire.UDP, p.Program, shown)
	if f := t.flows[key]; f != nil {
		t.lru.MoveToFront(f.lru)
		return f
	}
	if len(t.flows) >= t.max {
		l.g.counters.drop(dropTableFull)
		t.lru.Back().Value.(*datagramFlow).end("made room for a newer flow")
	}
	f := &datagramFlow{key: key, l: l, fd: -1, idle: idleOther, opened: l.now, used: l.now, port: p, client: client}
	f.who = subject{proto: wire.UDP, local: p.Program, remote: shown}
	f.who.flow = l.g.newFlow(func() { f.end("aborted by a callout") })
	f.enter()
	return f
}

// authorizeAccept raises auth recv-accept for the first datagram of a client, after inbound network and inbound transport. It
// reports whether the datagram may go on.
func (f *datagramFlow) authorizeAccept(s *scratch, v layers.PacketView) bool {
	g := f.l.g
	id := layers.ALEAuthRecvAccept.Layer(f.who.family())
	if !g.wanted(id) {
		f.accepted = true
		return f.establish()
	}
	in := g.fill(s, layers.ALEAuthRecvAccept, &f.who, layers.Inbound)
	in.Pender = datagramAcceptPender{f}
	in.Meta.Mark(layers.MetaCompletionHandle)
	g.lend(s, v)
	d := g.decide(s)
	if d.Blocked() && d.Absorb {
		if f.op != nil {
			g.counters.drop(dropPended)
			return false
		}
		g.counters.drop(dropAbsorbed)
		f.end("")
		return false
	}
	if f.op != nil {
		f.endPend(layers.PendStopped) // a callout pended, and then the final decision was not its own
	}
	return f.acceptDecided(&d)
}

// acceptDecided acts on the decision about a client.
func (f *datagramFlow) acceptDecided(d *layers.Decision) bool {
	g := f.l.g
	g.record(layers.RecordVerdict, layers.ALEAuthRecvAccept.Layer(f.who.family()), &f.who, d, func(r *layers.Record) { r.Original = f.client })
	if d.Blocked() {
		g.counters.drop(dropPolicy)
		f.end("")
		return false
	}
	f.accepted = true
	return f.establish()
}

// datagramAcceptPender suspends the acceptance of a client's datagrams.
type datagramAcceptPender struct{ f *datagramFlow }

// Pend implements layers.Pender. The datagram at hand and those that follow are the callout's to clone.
func (a datagramAcceptPender) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	f := a.f
	return f.pend(layers.ALEAuthRecvAccept.Layer(f.who.family()), holder, func(op *layers.PendedOp, c *layers.Clone) {
		if !f.l.post(func() { f.acceptCompleted(op, c, holder) }) {
			c.Release()
		}
	})
}

// acceptCompleted runs on the loop after the callout completed op, as that of a connection does.
func (f *datagramFlow) acceptCompleted(op *layers.PendedOp, c *layers.Clone, holder string) {
	defer c.Release()
	if f.op != op || f.lru == nil {
		return
	}
	f.endPend(layers.PendCompleted)
	if c == nil {
		f.acceptDecided(&layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendDenied})
		return
	}
	t, err := c.Take("accept completion")
	if err != nil {
		f.end(err.Error())
		return
	}
	defer t.Done()
	g := f.l.g
	err = f.l.injectReceive(t, g.inject.markFor(holder, t.Mark), func(s *scratch, v layers.PacketView) bool {
		d := g.authorizeCompleted(s, &f.who, v, op)
		return f.acceptDecided(&d)
	})
	if err != nil && !f.accepted {
		f.end(err.Error())
	}
}

// sendTo sends a program's answer to a client of a published port.
func (p *publishedPort) sendTo(f *datagramFlow, pkt *packet) {
	b := pkt.payload()
	switch err := unix.Sendto(p.fd, b, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, sockaddr(f.client)); err {
	case nil:
		f.bytesOut += uint64(len(b))
	case syscall.EMSGSIZE:
		p.l.replyUnreachable(pkt, unreachTooBig, 1280)
		p.l.g.counters.drop(dropSend)
	default:
		p.l.g.counters.drop(dropSend)
	}
}
