package tun

import (
	"errors"
	"fmt"
	"io/fs"
)

// What a queue's calls answer. Each names the kernel's error numbers it stands for on a TUN device (Linux,
// drivers/net/tun.c); they are compared with errors.Is.
var (
	// ErrWouldBlock says that nothing waits to be read, or that the queue written to is full (EAGAIN).
	ErrWouldBlock = errors.New("tun: would block")
	// ErrClosed says that Close was called. It is also fs.ErrClosed.
	ErrClosed = fmt.Errorf("tun: device: %w", fs.ErrClosed)
	// ErrGone says that the interface was deleted, as by `ip link del` (EBADFD; EFAULT on a read under way; ENODEV).
	ErrGone = errors.New("tun: device is gone (the interface was deleted)")
	// ErrDown says that the interface is down: it takes no packets (EIO). `ip link set NAME up` ends it.
	ErrDown = errors.New("tun: device is down")
	// ErrTooLong says that a packet is longer than MaxPacket or than the kernel takes (EMSGSIZE, E2BIG).
	ErrTooLong = fmt.Errorf("tun: packet too long (limit %d bytes)", MaxPacket)
	// ErrShort says that a packet to write is shorter than an IP header.
	ErrShort = fmt.Errorf("tun: packet too short (least %d bytes)", MinPacket)
	// ErrOffload says that a packet's Offload points outside the packet, contradicts itself, or asks for work that the
	// device does not do (see Device.Offloads).
	ErrOffload = errors.New("tun: offload header does not fit the packet or the device")
	// ErrInvalid says that the kernel refused the packet (EINVAL): it is neither IPv4 nor IPv6, or its offload header
	// disagrees with its bytes.
	ErrInvalid = errors.New("tun: the kernel refused the packet")
	// ErrNoBuffers says that the kernel is out of memory for packets (ENOBUFS, ENOMEM). It is also ErrWouldBlock: later
	// it may work.
	ErrNoBuffers = fmt.Errorf("tun: no kernel memory for packets: %w", ErrWouldBlock)
	// ErrIO is any other error of the descriptor; the error number is wrapped beside it.
	ErrIO = errors.New("tun: input/output error")
)

// What Open, Adopt and Configure answer, wrapped in an *OpError that says which device, the cause, and the cure.
var (
	// ErrName says that the interface name cannot be one.
	ErrName = errors.New("invalid interface name")
	// ErrOption says that an option is out of its bounds.
	ErrOption = errors.New("invalid option")
	// ErrInUse says that another process holds the device.
	ErrInUse = errors.New("device is in use by another process")
	// ErrPermission says that a right is missing: to open /dev/net/tun, or CAP_NET_ADMIN. It is also fs.ErrPermission.
	ErrPermission = fmt.Errorf("missing right: %w", fs.ErrPermission)
	// ErrNoTUN says that this machine has no TUN: the device node or the kernel module is missing.
	ErrNoTUN = errors.New("no TUN on this machine")
	// ErrKind says that an interface of that name exists and is not a TUN device that can be taken over.
	ErrKind = errors.New("existing interface cannot be taken over")
	// ErrNotFound says that there is no interface of that name.
	ErrNotFound = errors.New("no such interface")
	// ErrUnsupported says that this system or kernel cannot do it.
	ErrUnsupported = errors.ErrUnsupported
)

// OpError says what could not be done with which device, why, and what helps.
type OpError struct {
	// Op is what was tried: "open", "adopt", "configure".
	Op string
	// Device is the interface name, empty where the kernel was to choose it.
	Device string
	// Err is the cause; it wraps one of the sentinels above where one applies, and the error number.
	Err error
	// Cure is what to do about it, with the command where there is one; empty where we know none.
	Cure string
}

// Error returns cause and cure in one line.
func (e *OpError) Error() string {
	name := e.Device
	if name == "" {
		name = "device"
	}
	if e.Cure == "" {
		return fmt.Sprintf("tun: %s %s: %v", e.Op, name, e.Err)
	}
	return fmt.Sprintf("tun: %s %s: %v (%s)", e.Op, name, e.Err, e.Cure)
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }
