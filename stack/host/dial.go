package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// Protocol numbers as tuples hold them.
const (
	protoTCP = uint8(header.TCPProtocolNumber)
	protoUDP = uint8(header.UDPProtocolNumber)
)

// target is a network and address argument, parsed.
type target struct {
	proto    uint8
	only     layers.Family // with restricted
	restrict bool
	host     string
	port     uint16
}

// parseTarget parses the arguments of DialContext, Listen and ListenPacket.
func parseTarget(network, address string) (t target, err error) {
	base := strings.TrimRight(network, "46")
	switch base {
	case "tcp":
		t.proto = protoTCP
	case "udp":
		t.proto = protoUDP
	default:
		return t, net.UnknownNetworkError(network)
	}
	switch network[len(base):] {
	case "":
	case "4":
		t.restrict, t.only = true, layers.V4
	case "6":
		t.restrict, t.only = true, layers.V6
	default:
		return t, net.UnknownNetworkError(network)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return t, err
	}
	if port != "" {
		n, err := net.LookupPort(network, port) // a number, or a service's name
		if err != nil {
			return t, err
		}
		t.port = uint16(n)
	}
	t.host = host
	return t, nil
}

// permits reports whether the network allows an address.
func (t *target) permits(a netip.Addr) bool {
	return !t.restrict || conv.FamilyOf(a) == t.only
}

