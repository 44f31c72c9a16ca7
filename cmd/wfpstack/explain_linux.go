package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/wfpstack/wfpstack/internal/identity"
	"github.com/wfpstack/wfpstack/stack/gateway"
)

// explainGateway adds who or what stands in the way, and the cure, to what the gateway cannot do.
func explainGateway(err error, publish []gateway.Publish) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w; %s: choose another port, or end that program", err, holderOf(publish))
	case errors.Is(err, syscall.EACCES) && len(publish) > 0:
		return fmt.Errorf("%w; ports below net.ipv4.ip_unprivileged_port_start need root: choose one from 1024 on", err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w; give an address of this machine, or none for all", err)
	default:
		return fmt.Errorf("start the gateway: %w", err)
	}
}

// holderTime bounds the search for the program that has a port.
const holderTime = time.Second

// holderOf names the program that has one of the ports.
func holderOf(publish []gateway.Publish) string {
	diag, err := identity.OpenHere()
	if err != nil {
		return "another program has it"
	}
	defer diag.Close()
	for _, p := range publish {
		proto := identity.TCP
		if p.UDP {
			proto = identity.UDP
		}
		for _, at := range bindable(p.Host) {
			far := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
			if at.Addr().Is6() {
				far = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
			}
			sock, err := diag.Lookup(proto, at, far)
			// The gateway has closed its own by now, so that what is found is somebody else's.
			if err == nil && (p.UDP || sock.State == identity.Listen) {
				return fmt.Sprintf("port %d is taken by %s", p.Host.Port(), processOf(sock))
			}
		}
	}
	return "another program has it (ss -ltunp tells which)"
}

// bindable lists the addresses at which another program's port would be in the way of ours.
func bindable(host netip.AddrPort) []netip.AddrPort {
	out := []netip.AddrPort{host}
	if !host.Addr().IsUnspecified() {
		return out
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return out
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap().Is4() == host.Addr().Is4() {
				out = append(out, netip.AddrPortFrom(ip.Unmap(), host.Port()))
			}
		}
	}
	return out
}

// processOf names the process that holds a socket.
func processOf(sock identity.Socket) string {
	owners := identity.NewOwners(identity.OwnersOptions{})
	defer owners.Close()
	ctx, cancel := context.WithTimeout(context.Background(), holderTime)
	defer cancel()
	p, err := owners.Owner(ctx, sock)
	if err != nil {
		return fmt.Sprintf("a program of uid %d", sock.UID)
	}
	return fmt.Sprintf("%q (process %d)", p.Comm, p.PID)
}
