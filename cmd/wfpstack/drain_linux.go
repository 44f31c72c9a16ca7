package main

import (
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainStall is how long a session waits for a receiver that takes nothing of what the programs sent before they ended; for
	// one that takes it slowly it waits as long as a kernel would.
	drainStall = 30 * time.Second
	// drainPause is the time between two looks, drainLongPause that between two looks at all connections.
	drainPause, drainLongPause = time.Millisecond, 5 * time.Millisecond
	// drainQuiet is how many looks without a packet say that a flow which is still open waits for the other side only.
	drainQuiet = 100
)

// backlog is what a host connection has yet to deliver.
type backlog struct {
	remote netip.AddrPort
	bytes  int
}

// drainer waits until what ended programs sent has left.
type drainer struct {
	done   <-chan struct{} // nothing leaves any more
	look   func() (packets uint64, flows int)
	unsent func() []backlog
	stall  time.Duration
}

// drain waits until what ended programs sent has left: their kernel goes on sending after they are gone, and so must we. It says
// what could not be delivered.
func (s *session) drain() {
	d := drainer{
		done: s.gateway.Done(), unsent: unsent, stall: drainStall,
		look: func() (uint64, int) { now := s.gateway.Stats(); return now.PacketsOut + now.PacketsIn, int(now.Flows) },
	}
	for _, b := range d.run() {
		s.config.logger.Error(strconv.Itoa(b.bytes) + " bytes not delivered to " + b.remote.String() + ": it took nothing for " + drainStall.String())
	}
}

// run returns what was left when nothing moved any more. The device says nothing about what waits in it, so that silence counts
// as its end.
func (d *drainer) run() []backlog {
	packets, quiet, waiting, moved := uint64(0), 0, -1, time.Now()
	pause := drainPause
	for {
		select {
		case <-d.done:
			return nil
		case <-time.After(pause):
		}
		now, flows := d.look()
		if now != packets {
			packets, quiet, pause, moved = now, 0, drainPause, time.Now()
			continue
		}
		quiet++
		if flows == 0 && quiet >= 2 {
			return nil
		}
		if quiet < drainQuiet {
			continue
		}
		pause = drainLongPause
		left := d.unsent()
		sum := 0
		for _, b := range left {
			sum += b.bytes
		}
		switch {
		case sum == 0:
			return nil
		case sum != waiting:
			waiting, moved = sum, time.Now()
		case time.Since(moved) >= d.stall:
			return left
		}
	}
}

// unsent is what the host's kernel has yet to deliver for the TCP connections of this process. While the gateway holds back
// bytes because a connection is full, that is not nothing.
func unsent() []backlog {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	var all []backlog
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// A descriptor that was closed meanwhile, or is no socket, answers with an error.
		if proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || proto != unix.IPPROTO_TCP {
			continue
		}
		if n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ); err == nil && n > 0 {
			all = append(all, backlog{remoteOf(fd), n})
		}
	}
	return all
}

// remoteOf returns where a socket is connected to, the zero AddrPort where it is not.
func remoteOf(fd int) netip.AddrPort {
	sa, err := unix.Getpeername(fd)
	if err != nil {
		return netip.AddrPort{}
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}
