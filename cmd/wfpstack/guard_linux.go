package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/layers"
)

// guard refuses what stands for the host itself, and the metadata services of clouds, where the program behind the stack would
// find what only the host may know.
type guard struct {
	hostLoopback bool
	stack        [2]netip.Addr // the stack's own addresses
	// own are the addresses of the host's interfaces; a set is never changed, but replaced by the follower.
	own     atomic.Pointer[map[netip.Addr]struct{}]
	changes *os.File
	done    sync.WaitGroup
}

// Addresses of metadata services.
var (
	metadata4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, 0, 0}), 16)
	metadata6 = netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x0e, 3: 0xc2, 14: 0x02, 15: 0x54})
)

// newGuard makes a guard that follows the addresses of the host's interfaces.
//
// Ownership: gives the guard, which the caller closes.
func newGuard(hostLoopback bool, stack4, stack6 netip.Addr) (*guard, error) {
	g := &guard{hostLoopback: hostLoopback, stack: [2]netip.Addr{stack4, stack6}}
	g.own.Store(&map[netip.Addr]struct{}{})
	if hostLoopback {
		return g, nil // nothing of the host's is refused
	}
	// Subscribe first, then read: no change falls between.
	if err := g.subscribe(); err != nil {
		return nil, fmt.Errorf("follow the host's addresses: %w", err)
	}
	if err := g.refresh(); err != nil {
		return nil, errors.Join(err, g.changes.Close())
	}
	g.done.Add(1)
	go g.follow() // owner: g; Close stops it and waits
	return g, nil
}

// subscribe opens a netlink socket that tells of every change of an address.
func (g *guard) subscribe() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	groups := uint32(unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return err
	}
	g.changes = os.NewFile(uintptr(fd), "netlink:addresses")
	return nil
}

// refresh reads the host's addresses.
func (g *guard) refresh() error {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list the host's addresses: %w", err)
	}
	own := make(map[netip.Addr]struct{}, len(addrs))
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				own[addr.Unmap()] = struct{}{}
			}
		}
	}
	g.own.Store(&own)
	return nil
}

// follow reads the addresses again after each change.
func (g *guard) follow() {
	defer g.done.Done()
	buf := make([]byte, 16<<10)
	for {
		// What the message says does not matter, nor that some were lost (ENOBUFS).
		if _, err := g.changes.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		_ = g.refresh() // the old set stays: refusing too much is the lesser evil
	}
}

// Close stops following.
func (g *guard) Close() error {
	if g.changes == nil {
		return nil
	}
	err := g.changes.Close()
	g.done.Wait()
	return err
}

// Check implements gateway.Guard.
//
// Hot path: once a connection; no lock, no allocation.
func (g *guard) Check(remote netip.Addr, permitted bool) layers.Reason {
	a := remote.Unmap().WithZone("")
	if metadata4.Contains(a) || a == metadata6 {
		if permitted {
			return layers.ReasonNone
		}
		return layers.ReasonMetadataGuard
	}
	if g.hostLoopback {
		return layers.ReasonNone
	}
	_, own := (*g.own.Load())[a]
	if own || a.IsLoopback() || a.IsUnspecified() || a == g.stack[0] || a == g.stack[1] || (a.Is4() && a.As4()[0] == 0) {
		return layers.ReasonLoopbackGuard
	}
	return layers.ReasonNone
}
