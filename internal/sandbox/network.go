package sandbox

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"github.com/wfpstack/wfpstack/internal/machine"
	"github.com/wfpstack/wfpstack/tun"
	"golang.org/x/sys/unix"
)

// network is what init makes inside for the parent.
type network struct {
	handover *tun.Handover
	diag     int
	ipv6     bool
	warnings []string
}

// fds returns the descriptors in the order that readyBody describes.
func (n *network) fds() []int {
	var fds []int
	for _, f := range n.handover.Files() {
		fds = append(fds, int(f.Fd()))
	}
	return append(fds, n.diag)
}

// close gives the descriptors back.
func (n *network) close() {
	_ = n.handover.Close()
	_ = unix.Close(n.diag)
}

// makeNetwork sets up the network namespace: loopback, the device with its addresses and routes, the settings. sys is a
// descriptor of /proc/sys/net.
func makeNetwork(s *spec, sys int) (*network, error) {
	n := &network{ipv6: hasIPv6(sys)}
	n.settings(sys)
	if err := loopbackUp(); err != nil {
		return nil, failed(failSetup, "set the loopback interface up", err)
	}
	// Persistent, so that closing it does not wait for the kernel to take it down (20 ms and more of every exec): it ends
	// with its namespace, which ends with us.
	h, err := tun.OpenForHandover(tun.Options{Name: s.TUNName, MTU: s.MTU, Queues: s.Queues, Persist: true})
	if err != nil {
		f := failed(failSetup, "make the device "+s.TUNName, err)
		if oe, ok := errors.AsType[*tun.OpError](err); ok {
			f.Text, f.Cure = oe.Err.Error(), oe.Cure
		}
		// The same words as `wfpstack doctor` has for it.
		if cause, cure := machine.TUNTrouble(f.Errno); cause != "" {
			f.Text, f.Cure = cause+": "+f.Text, cure
		}
		return nil, f
	}
	n.handover = h
	addresses := []netip.Prefix{s.Address4}
	if n.ipv6 {
		addresses = append(addresses, s.Address6)
	} else {
		n.warnings = append(n.warnings, "this kernel has no IPv6: the command gets IPv4 only")
	}
	if err := tun.Configure(h.Name, tun.Config{Addresses: addresses, Default: true, Up: true}); err != nil {
		_ = h.Close()
		return nil, failed(failSetup, "set up the device "+s.TUNName, err)
	}
	// A netlink socket belongs to the network namespace that it was made in, wherever it is used.
	n.diag, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		_ = h.Close()
		return nil, failed(failSetup, "open the socket diagnosis", err)
	}
	return n, nil
}

// hasIPv6 reports whether the kernel has IPv6, by its settings.
func hasIPv6(sys int) bool {
	return unix.Faccessat(sys, "ipv6/conf/all", unix.F_OK, 0) == nil
}

// settings writes the namespace's own settings. A machine that refuses them (a container's read-only /proc/sys) costs a
// convenience each, and a warning.
func (n *network) settings(sys int) {
	// Ping sockets for every group: the host's range is often empty, and there is no raw socket to be had inside. Where
	// only the caller's own group is mapped the kernel takes no other.
	err := writeSetting(sys, "ipv4/ping_group_range", "0 2147483647")
	if err != nil {
		gid := strconv.Itoa(os.Getgid())
		err = writeSetting(sys, "ipv4/ping_group_range", gid+" "+gid)
	}
	if err != nil {
		n.warnings = append(n.warnings, fmt.Sprintf("ping will not run inside: %v", err))
	}
	if err := writeSetting(sys, "ipv4/ip_unprivileged_port_start", "0"); err != nil {
		n.warnings = append(n.warnings, fmt.Sprintf("ports below 1024 cannot be bound inside: %v", err))
	}
	if !n.ipv6 {
		return
	}
	// Nobody but the stack is on the link: no router to ask for, no duplicate to look for, no second address.
	for _, scope := range []string{"all", "default"} {
		for _, kv := range [][2]string{
			{"disable_ipv6", "0"}, {"accept_ra", "0"}, {"accept_dad", "0"}, {"addr_gen_mode", "1"},
			{"router_solicitations", "0"}, {"use_tempaddr", "0"},
		} {
			if err := writeSetting(sys, "ipv6/conf/"+scope+"/"+kv[0], kv[1]); err != nil {
				n.warnings = append(n.warnings, err.Error())
				return // the next would fail as well
			}
		}
	}
}

// writeSetting writes one file below /proc/sys/net, whose descriptor is sys.
func writeSetting(sys int, name, value string) error {
	fd, err := unix.Openat(sys, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("write /proc/sys/net/%s: %w", name, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return fmt.Errorf("write %q to /proc/sys/net/%s: %w", value, name, err)
	}
	return nil
}

// loopbackUp sets lo up.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
