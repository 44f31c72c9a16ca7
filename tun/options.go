package tun

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// Options say which device Open makes or takes over.
type Options struct {
	// Name is the interface name, up to 15 bytes. Empty: the kernel chooses one (tun0, tun1, …); a "%d" at its end is
	// replaced by the first free number.
	Name string
	// MTU is set on the interface; 0 leaves it as it is (a new one has 1500).
	//
	// Units: bytes, 68 to 65535; IPv6 needs 1280.
	MTU int
	// Queues is the number of queues; 0 is 1. More than one makes a multi-queue device, in which the kernel keeps a flow
	// on the queue that was last written with it.
	Queues int
	// Persist leaves the interface behind when the device is closed.
	Persist bool
	// NoOffload takes the portable path: whole packets with complete checksums, one queue.
	NoOffload bool
	// TxQueueLen is how many packets wait in the kernel for us; 0 is DefaultTxQueueLen, below 0 leaves it as it is. Where
	// the right to set it is missing it stays as it is.
	TxQueueLen int
}

// AdoptOptions describe a device whose descriptors another process opened.
type AdoptOptions struct {
	// Name is the interface name; empty: ask the device.
	Name string
	// MTU is the interface's MTU. With a Monitor, or 0, it is asked for.
	//
	// Units: bytes.
	MTU int
	// Queues are the device's descriptors, one per queue, as a Handover has them.
	//
	// Ownership: takes.
	Queues []*os.File
	// Monitor is a NETLINK_ROUTE socket bound to RTMGRP_LINK, made in the device's network namespace. Without it the MTU
	// is the one given, and of the events only EventGone comes, when a read or write meets the deletion.
	//
	// Ownership: takes.
	Monitor *os.File
}

// Config says how an interface is to be set up. The zero value changes nothing.
type Config struct {
	// MTU is set unless 0.
	//
	// Units: bytes.
	MTU int
	// TxQueueLen is set unless 0.
	//
	// Units: packets.
	TxQueueLen int
	// Addresses are added to the interface, with their prefixes as routes to it. IPv6 addresses are usable at once:
	// nobody else is on this link, so duplicate address detection is left out.
	Addresses []netip.Prefix
	// Routes are sent into the interface.
	Routes []netip.Prefix
	// Default adds the default route of each family that has an address here.
	Default bool
	// Up sets the interface up, which routes need.
	Up bool
}

// DefaultTxQueueLen is the queue length of the interfaces we make. The kernel's 500 overflow when a burst of small
// datagrams meets a stack that is busy for a millisecond.
//
// Units: packets.
const DefaultTxQueueLen = 5000

// MaxQueues is how many queues a device may have here; more than the processors of a large machine help nobody.
const MaxQueues = 64

// Bounds of an interface's MTU. Source: linux/if_tun.h, RFC 791.
const (
	minMTU = 68
	maxMTU = 65535
)

// defaultMTU is what a TUN device has when it is made.
const defaultMTU = 1500

// maxName is the longest interface name (IFNAMSIZ - 1).
//
// Units: bytes.
const maxName = 15

// check returns what is wrong with o.
func (o *Options) check() error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if o.MTU != 0 && (o.MTU < minMTU || o.MTU > maxMTU) {
		return fmt.Errorf("%w: MTU %d is not in %d…%d", ErrOption, o.MTU, minMTU, maxMTU)
	}
	if o.Queues < 0 || o.Queues > MaxQueues {
		return fmt.Errorf("%w: %d queues are not in 1…%d", ErrOption, o.Queues, MaxQueues)
	}
	if o.NoOffload && o.Queues > 1 {
		return fmt.Errorf("%w: the portable path has one queue, not %d", ErrOption, o.Queues)
	}
	return nil
}

// checkName returns what is wrong with an interface name; empty is right.
func checkName(name string) error {
	switch {
	case len(name) > maxName:
		return fmt.Errorf("%w %q: %d bytes, limit %d", ErrName, name, len(name), maxName)
	case name == "." || name == "..":
		return fmt.Errorf("%w %q: reserved", ErrName, name)
	}
	// The kernel's rule (dev_valid_name), and what would be a control character on a terminal.
	for i := range len(name) {
		switch c := name[i]; {
		case c == '/' || c == ':' || c <= ' ' || c >= 0x7f:
			return fmt.Errorf("%w %q: character %q", ErrName, name, c)
		case c == '%' && (name[i:] != "%d" || i == 0):
			return fmt.Errorf("%w %q: %% is for a %%d at the end only", ErrName, name)
		}
	}
	return nil
}

// isPattern reports whether the kernel is to complete name.
func isPattern(name string) bool { return name == "" || strings.HasSuffix(name, "%d") }
