package tun

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// nodePath is the device node that makes TUN devices.
const nodePath = "/dev/net/tun"

// The offloads of TUNSETOFFLOAD. Source: linux/if_tun.h.
const (
	tunCsum = 0x01
	tunTSO4 = 0x02
	tunTSO6 = 0x04
)

// openNode opens the device node, without an interface yet.
func openNode() (int, error) {
	for {
		fd, err := unix.Open(nodePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// attach opens one more queue of the interface called name.
func attach(name string, flags uint16) (int, error) {
	fd, err := openNode()
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", nodePath, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("%w: %w", ErrName, err)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("attach (TUNSETIFF): %w", err)
	}
	return fd, nil
}

// ifOf returns the name and the flags of the interface that fd is attached to.
//
// Errors: ErrGone if it is attached to none (any more).
func ifOf(fd int) (name string, flags uint16, err error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return "", 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		if err == unix.EBADFD {
			return "", 0, fmt.Errorf("%w: %w", ErrGone, err)
		}
		return "", 0, fmt.Errorf("not a TUN descriptor (TUNGETIFF): %w", err)
	}
	return ifr.Name(), ifr.Uint16(), nil
}

// hasVirtioHeaders reports whether the kernel's TUN has virtio headers.
func hasVirtioHeaders() (bool, error) {
	fd, err := openNode()
	if err != nil {
		return false, fmt.Errorf("open %s: %w", nodePath, err)
	}
	defer unix.Close(fd)
	features, err := unix.IoctlGetInt(fd, unix.TUNGETFEATURES)
	if err != nil {
		return false, nil // so old that it cannot say: certainly none
	}
	return features&unix.IFF_VNET_HDR != 0, nil
}

// setOffloads sets the length of the virtio header and the greatest set of offloads that the kernel takes.
func setOffloads(fd int) (Capabilities, error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderLen); err != nil {
		return Capabilities{}, fmt.Errorf("set header length (TUNSETVNETHDRSZ): %w", err)
	}
	for _, try := range []struct {
		bits int
		caps Capabilities
	}{
		{tunCsum | tunTSO4 | tunTSO6, Capabilities{TSO4: true, TSO6: true, Checksum: true}},
		{tunCsum, Capabilities{Checksum: true}},
		{0, Capabilities{}},
	} {
		// The argument is the number itself, not a pointer to it.
		err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, try.bits)
		if err == nil {
			return try.caps, nil
		}
		if err != unix.EINVAL {
			return Capabilities{}, fmt.Errorf("set offloads (TUNSETOFFLOAD): %w", err)
		}
	}
	return Capabilities{}, fmt.Errorf("set offloads (TUNSETOFFLOAD): %w", ErrUnsupported)
}

// setPersist says whether the interface stays when its last descriptor is closed.
func setPersist(fd int, persist bool) error {
	value := 0
	if persist {
		value = 1
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, value); err != nil {
		return fmt.Errorf("set persistence (TUNSETPERSIST): %w", err)
	}
	return nil
}
