package host

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// socket is one local endpoint: a listener, a connection, or a datagram socket, over an endpoint of netstack.
type socket struct {
	s      *Stack
	id     uint64 // the endpoint handle
	parent uint64 // of the listener that accepted it
	proto  uint8
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	hup    waiter.Entry
	// assigned are the families for which resource assignment was raised, and resource release is to be.
	assigned []layers.Family
	local    netip.AddrPort

	// ending says that the end of the connection is queued to the worker.
	ending atomic.Bool
	// closedAt is when close was called, in Unix nanoseconds; 0: it was not.
	closedAt atomic.Int64

	// last is the datagram flow that was used last.
	last atomic.Pointer[flow]

	mu sync.Mutex
	// flows are the datagram flows by remote.
	// +checklocks:mu
	flows map[netip.AddrPort]*flow
	// conn is the flow of a connection.
	// +checklocks:mu
	conn *flow
	// +checklocks:mu
	closed bool
	// shown says that endpoint closure was raised.
	// +checklocks:mu
	shown bool
}

// socketTable finds sockets by netstack's endpoint and by handle.
type socketTable struct {
	mu sync.RWMutex
	// +checklocks:mu
	byEndpoint map[tcpip.Endpoint]*socket
	// +checklocks:mu
	byID map[uint64]*socket
	// +checklocks:mu
	closed bool
}

// newSocket makes a socket over an endpoint, which it takes, and enters it. It fails once the stack is closing.
func (s *Stack) newSocket(ep tcpip.Endpoint, wq *waiter.Queue, proto uint8, parent uint64) (*socket, bool) {
	sock := &socket{s: s, id: s.lastEndpoint.Add(1), parent: parent, proto: proto, ep: ep, wq: wq}
	t := &s.sockets
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, false
	}
	t.byEndpoint[ep], t.byID[sock.id] = sock, sock
	return sock, true
}

// socketOf returns the socket over an endpoint, nil if it is none of ours, such as a connection that was not accepted yet.
func (s *Stack) socketOf(ep stack.TransportEndpoint) *socket {
	e, ok := ep.(tcpip.Endpoint)
	if !ok {
		return nil
	}
	s.sockets.mu.RLock()
	defer s.sockets.mu.RUnlock()
	return s.sockets.byEndpoint[e]
}

// socketByID returns the socket with an endpoint handle.
func (s *Stack) socketByID(id uint64) *socket {
	s.sockets.mu.RLock()
	defer s.sockets.mu.RUnlock()
	return s.sockets.byID[id]
}

// allSockets returns the sockets as they are now; with stop no more are made.
func (s *Stack) allSockets(stop bool) []*socket {
	t := &s.sockets
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = t.closed || stop
	out := make([]*socket, 0, len(t.byID))
	for _, sock := range t.byID {
		out = append(out, sock)
	}
	return out
}

// forgetSocket takes a socket out of the tables.
func (s *Stack) forgetSocket(sock *socket) {
	t := &s.sockets
	t.mu.Lock()
	delete(t.byEndpoint, sock.ep)
	delete(t.byID, sock.id)
	t.mu.Unlock()
}

// adopt makes a datagram flow the socket's, unless the socket is closed.
func (k *socket) adopt(f *flow) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false
	}
	if k.flows == nil {
		k.flows = make(map[netip.AddrPort]*flow)
	}
	k.flows[f.key.remote] = f
	f.sock.Store(k)
	return true
}

// forget gives up a datagram flow.
func (k *socket) forget(f *flow) {
	k.last.CompareAndSwap(f, nil)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.flows[f.key.remote] == f {
		delete(k.flows, f.key.remote)
	}
}

// datagramFlow returns the live flow to a remote, nil if there is none.
//
// Hot path: an atomic load where the remote is that of the last datagram.
func (k *socket) datagramFlow(remote netip.AddrPort) *flow {
	if f := k.last.Load(); f != nil && f.key.remote == remote && f.state.Load() == flowEstablished {
		return f
	}
	k.mu.Lock()
	f := k.flows[remote]
	k.mu.Unlock()
	if f == nil || f.state.Load() != flowEstablished {
		return nil
	}
	k.last.Store(f)
	return f
}

// attach makes a connection's flow the socket's and asks netstack to be told of its end.
func (k *socket) attach(f *flow) {
	k.mu.Lock()
	k.conn = f
	k.mu.Unlock()
	f.sock.Store(k)
	k.s.flows.claim(f)
	// The callback may run with the endpoint's lock held: it only leaves word for the worker.
	k.hup = waiter.NewFunctionEntry(waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) { k.endLater() })
	k.wq.EventRegister(&k.hup)
	if k.over() {
		k.endLater() // it ended before anybody listened
	}
}

// over reports whether a connection has ended for netstack as well: whatever comes for its tuple is not its own any more.
func (k *socket) over() bool {
	switch tcp.EndpointState(k.ep.State()) {
	case tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
		return true
	default:
		return false
	}
}

// endLater lets the worker look at the connection's end.
func (k *socket) endLater() {
	if !k.ending.CompareAndSwap(false, true) {
		return
	}
	k.s.queue.control(func(bool) {
		k.ending.Store(false)
		if k.over() {
			k.end()
		}
	})
}

// end ends a connection's flow: contexts go back, and endpoint closure is raised if the program has not closed the socket yet.
func (k *socket) end() {
	k.mu.Lock()
	f := k.conn
	k.mu.Unlock()
	if f == nil {
		return
	}
	k.closure(f.key)
	k.s.dropFlow(f)
}

