package identity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queryTimeout bounds the wait for an answer. The kernel answers inside the send, so this only matters when it is broken.
const queryTimeout = 100 * time.Millisecond

// maxReceives bounds how many datagrams one query reads before it gives up: late answers to earlier queries are skipped.
const maxReceives = 16

// Diag asks the kernel for single sockets of one network namespace: the one its descriptor was made in.
//
// Its methods may be called by several goroutines; one query runs at a time.
//
// Locks: mu is a leaf.
type Diag struct {
	mu sync.Mutex
	// +checklocks:mu
	fd int
	// +checklocks:mu
	seq uint32
	// +checklocks:mu
	ifindex uint32
	// +checklocks:mu
	req request
	// +checklocks:mu
	buf [8192]byte
	// from is the sender of the last datagram; a field because a local would escape to the heap.
	// +checklocks:mu
	from unix.RawSockaddrNetlink
}

// NewFile makes a netlink descriptor that is bound to the network namespace of the calling thread, to be passed to the process
// that calls [Open]. It needs no privilege.
//
// Ownership: gives the file.
func NewFile() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("identity: open a NETLINK_INET_DIAG socket: %w (the kernel needs CONFIG_INET_DIAG)", err)
	}
	return os.NewFile(uintptr(fd), "netlink:inet_diag"), nil
}

// OpenHere is [NewFile] and [Open] for the network namespace of the calling thread.
func OpenHere() (*Diag, error) {
	f, err := NewFile()
	if err != nil {
		return nil, err
	}
	return Open(f)
}

// Open makes a Diag from a netlink descriptor that was made in the namespace to look into.
//
// Ownership: takes f, also when it fails.
func Open(f *os.File) (*Diag, error) {
	if f == nil {
		return nil, fmt.Errorf("identity: open: %w: no netlink descriptor", os.ErrInvalid)
	}
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("identity: open %s: %w", f.Name(), err)
	}
	fd, cerr := -1, error(nil)
	// A duplicate keeps the descriptor out of the runtime's poller, whatever mode the file was in.
	err = conn.Control(func(u uintptr) {
		domain, derr := unix.GetsockoptInt(int(u), unix.SOL_SOCKET, unix.SO_DOMAIN)
		proto, perr := unix.GetsockoptInt(int(u), unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if cerr = errors.Join(derr, perr); cerr != nil {
			return
		}
		if domain != unix.AF_NETLINK || proto != unix.NETLINK_INET_DIAG {
			cerr = fmt.Errorf("not a NETLINK_INET_DIAG socket (domain %d, protocol %d)", domain, proto)
			return
		}
		fd, cerr = unix.FcntlInt(u, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err := errors.Join(err, cerr); err != nil {
		return nil, fmt.Errorf("identity: open %s: %w", f.Name(), err)
	}
	return &Diag{fd: fd, seq: rand.Uint32()}, nil
}

// Close releases the descriptor; later calls fail with [os.ErrClosed].
func (d *Diag) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return os.ErrClosed
	}
	err := unix.Close(d.fd)
	d.fd = -1
	return err
}

// SetInterface names the device, by its index inside the namespace, through which the flows come. With it sockets that are bound
// to that device (SO_BINDTODEVICE) are found too; with 0, the start value, they are not.
func (d *Diag) SetInterface(index uint32) {
	d.mu.Lock()
	d.ifindex = index
	d.mu.Unlock()
}

// Lookup finds the socket that owns the flow between local (the program's side) and remote. It finds connected sockets first,
// then listening ones (TCP) and wildcard ones (UDP), dual-stack IPv6 sockets included. 4-in-6 addresses are unmapped first.
//
// Hot path: two system calls, no allocation.
//
// Errors: ErrNoSocket, ErrProto, ErrTimeout, os.ErrClosed, or the kernel's errno, wrapped.
func (d *Diag) Lookup(proto Proto, local, remote netip.AddrPort) (Socket, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lookupLocked(proto, local, remote, noCookie)
}

// Alive reports whether s, as [Diag.Lookup] gave it, still exists and still is the program's: a socket that took over its
// addresses is another one, and one that only lingers in TIME_WAIT or was closed does not count. A pended connect whose program
// gave up is found with it.
//
// Errors: as Lookup, without ErrNoSocket.
func (d *Diag) Alive(s Socket) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.lookupLocked(s.Proto, s.Local, s.Remote, s.Cookie)
	switch {
	case err == ErrNoSocket:
		return false, nil
	case err != nil:
		return false, err
	case s.Proto == TCP && (now.State == Close || now.State == TimeWait):
		return false, nil
	default:
		return now.Inode != 0, nil // 0: the program closed it, and the kernel only says goodbye
	}
}

// Probe asks for nothing, to learn whether the kernel can answer queries for proto at all: where its part is missing, every
// [Diag.Lookup] would say ErrNoSocket.
func (d *Diag) Probe(proto Proto) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// A dump of sockets in no state: walks nothing, but fails where the kernel has no handler.
	d.seq++
	d.req.encode(d.seq, proto, sockID{}, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, 0)
	_, err := d.exchangeLocked(proto)
	if err == errDone {
		return nil
	}
	if err == ErrNoSocket || err == nil {
		err = unix.ENOENT
	}
	return fmt.Errorf("identity: the kernel has no sock_diag for %v: %w (modprobe %v_diag, or CONFIG_INET_%v_DIAG)", proto, err, proto, proto)
}

