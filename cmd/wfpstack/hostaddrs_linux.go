package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/gaissmai/bart"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpAttempts is how often the routing table is read where it changed while it was being read.
const dumpAttempts = 8

// hostAddresses is what the host delivers to itself: the routing table "local", which holds more than the addresses of the
// interfaces: prefixes that an administrator made local, all of the prefix of an address on lo, anycast and broadcast.
// Interfaces are listed too, for a machine whose rules leave that table out.
func hostAddresses() (*bart.Lite, error) {
	own := new(bart.Lite)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				addr = addr.Unmap()
				own.Insert(netip.PrefixFrom(addr, addr.BitLen()))
			}
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := addLocalRoutes(own, family); err != nil {
			return nil, err
		}
	}
	return own, nil
}

// addLocalRoutes inserts what one family's table "local" leads to the host.
func addLocalRoutes(own *bart.Lite, family int) error {
	var err error
	for range dumpAttempts {
		var routes []netlink.Route
		routes, err = netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a kernel without the family
		}
		for i := range routes {
			if p, ok := ownPrefix(&routes[i], family); ok {
				own.Insert(p)
			}
		}
		break
	}
	if err != nil {
		return fmt.Errorf("read the host's local routes: %w", err)
	}
	return nil
}

// ownPrefix returns what a route leads to the host, if it does.
func ownPrefix(r *netlink.Route, family int) (netip.Prefix, bool) {
	switch r.Type {
	case unix.RTN_LOCAL, unix.RTN_ANYCAST, unix.RTN_BROADCAST:
	default:
		return netip.Prefix{}, false
	}
	if r.Dst == nil { // everything
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	addr, ok := netip.AddrFromSlice(r.Dst.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	if family == netlink.FAMILY_V4 {
		addr = addr.Unmap()
	}
	bits, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(addr, bits).Masked(), true
}

// subscribeAddresses opens a netlink socket that tells of every change of an address and of a route.
func subscribeAddresses() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	groups := uint32(unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink:addresses"), nil
}

// awaitAddressChange reads all that waits, and returns when something in it touched what hostAddresses reads. A router's other
// routes, which may change a hundred times a second, do not.
//
// Errors: those of the closed file.
func awaitAddressChange(changes *os.File) error {
	conn, err := changes.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	relevant := false
	var readErr error
	err = conn.Read(func(fd uintptr) bool {
		for {
			n, err := unix.Read(int(fd), buf)
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				return relevant
			case err == unix.ENOBUFS: // some were lost: one of them may have been ours
				relevant = true
			case err != nil:
				readErr = err
				return true
			default:
				relevant = relevant || touchesLocal(buf[:n])
			}
		}
	})
	return errors.Join(err, readErr)
}

// touchesLocal reports whether one of some netlink messages is about an address, or about a route of the table "local".
//
// Source: rtnetlink(7).
func touchesLocal(b []byte) bool {
	const tableOffset = unix.SizeofNlMsghdr + 4 // rtmsg: family, two lengths, tos, table
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return true // not understood: look
		}
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			if size <= tableOffset || b[tableOffset] == unix.RT_TABLE_LOCAL {
				return true
			}
		default:
			return true
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false
}
