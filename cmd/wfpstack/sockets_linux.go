package main

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/identity"
)

// socketFinder asks the kernel of the programs, through a descriptor of their network namespace, about their sockets.
type socketFinder struct{ diag *identity.Diag }

// newSocketFinder makes a finder of a sock_diag descriptor that was opened in the programs' network namespace. It is nil where
// that kernel cannot answer.
//
// Ownership: lends f.
func newSocketFinder(f *os.File) *socketFinder {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil
	}
	dup := -1
	err = conn.Control(func(fd uintptr) { dup, _ = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil || dup < 0 {
		return nil
	}
	diag, err := identity.Open(os.NewFile(uintptr(dup), f.Name()))
	if err != nil {
		return nil
	}
	if err := diag.Probe(identity.TCP); err != nil {
		_ = diag.Close()
		return nil
	}
	return &socketFinder{diag}
}

// Connecting implements gateway.SocketFinder.
func (s *socketFinder) Connecting(local, remote netip.AddrPort) (exists, known bool) {
	sock, err := s.diag.Lookup(identity.TCP, local, remote)
	switch {
	case errors.Is(err, identity.ErrNoSocket):
		return false, true
	case err != nil:
		return false, false
	default:
		// A listener on the same port is found where the connecting socket is gone.
		return sock.State == identity.SynSent, true
	}
}

// Close releases the descriptor.
func (s *socketFinder) Close() error { return s.diag.Close() }