// +checklocks:d.mu
func (d *Diag) lookupLocked(proto Proto, local, remote netip.AddrPort, cookie uint64) (Socket, error) {
	if proto != TCP && proto != UDP {
		return Socket{}, ErrProto
	}
	la, ra := local.Addr().Unmap(), remote.Addr().Unmap()
	if !la.IsValid() || !ra.IsValid() || la.Is4() != ra.Is4() {
		// A wildcard's own addresses can be :: on one side and unmapped IPv4 on the other: ask in the family that fits both.
		var ok bool
		if la, ra, ok = oneFamily(la, ra); !ok {
			return Socket{}, ErrNoSocket
		}
	}
	id := sockID{
		src: netip.AddrPortFrom(la, local.Port()), dst: netip.AddrPortFrom(ra, remote.Port()),
		ifindex: zoneIndex(la, ra, d.ifindex), cookie: cookie,
	}
	if proto == UDP {
		// The kernel looks up as if the datagram had come in, and reads source and destination of the request the other way round.
		id.src, id.dst = id.dst, id.src
	}
	d.seq++
	d.req.encode(d.seq, proto, id, unix.NLM_F_REQUEST, allStates)
	return d.exchangeLocked(proto)
}

// oneFamily brings two addresses, one of which is unspecified, into one family.
func oneFamily(la, ra netip.Addr) (netip.Addr, netip.Addr, bool) {
	if !la.IsValid() || !ra.IsValid() {
		return la, ra, false
	}
	switch {
	case la.IsUnspecified() && ra.Is4():
		return netip.IPv4Unspecified(), ra, true
	case la.IsUnspecified():
		return netip.IPv6Unspecified(), ra, true
	case ra.IsUnspecified() && la.Is4():
		return la, netip.IPv4Unspecified(), true
	case ra.IsUnspecified():
		return la, netip.IPv6Unspecified(), true
	default:
		return la, ra, false
	}
}

// zoneIndex gives the device to look on: that of a numeric zone, else the one that was set. A zone with a name means a device
// of our own namespace, not of the program's, and says nothing.
func zoneIndex(la, ra netip.Addr, set uint32) uint32 {
	for _, a := range [2]netip.Addr{la, ra} {
		if a.Zone() == "" {
			continue
		}
		if n, err := strconv.ParseUint(a.Zone(), 10, 31); err == nil {
			return uint32(n)
		}
	}
	return set
}

// errDone is the end of a dump.
var errDone = errors.New("sock_diag: end of dump")

// exchangeLocked sends the request and waits for the answer with its sequence number.
//
// +checklocks:d.mu
func (d *Diag) exchangeLocked(proto Proto) (Socket, error) {
	if d.fd < 0 {
		return Socket{}, os.ErrClosed
	}
	if _, err := unix.Write(d.fd, d.req[:]); err != nil {
		return Socket{}, fmt.Errorf("identity: sock_diag send: %w", err)
	}
	for range maxReceives {
		b, err := d.receiveLocked()
		if err != nil {
			return Socket{}, err
		}
		for len(b) > 0 {
			typ, seq, body, rest, err := next(b)
			if err != nil {
				return Socket{}, err
			}
			b = rest
			if seq != d.seq {
				continue // the late answer to a query that timed out
			}
			return answer(proto, typ, body)
		}
	}
	return Socket{}, ErrTimeout
}

// answer turns one netlink message into the outcome of the query.
func answer(proto Proto, typ uint16, body []byte) (Socket, error) {
	switch typ {
	case diagByFamily:
		return decode(proto, body)
	case unix.NLMSG_ERROR, unix.NLMSG_DONE:
		if len(body) < 4 {
			if typ == unix.NLMSG_DONE {
				return Socket{}, errDone
			}
			return Socket{}, errShort
		}
		errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(body)))
		switch {
		case errno == 0 && typ == unix.NLMSG_DONE:
			return Socket{}, errDone
		case errno == unix.ENOENT, errno == unix.ESTALE: // stale: the addresses now belong to another socket
			return Socket{}, ErrNoSocket
		default:
			return Socket{}, fmt.Errorf("identity: sock_diag %v: %w", proto, errno)
		}
	default:
		return Socket{}, fmt.Errorf("identity: sock_diag: answer of unknown type %d", typ)
	}
}

// receiveLocked reads one datagram that the kernel sent.
//
// +checklocks:d.mu
func (d *Diag) receiveLocked() ([]byte, error) {
	for range maxReceives {
		fromLen := uint32(unix.SizeofSockaddrNetlink)
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(d.fd), uintptr(unsafe.Pointer(&d.buf[0])), uintptr(len(d.buf)),
			unix.MSG_DONTWAIT|unix.MSG_TRUNC, uintptr(unsafe.Pointer(&d.from)), uintptr(unsafe.Pointer(&fromLen)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			if err := d.waitLocked(); err != nil {
				return nil, err
			}
			continue
		case errno != 0:
			return nil, fmt.Errorf("identity: sock_diag receive: %w", errno)
		case d.from.Pid != 0:
			continue // not from the kernel: somebody's forgery
		case int(n) > len(d.buf):
			return nil, fmt.Errorf("identity: sock_diag: answer of %d bytes, limit %d", n, len(d.buf))
		}
		return d.buf[:n], nil
	}
	return nil, ErrTimeout
}

// waitLocked waits for something to read.
//
// +checklocks:d.mu
func (d *Diag) waitLocked() error {
	fds := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(queryTimeout/time.Millisecond))
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("identity: sock_diag poll: %w", err)
	}
	if n == 0 && err == nil {
		return ErrTimeout
	}
	return nil
}
