package main

import (
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The load generator and its server use blocking sockets and raw system calls, one thread per connection: what Go's poller and
// scheduler would add to a round trip is of the size of what is measured. A thread in a raw call keeps its P, so there are more
// Ps than threads, no collection of garbage, and (from outside) no preemption.
func quietRuntime() {
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(256)
}

func rawRead(fd int, b []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), nil
	}
}

func rawWrite(fd int, b []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), nil
	}
}

// readFull reads all of b; n is short only with an error or at the end.
func readFull(fd int, b []byte) (n int, err error) {
	for n < len(b) {
		m, err := rawRead(fd, b[n:])
		if err != nil || m == 0 {
			return n, err
		}
		n += m
	}
	return n, nil
}

func writeFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := rawWrite(fd, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func rawAccept(fd int) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if e == unix.EINTR || e == unix.ECONNABORTED {
			continue
		}
		if e != 0 {
			return -1, e
		}
		return int(n), nil
	}
}

func rawClose(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// target is an address in the form that system calls take.
type target struct {
	v4     unix.RawSockaddrInet4
	v6     unix.RawSockaddrInet6
	is6    bool
	family int
}

func newTarget(a netip.AddrPort) target {
	port := a.Port()<<8 | a.Port()>>8
	if a.Addr().Is4() {
		return target{v4: unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: a.Addr().As4()}, family: unix.AF_INET}
	}
	return target{v6: unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: a.Addr().As16()}, is6: true, family: unix.AF_INET6}
}

func (t *target) sockaddr() (unsafe.Pointer, uintptr) {
	if t.is6 {
		return unsafe.Pointer(&t.v6), unsafe.Sizeof(t.v6)
	}
	return unsafe.Pointer(&t.v4), unsafe.Sizeof(t.v4)
}

// dial makes a connected socket of a type.
func dial(t *target, kind int) (int, error) {
	r, _, e := unix.RawSyscall(unix.SYS_SOCKET, uintptr(t.family), uintptr(kind|unix.SOCK_CLOEXEC), 0)
	if e != 0 {
		return -1, e
	}
	fd := int(r)
	p, n := t.sockaddr()
	for {
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(p), n)
		if e != unix.EINTR {
			break
		}
	}
	if e != 0 && e != unix.EISCONN {
		rawClose(fd)
		return -1, e
	}
	if kind == unix.SOCK_STREAM {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			rawClose(fd)
			return -1, err
		}
	}
	return fd, nil
}

// listen makes a bound socket, listening if it is a stream.
func listen(a netip.AddrPort, kind int) (int, error) {
	t := newTarget(a)
	fd, err := unix.Socket(t.family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(a.Port()), Addr: t.v4.Addr}
	if t.is6 {
		sa = &unix.SockaddrInet6{Port: int(a.Port()), Addr: t.v6.Addr}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return -1, fmt.Errorf("bind %s: %w", a, err)
	}
	if kind == unix.SOCK_STREAM {
		return fd, unix.Listen(fd, 4096)
	}
	return fd, nil
}

// mmsg is a batch of equal datagrams for sendmmsg, or of buffers for recvmmsg.
type mmsg struct {
	hdr []struct {
		h   unix.Msghdr
		n   uint32
		pad [4]byte
	}
	iov []unix.Iovec
	buf []byte
}

func newMmsg(n, size int) *mmsg {
	m := &mmsg{buf: make([]byte, n*size), iov: make([]unix.Iovec, n)}
	m.hdr = make([]struct {
		h   unix.Msghdr
		n   uint32
		pad [4]byte
	}, n)
	for i := range m.hdr {
		m.iov[i].Base = &m.buf[i*size]
		m.iov[i].SetLen(size)
		m.hdr[i].h.Iov = &m.iov[i]
		m.hdr[i].h.SetIovlen(1)
	}
	return m
}

// send sends the first n datagrams of the batch and returns how many went out.
func (m *mmsg) send(fd, n int) (int, error) {
	r, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.hdr[0])), uintptr(n), unix.MSG_NOSIGNAL, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// recv takes what is there, at least one.
func (m *mmsg) recv(fd int) (int, error) {
	r, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.hdr[0])), uintptr(len(m.hdr)), unix.MSG_WAITFORONE, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// pause sleeps shorter than a Go timer can.
func pause(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	unix.RawSyscall6(unix.SYS_CLOCK_NANOSLEEP, unix.CLOCK_MONOTONIC, 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
}

// percentile returns the p-th part of sorted values.
func percentile(sorted []int64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	return float64(sorted[min(len(sorted)-1, int(p*float64(len(sorted))))])
}
