package host

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// PacketConn is a datagram socket, connected or not: a net.PacketConn and a net.Conn, as net.UDPConn is. Its methods may be called
// from any goroutine.
type PacketConn struct {
	sock    *socket
	network string
	remote  netip.AddrPort // zero where it is not connected
	name    string         // by which the program named the remote

	readDeadline, writeDeadline deadline
	done                        chan struct{}
	once                        sync.Once
}

var (
	_ net.Conn       = (*PacketConn)(nil)
	_ net.PacketConn = (*PacketConn)(nil)
)

func newPacketConn(sock *socket, network string) *PacketConn {
	return &PacketConn{sock: sock, network: network, done: make(chan struct{})}
}

// Read implements net.Conn.
func (p *PacketConn) Read(b []byte) (int, error) {
	n, _, err := p.ReadFromUDPAddrPort(b)
	return n, err
}

// ReadFrom implements net.PacketConn.
func (p *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, a, err := p.ReadFromUDPAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(a), nil
}

// ReadFromUDPAddrPort is ReadFrom with the address as netip has it. What does not fit into b is lost.
//
// Errors: a *net.OpError with os.ErrDeadlineExceeded, net.ErrClosed or the error number.
func (p *PacketConn) ReadFromUDPAddrPort(b []byte) (n int, from netip.AddrPort, err error) {
	werr := await(p.sock.wq, waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp, &p.readDeadline, p.done, func() again {
		var more again
		n, from, more, err = p.readOne(b)
		return more
	})
	if werr != nil {
		err = werr
	}
	return n, from, p.opError("read", err)
}

// readOne reads the next datagram.
func (p *PacketConn) readOne(b []byte) (int, netip.AddrPort, again, error) {
	for {
		if p.isClosed() {
			return 0, netip.AddrPort{}, false, net.ErrClosed
		}
		w := tcpip.SliceWriter(b)
		r, terr := p.sock.ep.Read(&w, tcpip.ReadOptions{NeedRemoteAddr: true})
		switch terr.(type) {
		case nil:
			return r.Count, conv.AddrPort(r.RemoteAddr), false, nil
		case *tcpip.ErrBadBuffer: // nothing fits into an empty slice; the datagram is read all the same
			return 0, conv.AddrPort(r.RemoteAddr), false, nil
		case *tcpip.ErrWouldBlock:
			return 0, netip.AddrPort{}, true, nil
		case *tcpip.ErrClosedForReceive:
			return 0, netip.AddrPort{}, false, net.ErrClosed
		}
		if !p.remote.IsValid() {
			continue // an ICMP error about one remote is no error of a socket that has many
		}
		return 0, netip.AddrPort{}, false, netError("recvfrom", terr)
	}
}

// Write implements net.Conn.
func (p *PacketConn) Write(b []byte) (int, error) {
	if !p.remote.IsValid() {
		return 0, p.opError("write", sysError("write", syscall.EDESTADDRREQ))
	}
	n, err := p.write(b, p.remote, nil)
	return n, p.opError("write", err)
}

// WriteTo implements net.PacketConn.
func (p *PacketConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	a, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, p.opError("write", &net.AddrError{Err: "want a *net.UDPAddr", Addr: addrString(addr)})
	}
	return p.WriteToUDPAddrPort(b, a.AddrPort())
}

func addrString(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}

// WriteToUDPAddrPort is WriteTo with the address as netip has it.
//
// Errors: a *net.OpError with os.ErrDeadlineExceeded, net.ErrClosed, *BlockedError or the error number.
func (p *PacketConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	if p.remote.IsValid() {
		return 0, p.opError("write", net.ErrWriteToConnected)
	}
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	if !to.IsValid() || to.Port() == 0 {
		return 0, p.opError("write", sysError("sendto", syscall.EINVAL))
	}
	full := conv.FullAddress(to)
	n, err := p.write(b, to, &full)
	return n, opError("write", p.network, p.LocalAddr(), udpAddr(to), err)
}

