package host

import (
	"net"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// Listener listens for TCP connections; a net.Listener with the deadline of net.TCPListener.
type Listener struct {
	sock     *socket
	network  string
	deadline deadline
	done     chan struct{}
	once     sync.Once
}

var _ net.Listener = (*Listener)(nil)

func newListener(sock *socket, network string) *Listener {
	return &Listener{sock: sock, network: network, done: make(chan struct{})}
}

// Accept implements net.Listener.
//
// Errors: a *net.OpError with net.ErrClosed or os.ErrDeadlineExceeded.
func (l *Listener) Accept() (net.Conn, error) {
	var c *Conn
	var err error
	werr := await(l.sock.wq, waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr, &l.deadline, l.done, func() again {
		var more again
		c, more, err = l.acceptOne()
		return more
	})
	if werr != nil {
		err = werr
	}
	if err != nil {
		return nil, opError("accept", l.network, nil, l.Addr(), err)
	}
	return c, nil
}

// acceptOne takes the next connection that is still there.
func (l *Listener) acceptOne() (*Conn, again, error) {
	for {
		if l.sock.closedAt.Load() != 0 {
			return nil, false, net.ErrClosed
		}
		ep, wq, terr := l.sock.ep.Accept(nil)
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return nil, true, nil
		default:
			if l.sock.closedAt.Load() != 0 {
				return nil, false, net.ErrClosed
			}
			return nil, false, sysError("accept", conv.Errno(terr))
		}
		if c := l.adopt(ep, wq); c != nil {
			return c, false, nil
		}
	}
}

// adopt makes a connection of what netstack accepted, nil if it is refused or gone.
func (l *Listener) adopt(ep tcpip.Endpoint, wq *waiter.Queue) *Conn {
	s := l.sock.s
	local, lerr := ep.GetLocalAddress()
	remote, rerr := ep.GetRemoteAddress()
	if lerr != nil || rerr != nil {
		ep.Close() // reset before it was accepted
		return nil
	}
	t := tuple{proto: protoTCP, local: conv.AddrPort(local), remote: conv.AddrPort(remote)}
	f := s.flows.get(&t)
	if f == nil || f.dir != layers.Inbound || f.state.Load() == flowClosed {
		ep.Abort()
		ep.Close()
		return nil
	}
	// Should the segment that ended the handshake have been another than the numbers said, the flow is established all the same.
	s.establish(f)
	if f.refused.Load() {
		ep.Abort()
		ep.Close()
		return nil
	}
	sock, ok := s.newSocket(ep, wq, protoTCP, l.sock.id)
	if !ok {
		ep.Abort()
		ep.Close()
		return nil
	}
	sock.local = t.local
	c := newConn(sock, f, l.network)
	sock.attach(f)
	return c
}

// Close implements net.Listener. Connections that wait for Accept are reset.
func (l *Listener) Close() error {
	err := net.ErrClosed
	l.once.Do(func() {
		err = nil
		close(l.done)
		l.deadline.stop()
		l.sock.close()
	})
	return opError("close", l.network, nil, l.Addr(), err)
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return tcpAddr(l.sock.local) }

// SetDeadline sets the deadline of Accept.
func (l *Listener) SetDeadline(t time.Time) error {
	l.deadline.set(t)
	return nil
}
