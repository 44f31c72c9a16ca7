package host

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// errClosing is what operations of a closing stack return; it is net.ErrClosed.
var errClosing = fmt.Errorf("the stack is closing: %w", net.ErrClosed)

// sysError gives an error number the name of the system call that a program would have made, as package net does.
func sysError(call string, err error) error {
	var n syscall.Errno
	if errors.As(err, &n) {
		var b *BlockedError
		if errors.As(err, &b) {
			return err
		}
		return os.NewSyscallError(call, err)
	}
	return err
}

// netError translates an error of netstack into one for the program.
func netError(call string, err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrClosedForReceive:
		return io.EOF
	default:
		return sysError(call, conv.Errno(err))
	}
}

// opError is the error of an operation; io.EOF stays what it is.
func opError(op, network string, local, remote net.Addr, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: network, Source: local, Addr: remote, Err: err}
}

// tcpAddr and udpAddr return an address as package net has it; nil for an invalid one.
func tcpAddr(a netip.AddrPort) net.Addr {
	if !a.IsValid() {
		return nil
	}
	return net.TCPAddrFromAddrPort(a)
}

func udpAddr(a netip.AddrPort) net.Addr {
	if !a.IsValid() {
		return nil
	}
	return net.UDPAddrFromAddrPort(a)
}