// write sends a datagram. The first one to a remote is authorised; if it is pended the datagram is gone, as in a network that loses
// it, unless the callout kept a clone.
func (p *PacketConn) write(b []byte, to netip.AddrPort, full *tcpip.FullAddress) (int, error) {
	switch {
	case p.isClosed():
		return 0, net.ErrClosed
	case p.writeDeadline.expired():
		return 0, os.ErrDeadlineExceeded
	case len(b) > maxDatagram:
		return 0, sysError("write", syscall.EMSGSIZE)
	}
	s := p.sock.s
	f := p.sock.datagramFlow(to)
	if f == nil {
		var taken bool
		var err error
		if f, taken, err = p.first(b, to); err != nil || taken {
			if err != nil {
				return 0, err
			}
			return len(b), nil
		}
	}
	f.touch(s.opts.Clock())
	var err error
	retried := false
	werr := await(p.sock.wq, waiter.WritableEvents|waiter.EventHUp, &p.writeDeadline, p.done, func() again {
		terr := p.send(b, full)
		if _, full := terr.(*tcpip.ErrWouldBlock); full {
			return true
		}
		if terr != nil && !p.remote.IsValid() && !retried {
			// The error may be one of an earlier datagram to another remote, which this call only reports.
			retried = true
			terr = p.send(b, full)
		}
		if terr != nil {
			err = netError("write", terr)
		}
		return false
	})
	switch {
	case p.isClosed() && (err != nil || werr != nil):
		return 0, net.ErrClosed
	case werr != nil:
		return 0, werr
	case err != nil:
		return 0, err
	}
	f.bytesOut.Add(uint64(len(b)))
	return len(b), nil
}

func (p *PacketConn) send(b []byte, full *tcpip.FullAddress) tcpip.Error {
	_, err := p.sock.ep.Write(&payload{b: b}, tcpip.WriteOptions{To: full})
	return err
}

// maxDatagram is the longest payload of a UDP datagram. Units: bytes.
const maxDatagram = 65507

// first authorises the first datagram to a remote. taken says that there is nothing to send any more: it was pended, absorbed, or
// refused silently.
func (p *PacketConn) first(b []byte, to netip.AddrPort) (f *flow, taken bool, err error) {
	s := p.sock.s
	if !s.begin() {
		return nil, false, net.ErrClosed
	}
	defer s.dialing.Done()
	local := p.sock.local
	if local.Addr().IsUnspecified() {
		source, err := s.sourceFor(to.Addr())
		if err != nil {
			return nil, false, err
		}
		local = netip.AddrPortFrom(source, local.Port())
	}
	t := tuple{proto: protoUDP, local: local, remote: to}
	if f := s.flows.get(&t); f != nil && f.state.Load() == flowEstablished && f.sock.Load() == p.sock {
		return f, false, nil // the remote began
	}
	r := request{layer: layers.ALEAuthConnect.Layer(conv.FamilyOf(local.Addr())), t: t, data: b, async: true}
	r.x = facts{dir: layers.Outbound, name: p.name, endpoint: p.sock.id, loopback: s.isLocal(to.Addr())}
	d, held := s.ask(&r, nil)
	switch {
	case held != nil, d.Blocked() && (d.Absorb || d.Silent):
		return nil, true, nil
	case d.Blocked():
		return nil, false, blocked(&r, &d)
	}
	if f = s.beginDatagrams(t, layers.Outbound, p.sock, p.name); f == nil {
		return nil, false, sysError("write", syscall.ENOBUFS)
	}
	return f, false, nil
}

// Close implements net.Conn and net.PacketConn.
func (p *PacketConn) Close() error {
	err := net.ErrClosed
	p.once.Do(func() {
		err = nil
		close(p.done)
		p.readDeadline.stop()
		p.writeDeadline.stop()
		p.sock.close()
	})
	return p.opError("close", err)
}

func (p *PacketConn) isClosed() bool { return p.sock.closedAt.Load() != 0 }

// LocalAddr implements net.Conn and net.PacketConn.
func (p *PacketConn) LocalAddr() net.Addr { return udpAddr(p.sock.local) }

// RemoteAddr implements net.Conn; nil where the socket is not connected.
func (p *PacketConn) RemoteAddr() net.Addr { return udpAddr(p.remote) }

// SetDeadline implements net.Conn and net.PacketConn.
func (p *PacketConn) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn and net.PacketConn.
func (p *PacketConn) SetReadDeadline(t time.Time) error { return p.setDeadline(&p.readDeadline, t) }

// SetWriteDeadline implements net.Conn and net.PacketConn.
func (p *PacketConn) SetWriteDeadline(t time.Time) error { return p.setDeadline(&p.writeDeadline, t) }

func (p *PacketConn) setDeadline(d *deadline, t time.Time) error {
	if p.isClosed() {
		return p.opError("set", net.ErrClosed)
	}
	d.set(t)
	return nil
}

func (p *PacketConn) opError(op string, err error) error {
	return opError(op, p.network, p.LocalAddr(), p.RemoteAddr(), err)
}
