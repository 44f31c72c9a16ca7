package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// monitor follows one interface through a routing netlink socket. The socket belongs to the namespace in which it was
// made and goes on working in a process of another one, which is how an adopted device is followed.
type monitor struct {
	file  *os.File
	name  string
	index int32  // of the interface; 0 until the first answer
	port  uint32 // the socket's own, which answers to it carry and changes do not
	loop  sync.WaitGroup
}

// newMonitorFile makes a socket that hears of every link change in the calling thread's network namespace.
func newMonitorFile() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("netlink bind: %w", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// queryTimeout bounds the wait for the kernel's first answer. It answers within the request; the rest is for messages
// that were queued before it.
const queryTimeout = 2 * time.Second

// newMonitor takes file and asks for the interface's state, so that what follows are changes of it.
func newMonitor(file *os.File, name string) (*monitor, linkState, error) {
	file, err := ownFile(file, "netlink")
	if err != nil {
		return nil, linkState{}, err
	}
	m := &monitor{file: file, name: name}
	if m.port, err = netlinkPort(file); err != nil {
		file.Close()
		return nil, linkState{}, err
	}
	state, err := m.first()
	if err != nil {
		file.Close()
		return nil, linkState{}, err
	}
	m.index = state.index
	return m, state, nil
}

// first queries the interface and reads until its state has come.
func (m *monitor) first() (state linkState, err error) {
	if err := m.query(); err != nil {
		return linkState{}, err
	}
	if err := m.file.SetReadDeadline(time.Now().Add(queryTimeout)); err != nil {
		return linkState{}, fmt.Errorf("netlink: %w", err)
	}
	buf := make([]byte, 1<<16)
	lost := false
	for state.index == 0 {
		n, err := m.file.Read(buf)
		if errors.Is(err, unix.ENOBUFS) {
			lost = true
			continue
		}
		if err != nil {
			return linkState{}, fmt.Errorf("netlink: state of %s: %w", m.name, err)
		}
		err = parseLinks(buf[:n], func(s linkState) {
			if s.name == m.name && !s.deleted {
				state = s
			}
		})
		if err == nil && lost && !m.isAnswer(buf[:n]) {
			err = m.query()
		}
		if err != nil {
			return linkState{}, fmt.Errorf("netlink: state of %s: %w", m.name, err)
		}
	}
	return state, m.file.SetReadDeadline(time.Time{})
}

// query asks for the interface's state; the answer comes among the changes.
func (m *monitor) query() error {
	name := append([]byte(m.name), 0)
	attr := unix.SizeofRtAttr + len(name)
	req := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfInfomsg+(attr+3)&^3)
	order := binary.NativeEndian
	order.PutUint32(req[0:], uint32(len(req)))
	order.PutUint16(req[4:], unix.RTM_GETLINK)
	order.PutUint16(req[6:], unix.NLM_F_REQUEST)
	order.PutUint32(req[8:], 1) // sequence number: answers are told from errors by type, not by it
	if m.index != 0 {
		order.PutUint32(req[unix.SizeofNlMsghdr+4:], uint32(m.index)) // a renamed interface keeps its index
	}
	at := unix.SizeofNlMsghdr + unix.SizeofIfInfomsg
	if m.index == 0 {
		order.PutUint16(req[at:], uint16(attr))
		order.PutUint16(req[at+2:], unix.IFLA_IFNAME)
		copy(req[at+unix.SizeofRtAttr:], name)
	} else {
		req = req[:at]
		order.PutUint32(req[0:], uint32(len(req)))
	}
	if _, err := m.file.Write(req); err != nil {
		return fmt.Errorf("netlink: ask for %s: %w", m.name, err)
	}
	return nil
}

// start calls changed with every state of the interface from now on.
func (m *monitor) start(changed func(linkState)) {
	// Owner: m. stop closes the socket, which ends it, and waits.
	m.loop.Go(func() { m.run(changed) })
}

// stop ends what start began.
func (m *monitor) stop() {
	m.file.Close()
	m.loop.Wait()
}