// DialContext connects like net.Dialer.DialContext, through the stack. network is tcp or udp, with 4 or 6 behind it to ask for one
// family; address is an IP address and a port, or a name where Options.Lookup resolves them, whose addresses are tried in order.
//
// A connect that is pended waits, for minutes if need be; the end of ctx abandons it. A udp connection sends nothing and is
// authorised with its first datagram.
//
// Errors: a *net.OpError with the error number, *BlockedError, the error of ctx, net.ErrClosed, or *net.DNSError.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	fail := func(remote net.Addr, err error) (net.Conn, error) {
		return nil, opError("dial", network, nil, remote, err)
	}
	t, err := parseTarget(network, address)
	if err != nil {
		return fail(nil, err)
	}
	if !s.begin() {
		return fail(nil, errClosing)
	}
	defer s.dialing.Done()
	addrs, name, err := s.resolve(ctx, &t)
	if err != nil {
		return fail(nil, err)
	}
	var first error
	for _, a := range addrs {
		remote := netip.AddrPortFrom(a, t.port)
		var c net.Conn
		if t.proto == protoTCP {
			c, err = s.dialTCP(ctx, network, remote, name)
		} else {
			c, err = s.dialUDP(ctx, network, remote, name)
		}
		if err == nil {
			return c, nil
		}
		if first == nil {
			_, first = fail(s.addrOf(t.proto, remote), err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

func (s *Stack) addrOf(proto uint8, a netip.AddrPort) net.Addr {
	if proto == protoTCP {
		return tcpAddr(a)
	}
	return udpAddr(a)
}

// resolve returns the addresses of a target, and the name if it was one.
func (s *Stack) resolve(ctx context.Context, t *target) (addrs []netip.Addr, name string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	if a, err := netip.ParseAddr(t.host); err == nil {
		a = a.Unmap().WithZone("")
		if a.IsUnspecified() {
			a = loopbackOf(a) // as a kernel does
		}
		if !t.permits(a) {
			return nil, "", &net.AddrError{Err: "no suitable address found", Addr: t.host}
		}
		return []netip.Addr{a}, "", nil
	}
	notFound := &net.DNSError{Err: "no such host", Name: t.host, IsNotFound: true}
	if s.opts.Lookup == nil {
		notFound.Err = "names cannot be looked up: set Options.Lookup, or dial an address"
		return nil, "", notFound
	}
	found, err := s.lookup(ctx, t.host)
	if err != nil {
		return nil, "", err
	}
	for _, a := range found {
		if a = a.Unmap().WithZone(""); t.permits(a) {
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return nil, "", notFound
	}
	return addrs, t.host, nil
}

// lookup resolves a name, until the stack closes.
func (s *Stack) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Owner: this call, whose end cancels ctx.
	go func() {
		select {
		case <-s.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	addrs, err := s.opts.Lookup(ctx, name)
	if err != nil && s.isClosing() {
		return nil, errClosing
	}
	return addrs, err
}

// loopbackOf returns the loopback address of an address's family.
func loopbackOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// sourceFor returns the address from which the stack reaches a remote.
func (s *Stack) sourceFor(remote netip.Addr) (netip.Addr, error) {
	r, err := s.stack.FindRoute(0, tcpip.Address{}, conv.Address(remote), conv.NetworkProtocol(remote), false)
	if err != nil {
		return netip.Addr{}, sysError("connect", conv.Errno(err))
	}
	defer r.Release()
	return conv.Addr(r.LocalAddress()), nil
}

// binding is where a socket is to be bound.
type binding struct {
	proto    uint8
	network  tcpip.NetworkProtocolNumber
	local    netip.AddrPort
	families []layers.Family // that the socket will serve
	v6only   bool
}

// towards returns the binding of a socket that is to reach a remote.
func (s *Stack) towards(proto uint8, remote netip.AddrPort) (binding, error) {
	source, err := s.sourceFor(remote.Addr())
	if err != nil {
		return binding{}, err
	}
	return binding{
		proto: proto, network: conv.NetworkProtocol(source), local: netip.AddrPortFrom(source, 0), families: []layers.Family{conv.FamilyOf(source)},
	}, nil
}

// openSocket makes a socket, raises resource assignment for each family, and binds it.
//
// Errors: those of authorise, the error number of bind.
func (s *Stack) openSocket(ctx context.Context, b binding) (*socket, error) {
	ep, wq, err := s.newEndpoint(b.proto, b.network)
	if err != nil {
		return nil, sysError("socket", err)
	}
	sock, ok := s.newSocket(ep, wq, b.proto, 0)
	if !ok {
		ep.Close()
		return nil, errClosing
	}
	sock.local = b.local
	if b.v6only {
		ep.SocketOptions().SetV6Only(true)
	}
	if sock.assigned, err = s.assign(ctx, &b, sock.id); err != nil {
		sock.abandon()
		return nil, err
	}
	if terr := ep.Bind(conv.FullAddress(b.local)); terr != nil {
		sock.abandon()
		return nil, sysError("bind", conv.Errno(terr))
	}
	if bound, terr := ep.GetLocalAddress(); terr == nil {
		sock.local = netip.AddrPortFrom(b.local.Addr(), bound.Port)
	}
	return sock, nil
}

// dialTCP connects to one address.
func (s *Stack) dialTCP(ctx context.Context, network string, remote netip.AddrPort, name string) (net.Conn, error) {
	b, err := s.towards(protoTCP, remote)
	if err != nil {
		return nil, err
	}
	sock, err := s.openSocket(ctx, b)
	if err != nil {
		return nil, err
	}
	t := tuple{proto: protoTCP, local: sock.local, remote: remote}
	f := s.newFlow(t, layers.Outbound, flowConnecting, sock.id)
	f.name = name
	r := request{layer: layers.ALEAuthConnect.Layer(b.families[0]), t: t}
	r.x = facts{dir: layers.Outbound, name: name, endpoint: sock.id, flow: f, loopback: f.loopback}
	if err := s.authorise(ctx, &r); err != nil {
		sock.abandon()
		s.endFlow(f)
		return nil, s.silence(ctx, err)
	}
	if !s.enter(f, false) {
		sock.abandon()
		s.endFlow(f)
		return nil, sysError("connect", syscall.ENOBUFS)
	}
	if err := s.connect(ctx, sock, f); err != nil {
		sock.close()
		s.dropFlow(f)
		return nil, err
	}
	return newConn(sock, f, network), nil
}

// silence makes of a silent refusal what silence is to a program: nothing, until its patience ends.
func (s *Stack) silence(ctx context.Context, err error) error {
	var b *BlockedError
	if !errors.As(err, &b) || !b.Decision.Silent {
		return err
	}
	timer := time.NewTimer(s.opts.ConnectTimeout)
	defer timer.Stop()
	select {
	case <-timer.C:
		b.Errno = syscall.ETIMEDOUT
		return b
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return errClosing
	}
}

// connect shakes hands.
func (s *Stack) connect(ctx context.Context, sock *socket, f *flow) error {
	entry, ch := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	sock.wq.EventRegister(&entry)
	defer sock.wq.EventUnregister(&entry)
	sock.attach(f)
	terr := sock.ep.Connect(conv.FullAddress(f.key.remote))
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		timer := time.NewTimer(s.opts.ConnectTimeout)
		defer timer.Stop()
		select {
		case <-ch:
		case <-timer.C:
			return sysError("connect", syscall.ETIMEDOUT)
		case <-ctx.Done():
			return ctx.Err()
		case <-s.closing:
			return errClosing
		}
		terr = sock.ep.LastError()
	}
	switch {
	case f.refused.Load():
		return sysError("connect", syscall.ECONNABORTED) // flow established was blocked
	case terr != nil:
		return sysError("connect", conv.Errno(terr))
	}
	// The segment that ended the handshake passed the dispatcher before; should it have been another than the numbers said, the flow
	// is established all the same.
	s.establish(f)
	if f.state.Load() == flowClosed {
		return sysError("connect", syscall.ECONNRESET)
	}
	return nil
}

// dialUDP makes a datagram socket that is connected to one address.
func (s *Stack) dialUDP(ctx context.Context, network string, remote netip.AddrPort, name string) (net.Conn, error) {
	b, err := s.towards(protoUDP, remote)
	if err != nil {
		return nil, err
	}
	sock, err := s.openSocket(ctx, b)
	if err != nil {
		return nil, err
	}
	if terr := sock.ep.Connect(conv.FullAddress(remote)); terr != nil {
		sock.abandon()
		return nil, sysError("connect", conv.Errno(terr))
	}
	p := newPacketConn(sock, network)
	p.remote, p.name = remote, name
	return p, nil
}

// Listen listens for TCP connections, as net.Listen does. network is tcp, tcp4 or tcp6; an address without host, or an unspecified
// one, stands for all addresses of the stack, with plain tcp of both families.
//
// Errors: a *net.OpError with the error number, *BlockedError, the error of ctx or net.ErrClosed.
func (s *Stack) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	sock, err := s.listenSocket(ctx, network, address, protoTCP)
	if err != nil {
		return nil, opError("listen", network, nil, nil, err)
	}
	return newListener(sock, network), nil
}

// ListenPacket opens a datagram socket, as net.ListenPacket does. network is udp, udp4 or udp6. What it returns is a *PacketConn.
//
// Errors: as Listen.
func (s *Stack) ListenPacket(network, address string) (net.PacketConn, error) {
	sock, err := s.listenSocket(context.Background(), network, address, protoUDP)
	if err != nil {
		return nil, opError("listen", network, nil, nil, err)
	}
	return newPacketConn(sock, network), nil
}

// listenSocket opens and binds the socket of Listen or ListenPacket.
func (s *Stack) listenSocket(ctx context.Context, network, address string, proto uint8) (*socket, error) {
	t, err := parseTarget(network, address)
	if err != nil {
		return nil, err
	}
	if t.proto != proto {
		return nil, net.UnknownNetworkError(network)
	}
	if !s.begin() {
		return nil, errClosing
	}
	defer s.dialing.Done()
	b, err := s.bindAddress(&t)
	if err != nil {
		return nil, err
	}
	sock, err := s.openSocket(ctx, b)
	if err != nil || proto != protoTCP {
		return sock, err
	}
	for _, f := range b.families {
		r := request{layer: layers.ALEAuthListen.Layer(f), t: tuple{proto: protoTCP, local: inFamily(sock.local, f)}, x: facts{endpoint: sock.id}}
		if err := s.authorise(ctx, &r); err != nil {
			sock.abandon()
			return nil, err
		}
	}
	if terr := sock.ep.Listen(backlog); terr != nil {
		sock.abandon()
		return nil, sysError("listen", conv.Errno(terr))
	}
	return sock, nil
}

// backlog is how many connections wait for Accept, as net.Listen asks of Linux.
const backlog = 4096

// bindAddress returns where a socket is bound, and the families that it serves.
func (s *Stack) bindAddress(t *target) (binding, error) {
	a := netip.IPv6Unspecified()
	if t.restrict && t.only == layers.V4 {
		a = netip.IPv4Unspecified()
	}
	if t.host != "" {
		var err error
		if a, err = netip.ParseAddr(t.host); err != nil {
			return binding{}, &net.AddrError{Err: "want an IP address to listen on", Addr: t.host}
		}
		a = a.Unmap().WithZone("")
	}
	if !t.permits(a) {
		return binding{}, &net.AddrError{Err: "address is not of the network's family", Addr: t.host}
	}
	if !a.IsUnspecified() && !s.isLocal(a) {
		return binding{}, fmt.Errorf("bind to %v, which is not the stack's: %w", a, sysError("bind", syscall.EADDRNOTAVAIL))
	}
	b := binding{
		proto: t.proto, network: conv.NetworkProtocol(a), local: netip.AddrPortFrom(a, t.port), families: []layers.Family{conv.FamilyOf(a)}, v6only: t.restrict,
	}
	if a.Is6() && a.IsUnspecified() && !t.restrict {
		b.families = []layers.Family{layers.V4, layers.V6}
	}
	return b, nil
}