// closure raises endpoint closure, once.
func (k *socket) closure(t tuple) {
	k.mu.Lock()
	was := k.shown
	k.shown = true
	k.mu.Unlock()
	if was {
		return
	}
	k.s.notify(layers.ALEEndpointClosure, conv.FamilyOf(t.local.Addr()), &t, &facts{endpoint: k.id, parent: k.parent, loopback: k.s.isLocal(t.remote.Addr())})
}

// close ends the socket for the program. It reports false if it was closed before.
func (k *socket) close() bool {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return false
	}
	k.closed = true
	conn := k.conn
	flows := make([]*flow, 0, len(k.flows))
	for _, f := range k.flows {
		flows = append(flows, f)
	}
	k.mu.Unlock()
	k.closedAt.Store(k.s.opts.Clock().UnixNano())
	k.ep.Close()
	t := tuple{proto: k.proto, local: k.local}
	if conn != nil {
		t = conn.key
	}
	if conn != nil || k.parent == 0 {
		k.closure(t)
	}
	if conn == nil && k.proto == protoTCP {
		flows = k.s.flows.unclaimedOf(k.id) // netstack has reset them
	}
	for _, f := range flows {
		k.s.dropFlow(f)
	}
	if conn != nil {
		k.s.endFlow(conn)
		if k.over() {
			k.s.dropFlow(conn)
		}
	}
	for _, e := range k.s.pends.cancelIf(layers.PendAbandoned, func(h *held) bool { return h.x.endpoint == k.id }) {
		k.s.ended(e)
	}
	k.release()
	k.s.forgetSocket(k)
	return true
}

// abandon closes a socket that no program ever had.
func (k *socket) abandon() {
	k.mu.Lock()
	k.closed, k.shown = true, true
	k.mu.Unlock()
	k.closedAt.Store(k.s.opts.Clock().UnixNano())
	k.ep.Close()
	k.release()
	k.s.forgetSocket(k)
}

// shutdown closes a socket because the stack closes: a connection is reset.
func (k *socket) shutdown() {
	k.mu.Lock()
	conn := k.conn
	k.mu.Unlock()
	if conn != nil {
		k.ep.Abort()
	}
	k.close()
}

// release raises resource release for each resource assignment.
func (k *socket) release() {
	for _, f := range k.assigned {
		t := tuple{proto: k.proto, local: k.local}
		k.s.notify(layers.ALEResourceRelease, f, &t, &facts{endpoint: k.id})
	}
	k.assigned = nil
}

// notify raises an indication whose verdict has no effect.
func (s *Stack) notify(kind layers.Kind, f layers.Family, t *tuple, x *facts) {
	layer := kind.Layer(f)
	if !s.wanted(layer) {
		return
	}
	e := newEvent(layer)
	defer e.release()
	s.fill(e, t, x)
	s.decide(e)
}

// assign raises resource assignment for a bind, for each family that the socket will serve.
//
// Errors: those of authorise.
func (s *Stack) assign(ctx context.Context, b *binding, endpoint uint64) (done []layers.Family, err error) {
	for _, f := range b.families {
		r := request{layer: layers.ALEResourceAssignment.Layer(f), t: tuple{proto: b.proto, local: inFamily(b.local, f)}}
		r.x = facts{endpoint: endpoint}
		if err := s.authorise(ctx, &r); err != nil {
			return done, err
		}
		done = append(done, f)
	}
	return done, nil
}

// inFamily returns a wildcard address in a family; another address is what it is.
func inFamily(local netip.AddrPort, f layers.Family) netip.AddrPort {
	switch {
	case local.Addr().IsValid() && !local.Addr().IsUnspecified():
		return local
	case f == layers.V4:
		return netip.AddrPortFrom(netip.IPv4Unspecified(), local.Port())
	default:
		return netip.AddrPortFrom(netip.IPv6Unspecified(), local.Port())
	}
}

// newEndpoint makes an endpoint of netstack.
func (s *Stack) newEndpoint(proto uint8, network tcpip.NetworkProtocolNumber) (tcpip.Endpoint, *waiter.Queue, error) {
	var wq waiter.Queue
	ep, err := s.stack.NewEndpoint(tcpip.TransportProtocolNumber(proto), network, &wq)
	if err != nil {
		return nil, nil, conv.Errno(err)
	}
	if proto == uint8(header.UDPProtocolNumber) {
		// Room for two datagrams of the largest size; netstack's default holds half of one.
		ep.SocketOptions().SetSendBufferSize(datagramBuffer, false)
		ep.SocketOptions().SetReceiveBufferSize(datagramBuffer, false)
	}
	return ep, &wq, nil
}

// datagramBuffer is the buffer of a datagram socket in each direction. Units: bytes.
const datagramBuffer = 256 << 10

// abortLater ends a flow by resetting its connection, from the worker.
func (s *Stack) abortLater(f *flow) {
	s.queue.control(func(bool) { s.abort(f) })
}

// abort resets the connection of a flow, or ends a flow of datagrams.
func (s *Stack) abort(f *flow) {
	if f.key.proto != uint8(header.TCPProtocolNumber) {
		s.dropFlow(f)
		return
	}
	if sock := f.sock.Load(); sock != nil {
		sock.ep.Abort()
		return
	}
	ep := s.endpoint(&f.key)
	if ep == nil || s.socketOf(ep) != nil {
		s.dropFlow(f)
		return
	}
	ep.Abort()
	s.dropFlow(f)
}