// run calls changed with every state of the interface until the socket is closed or fails.
func (m *monitor) run(changed func(linkState)) {
	buf := make([]byte, 1<<16)
	lost := false
	for {
		n, err := m.file.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			// The kernel had more to say than the socket holds. What it said is lost, how it is now is not, and is asked for
			// after each read until an answer comes: as long as the socket is full, the kernel drops answers too.
			lost = true
			continue
		case err != nil:
			return
		}
		err = parseLinks(buf[:n], func(s linkState) {
			if s.index == m.index {
				changed(s)
			}
		})
		if errors.Is(err, unix.ENODEV) {
			changed(linkState{index: m.index, deleted: true})
		}
		if lost = lost && !m.isAnswer(buf[:n]); lost && m.query() != nil {
			return
		}
	}
}

// isAnswer reports whether a datagram answers a query of ours. An answer comes alone.
func (m *monitor) isAnswer(b []byte) bool {
	return len(b) >= unix.SizeofNlMsghdr && binary.NativeEndian.Uint32(b[12:]) == m.port
}

// netlinkPort returns the port that the kernel gave a netlink socket.
func netlinkPort(file *os.File) (port uint32, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("netlink: %w", err)
	}
	var sa unix.Sockaddr
	var nameErr error
	if err := raw.Control(func(fd uintptr) { sa, nameErr = unix.Getsockname(int(fd)) }); err != nil {
		return 0, fmt.Errorf("netlink: %w", err)
	}
	if nameErr != nil {
		return 0, fmt.Errorf("netlink: own port: %w", nameErr)
	}
	nl, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return 0, fmt.Errorf("netlink: own port: %w", os.ErrInvalid)
	}
	return nl.Pid, nil
}

// parseLinks calls found for every link message in b. An error message of the kernel becomes its error number.
func parseLinks(b []byte, found func(linkState)) error {
	msgs, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return fmt.Errorf("message: %w", err)
	}
	for i := range msgs {
		m := &msgs[i]
		switch m.Header.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			if s, ok := parseLink(m); ok {
				found(s)
			}
		case unix.NLMSG_ERROR:
			if len(m.Data) >= 4 {
				if code := int32(binary.NativeEndian.Uint32(m.Data)); code != 0 {
					return syscall.Errno(-code)
				}
			}
		}
	}
	return nil
}

// parseLink reads one link message; ok is false if it is not about an interface as such (a bridge port, say).
func parseLink(m *syscall.NetlinkMessage) (s linkState, ok bool) {
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_UNSPEC {
		return s, false
	}
	s.index = int32(binary.NativeEndian.Uint32(m.Data[4:]))
	s.up = binary.NativeEndian.Uint32(m.Data[8:])&unix.IFF_UP != 0
	s.deleted = m.Header.Type == unix.RTM_DELLINK
	// The standard library's attribute parser panics on a last attribute whose padding is cut off.
	for b := m.Data[unix.SizeofIfInfomsg:]; len(b) >= unix.SizeofRtAttr; {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofRtAttr || length > len(b) {
			return s, false
		}
		switch value := b[unix.SizeofRtAttr:length]; binary.NativeEndian.Uint16(b[2:]) {
		case unix.IFLA_IFNAME:
			s.name = unix.ByteSliceToString(value)
		case unix.IFLA_MTU:
			if len(value) >= 4 {
				s.mtu = int(binary.NativeEndian.Uint32(value))
			}
		}
		b = b[min((length+3)&^3, len(b)):]
	}
	return s, true
}

// ownFile takes f and returns a file of ours on the same open file, with a descriptor in a known state: closed on exec,
// non-blocking, and known to the runtime's poller.
func ownFile(f *os.File, name string) (*os.File, error) {
	fd, err := takeFD(f)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// takeFD takes f and returns a non-blocking descriptor of ours on the same open file.
func takeFD(f *os.File) (int, error) {
	if f == nil {
		return -1, fmt.Errorf("no file: %w", os.ErrInvalid)
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, dupErr); err != nil {
		return -1, fmt.Errorf("duplicate descriptor: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("descriptor: %w", err)
	}
	return fd, nil
}
