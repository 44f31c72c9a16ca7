package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netnsDir is where ip-netns(8) names network namespaces.
const netnsDir = "/run/netns"

// netns is a network namespace; nil is our own.
type netns struct{ file *os.File }

// openNetns opens a namespace by its name or its path.
func openNetns(name string) (*netns, error) {
	if name == "" {
		return nil, nil
	}
	path, named := name, !strings.ContainsRune(name, '/')
	if named {
		path = filepath.Join(netnsDir, name)
	}
	f, err := os.Open(path)
	switch {
	case named && errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("--netns %s: there is no such network namespace; make it: sudo ip netns add %s", name, name)
	case err != nil:
		return nil, fmt.Errorf("--netns %s: %w", name, err)
	}
	return &netns{f}, nil
}

// do runs fn on a thread of the namespace, which ends with it: a thread that could not be brought back must not be used again.
func (n *netns) do(fn func() error) error {
	if n == nil {
		return fn()
	}
	result := make(chan error, 1) // one result
	go func() {                   // owner: the caller, who waits for the result
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The process's first thread never ends: it would keep the namespace. While we hold it, another goroutine
			// gets another thread.
			defer runtime.UnlockOSThread()
			result <- n.do(fn)
			return
		}
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("enter network namespace %s: %w (CAP_SYS_ADMIN is needed: run as root)", n.file.Name(), err)
			return
		}
		result <- fn()
	}()
	return <-result
}

// Close closes the descriptor.
func (n *netns) Close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}

// addressesOf lists the addresses of an interface that are no link-local ones, none where there is no such interface.
func addressesOf(name string) ([]netip.Prefix, error) {
	link, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", name, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	var out []netip.Prefix
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); ok && !ip.IsLinkLocalUnicast() {
			ones, _ := a.Mask.Size()
			out = append(out, netip.PrefixFrom(ip, ones))
		}
	}
	return out, nil
}
