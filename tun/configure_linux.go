package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Configure sets up the interface called name in the calling thread's network namespace. What is already so stays so:
// it may be called again, and for a device that was taken over.
//
// Errors: *OpError with a cure; ErrName, ErrOption, ErrNotFound, ErrPermission.
func Configure(name string, c Config) error {
	if err := configure(name, c); err != nil {
		e := &OpError{Op: "configure", Device: name, Err: err}
		switch {
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			e.Err = also(ErrPermission, err)
			e.Cure = "CAP_NET_ADMIN is missing: run as root, or let wfpstack make its own namespace (wfpstack exec)"
		case errors.Is(err, unix.ENETDOWN):
			e.Cure = fmt.Sprintf("routes need the interface up: sudo ip link set %s up", name)
		}
		if noIPv6(name, err) {
			e.Err, e.Cure = err, fmt.Sprintf("IPv6 is off here: sudo sysctl net.ipv6.conf.%s.disable_ipv6=0", name)
		}
		return e
	}
	return nil
}

// noIPv6 reports whether err looks like that of a system where IPv6 is off.
func noIPv6(name string, err error) bool {
	if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return false
	}
	b, readErr := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
	return errors.Is(readErr, os.ErrNotExist) || len(b) > 0 && b[0] == '1'
}

// configure is Configure with a bare error.
func configure(name string, c Config) error {
	if name == "" {
		return fmt.Errorf("%w: empty", ErrName)
	}
	if err := checkName(name); err != nil {
		return err
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return fmt.Errorf("%w: MTU %d is not in %d…%d", ErrOption, c.MTU, minMTU, maxMTU)
	}
	found, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("look up: %w", err)
	}
	if c.MTU != 0 && c.MTU != found.Attrs().MTU {
		if err := netlink.LinkSetMTU(found, c.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", c.MTU, err)
		}
	}
	if c.TxQueueLen > 0 && c.TxQueueLen != found.Attrs().TxQLen {
		if err := netlink.LinkSetTxQLen(found, c.TxQueueLen); err != nil {
			return fmt.Errorf("set queue length %d: %w", c.TxQueueLen, err)
		}
	}
	for _, a := range c.Addresses {
		if err := addAddress(found, a); err != nil {
			return fmt.Errorf("add address %v: %w", a, err)
		}
	}
	if c.Up && found.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(found); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
	}
	for _, r := range c.routes() {
		if err := addRoute(found, r); err != nil {
			return fmt.Errorf("add route %v: %w", r, err)
		}
	}
	if c.Up || found.Attrs().Flags&net.FlagUp != 0 {
		return awaitAddresses(c.Addresses)
	}
	return nil
}

// usableTimeout bounds the wait for an address to become usable. It takes a turn of a kernel worker, below 1 ms.
const usableTimeout = 2 * time.Second

// awaitAddresses returns when packets to the IPv6 addresses are delivered. The kernel installs their local routes from a
// worker, also without duplicate address detection; until then it drops what arrives, and the first connection through
// the device would wait a second for its SYN to be sent again.
func awaitAddresses(addrs []netip.Prefix) error {
	pause := 50 * time.Microsecond
	for deadline := time.Now().Add(usableTimeout); len(addrs) > 0; {
		a := addrs[0].Addr()
		if a.Is4() || isLocal(a) {
			addrs = addrs[1:]
			continue
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("address %v is not usable after %v: %w", a, usableTimeout, os.ErrDeadlineExceeded)
		}
		time.Sleep(pause) // the route's own notification would need a second socket and a goroutine
		pause = min(2*pause, 10*time.Millisecond)
	}
	return nil
}

// isLocal reports whether the kernel delivers packets to a.
func isLocal(a netip.Addr) bool {
	routes, err := netlink.RouteGet(a.AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}

// routes returns the routes wanted, default routes included.
func (c *Config) routes() []netip.Prefix {
	routes := append([]netip.Prefix(nil), c.Routes...)
	if !c.Default {
		return routes
	}
	v4, v6 := false, false
	for _, a := range c.Addresses {
		v4 = v4 || a.Addr().Is4()
		v6 = v6 || a.Addr().Is6()
	}
	if v4 {
		routes = append(routes, netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	if v6 {
		routes = append(routes, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	return routes
}

// addAddress adds a to the interface, or leaves it if it is there.
func addAddress(l netlink.Link, a netip.Prefix) error {
	if !a.IsValid() || a.Addr().Is4In6() {
		return fmt.Errorf("%w: not an address with a prefix length", ErrOption)
	}
	addr := &netlink.Addr{IPNet: ipNet(a)}
	if a.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(l, addr); err != nil && !errors.Is(err, syscall.EEXIST) {
		return err
	}
	return nil
}

// addRoute sends r into the interface, or leaves it if it is so.
func addRoute(l netlink.Link, r netip.Prefix) error {
	if !r.IsValid() || r.Addr().Is4In6() {
		return fmt.Errorf("%w: not a prefix", ErrOption)
	}
	route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(r.Masked())}
	if r.Addr().Is4() {
		route.Scope = netlink.SCOPE_LINK
	}
	err := netlink.RouteAdd(route)
	if !errors.Is(err, syscall.EEXIST) {
		return err
	}
	// Never replace: a default route that is there may be the one this program reaches the world by.
	there, listErr := netlink.RouteListFiltered(netlink.FAMILY_ALL, route, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
	if listErr == nil && len(there) > 0 {
		return nil
	}
	return fmt.Errorf("another interface has it; remove that first or route narrower prefixes (0.0.0.0/1 and 128.0.0.0/1): %w", err)
}

// ipNet returns p as netlink wants it.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
