package main

import (
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainTime bounds how long a session waits for what the programs sent before they ended; a kernel would try for longer.
	drainTime = 30 * time.Second
	// drainPause is the time between two looks.
	drainPause = time.Millisecond
	// drainQuiet is how many looks without a packet say that a flow which is still open waits for the other side only.
	drainQuiet = 100
)

// drain waits until what ended programs sent has left: their kernel goes on sending after they are gone, and so must we. The
// device says nothing about what waits in it, so that silence counts as its end.
func (s *session) drain() {
	deadline := time.Now().Add(drainTime)
	packets, quiet := uint64(0), 0
	for time.Now().Before(deadline) {
		select {
		case <-s.gateway.Done():
			return
		case <-time.After(drainPause):
		}
		now := s.gateway.Stats()
		if sum := now.PacketsOut + now.PacketsIn; sum != packets {
			packets, quiet = sum, 0
			continue
		}
		quiet++
		if now.Flows == 0 && quiet >= 2 || quiet >= drainQuiet && unsent() == 0 {
			return
		}
	}
}

// unsent is how much the host's kernel has yet to deliver for the TCP connections of this process. While the gateway holds back
// bytes because a connection is full, that is not zero. Units: bytes.
func unsent() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	sum := 0
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// A descriptor that was closed meanwhile, or is no socket, answers with an error.
		if proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || proto != unix.IPPROTO_TCP {
			continue
		}
		if n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ); err == nil {
			sum += n
		}
	}
	return sum
}
