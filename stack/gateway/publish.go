package gateway

import (
	"fmt"
	"net/netip"
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
	who := subject{proto: wire.TCP, local: p.Program, inbound: true}
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
	f.who = subject{proto: wire.TCP, local: p.Program, remote: shown, inbound: true}
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
	if err := l.epollAdd(fd, unix.EPOLLIN|unix.EPOLLPRI|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff, f); err != nil {
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
