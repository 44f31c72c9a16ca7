package gateway

import (
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/layers"
)

// dial connects on the host side. The SYN is shown to the packet layers first.
func (f *tcpFlow) dial(syn *packet) {
	l := f.l
	if syn == nil {
		p := packetOf(f.syn)
		syn = &p
	}
	if !l.outboundPacket(syn, &f.who) {
		f.end() // dropped without a trace, as the filter says; the program's kernel sends another SYN
		return
	}
	f.state = stateDialing
	f.target = l.g.targetOf(f.who.remote)
	if err := f.connect(); err != nil {
		f.dialFailed(err)
	}
}

// dnsPort is where the stack answers DNS. Source: RFC 1035, 4.2.
const dnsPort = 53

// targetOf is where the host side connects for a destination: the stack's own addresses stand for the host's loopback.
func (g *Gateway) targetOf(remote netip.AddrPort) netip.AddrPort {
	switch {
	case remote.Addr() == g.opts.Addr4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), remote.Port())
	case remote.Addr() == g.opts.Addr6:
		return netip.AddrPortFrom(netip.IPv6Loopback(), remote.Port())
	default:
		return remote
	}
}

// connect starts a non-blocking connect and, where the kernel finishes it at once, goes on.
func (f *tcpFlow) connect() error {
	l := f.l
	fd, err := sysSocket(familyOf(f.target.Addr()), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	f.fd = fd
	if l.g.opts.Control != nil {
		if err := l.g.opts.Control(fd); err != nil {
			return fmt.Errorf("prepare host socket: %w", err)
		}
	}
	prepareHostSocket(fd)
	err = sysConnect(fd, f.target)
	if err != nil && err != unix.EINPROGRESS {
		return err
	}
	if err := l.epollAdd(fd, unix.EPOLLIN|unix.EPOLLPRI|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff, f); err != nil {
		return err
	}
	if err == nil {
		f.connected()
		return nil
	}
	if l.g.opts.DialTimeout > 0 {
		f.timer = l.after(l.g.opts.DialTimeout, func() { f.dialFailed(syscall.ETIMEDOUT) })
	}
	return nil
}

// prepareHostSocket sets what the relay relies on. The program's own Nagle has already acted, and urgent data stays in line so
// that no byte is lost. The options exist on every Linux; a failure costs latency, not correctness.
func prepareHostSocket(fd int) {
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	sysSetInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	sysSetInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// dialFailed shows the program what its own kernel would have found.
func (f *tcpFlow) dialFailed(err error) {
	errno, ok := err.(syscall.Errno)
	if errno == syscall.EMFILE || errno == syscall.ENFILE {
		if f.l.freeDescriptor() && f.fd < 0 {
			if err = f.connect(); err == nil {
				return
			}
			errno, ok = err.(syscall.Errno)
		}
	}
	if !ok {
		errno = syscall.EHOSTUNREACH
		f.l.g.opts.Logger.Warn("connect on the host side", "remote", f.target, "err", err)
	}
	f.l.g.recordDialFailure(f, errno)
	if errno == syscall.ETIMEDOUT {
		f.goSilent() // the program's own SYN timer reports ETIMEDOUT
		return
	}
	f.sendRefusal(unreachableErrno(errno))
	f.end()
}

// unreachableErrno is the errno that an answer can make the program's kernel report. A refusal says that the server answered; what
// never got there, like a route that swallows (EINVAL), is unreachable.
func unreachableErrno(errno syscall.Errno) syscall.Errno {
	switch errno {
	case syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ENETUNREACH, syscall.EACCES, syscall.EPERM:
		return errno
	case syscall.ENETDOWN, syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT:
		return syscall.ENETUNREACH
	default:
		return syscall.EHOSTUNREACH
	}
}

func (g *Gateway) recordDialFailure(f *tcpFlow, errno syscall.Errno) {
	g.record(layers.RecordFlowEnd, layers.ALEFlowEstablished.Layer(f.who.family()), &f.who, nil, func(r *layers.Record) {
		r.Duration, r.Detail = f.l.now.Sub(f.started), "connect: "+errno.Error()
	})
}

// connected gives the SYN to netstack: only now is the program told anything.
func (f *tcpFlow) connected() {
	l := f.l
	l.stop(f.timer)
	f.state = stateHandshake
	f.timer = l.after(handshakeTimeout, func() { f.reset("the program did not finish its handshake") })
	p := packetOf(f.syn)
	l.g.queueTCP.QueuePacket(l.g.listeners[f.who.family()].te, p.endpointID(), f.syn)
	f.dropSYN()
}

// freeDescriptor ends the datagram flow used longest ago, so that a connection can have its descriptor. It tells so: the limit
// of open files is too low for what the programs do.
func (l *loop) freeDescriptor() bool {
	if l.now.Sub(l.warnedFiles) > time.Minute {
		l.warnedFiles = l.now
		l.g.opts.Logger.Warn("too many open files: raise the limit (ulimit -n); idle datagram flows are ended to make room")
	}
	oldest := l.g.datagrams.lru.Back()
	if oldest == nil {
		return false
	}
	oldest.Value.(*datagramFlow).end("made room: too many open files")
	return true
}
