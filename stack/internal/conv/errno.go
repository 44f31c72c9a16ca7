package conv

import (
	"fmt"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Errno returns the error number that a Linux program would see for a netstack error; nil for nil. Those that netstack itself
// answers with (would block, connect started, closed for receive) have one too, so that a caller which forgot to deal with them
// still fails with something true.
//
// Source: pkg/syserr of the pinned netstack; connect(2), send(2), bind(2).
func Errno(err tcpip.Error) error {
	if err == nil {
		return nil
	}
	if n, ok := errno(err); ok {
		return n
	}
	return fmt.Errorf("netstack: %s: %w", err.String(), syscall.EINVAL)
}

func errno(err tcpip.Error) (syscall.Errno, bool) {
	if n, ok := connectionErrno(err); ok {
		return n, true
	}
	switch err.(type) {
	case *tcpip.ErrAddressFamilyNotSupported:
		return syscall.EAFNOSUPPORT, true
	case *tcpip.ErrAlreadyBound, *tcpip.ErrInvalidEndpointState, *tcpip.ErrInvalidOptionValue, *tcpip.ErrInvalidPortRange,
		*tcpip.ErrMalformedHeader, *tcpip.ErrMissingRequiredFields:
		return syscall.EINVAL, true
	case *tcpip.ErrBadAddress, *tcpip.ErrBadBuffer:
		return syscall.EFAULT, true
	case *tcpip.ErrBadLocalAddress:
		return syscall.EADDRNOTAVAIL, true
	case *tcpip.ErrBroadcastDisabled:
		return syscall.EACCES, true
	case *tcpip.ErrDuplicateAddress, *tcpip.ErrDuplicateNICID:
		return syscall.EEXIST, true
	case *tcpip.ErrInvalidNICID, *tcpip.ErrUnknownDevice, *tcpip.ErrUnknownNICID:
		return syscall.ENODEV, true
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE, true
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS, true
	case *tcpip.ErrNoPortAvailable:
		return syscall.EAGAIN, true
	case *tcpip.ErrNoSuchFile:
		return syscall.ENOENT, true
	case *tcpip.ErrNotPermitted:
		return syscall.EPERM, true
	case *tcpip.ErrNotSupported:
		return syscall.EOPNOTSUPP, true
	case *tcpip.ErrPortInUse:
		return syscall.EADDRINUSE, true
	case *tcpip.ErrQueueSizeNotSupported:
		return syscall.ENOTTY, true
	case *tcpip.ErrUnknownProtocol:
		return syscall.EPROTONOSUPPORT, true
	case *tcpip.ErrUnknownProtocolOption:
		return syscall.ENOPROTOOPT, true
	case *tcpip.ErrWouldBlock:
		return syscall.EAGAIN, true
	case *tcpip.ErrEndpointBusy:
		return syscall.EBUSY, true
	default:
		return 0, false
	}
}

// connectionErrno knows the errors that the state of a connection or of a route causes.
func connectionErrno(err tcpip.Error) (syscall.Errno, bool) {
	switch err.(type) {
	case *tcpip.ErrAborted, *tcpip.ErrClosedForSend:
		return syscall.EPIPE, true
	case *tcpip.ErrAlreadyConnected:
		return syscall.EISCONN, true
	case *tcpip.ErrAlreadyConnecting:
		return syscall.EALREADY, true
	case *tcpip.ErrClosedForReceive:
		return syscall.ENODATA, true // callers turn the end of a stream into io.EOF before they come here
	case *tcpip.ErrConnectStarted:
		return syscall.EINPROGRESS, true
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED, true
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED, true
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET, true
	case *tcpip.ErrDestinationRequired:
		return syscall.EDESTADDRREQ, true
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH, true
	case *tcpip.ErrHostUnreachable:
		return syscall.EHOSTUNREACH, true
	case *tcpip.ErrHostDown:
		return syscall.EHOSTDOWN, true
	case *tcpip.ErrNoNet:
		return syscall.ENONET, true
	case *tcpip.ErrNotConnected:
		return syscall.ENOTCONN, true
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT, true
	default:
		return 0, false
	}
}

func errPrefix(p netip.Prefix) error {
	return fmt.Errorf("prefix %v: %w", p, syscall.EINVAL)
}
