package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// figures are what one test measured, by name.
type figures map[string]float64

// client is one run of the load generator in the client's namespace.
type client struct {
	server  netip.Addr
	control string
	time    time.Duration
}

func (c *client) target(port uint16) *target {
	t := newTarget(netip.AddrPortFrom(c.server, port))
	return &t
}

// open connects to the server for a purpose.
func (c *client) open(mode byte) (int, error) {
	fd, err := dial(c.target(portTCP), unix.SOCK_STREAM)
	if err != nil {
		return -1, fmt.Errorf("connect: %w", err)
	}
	if err := writeFull(fd, []byte{mode}); err != nil {
		rawClose(fd)
		return -1, fmt.Errorf("write: %w", err)
	}
	return fd, nil
}

// each runs f on n threads, and returns the first error.
func each(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			runtime.LockOSThread()
			errs[i] = f(i)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// first is how long the first connection through a fresh gateway takes, until its first byte is back.
func (c *client) first() (figures, error) {
	start := time.Now()
	fd, err := c.open(modeEcho)
	if err != nil {
		return nil, err
	}
	var b [1]byte
	if _, err := readFull(fd, b[:]); err != nil {
		return nil, err
	}
	return figures{"ms": float64(time.Since(start).Microseconds()) / 1e3}, nil
}

// roundTrips times one call after the other until the time is over.
func (c *client) roundTrips(call func() error) (figures, error) {
	took := make([]int64, 0, 1<<20)
	for range 200 {
		if err := call(); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	last := start
	for last.Sub(start) < c.time && len(took) < cap(took) {
		if err := call(); err != nil {
			return nil, err
		}
		now := time.Now()
		took = append(took, int64(now.Sub(last)))
		last = now
	}
	n := float64(len(took))
	slices.Sort(took)
	return figures{"p50_us": percentile(took, 0.5) / 1e3, "p99_us": percentile(took, 0.99) / 1e3, "per_s": n / last.Sub(start).Seconds()}, nil
}

func (c *client) rr() (figures, error) {
	fd, err := c.open(modeEcho)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 64)
	if _, err := readFull(fd, buf[:1]); err != nil {
		return nil, err
	}
	return c.roundTrips(func() error {
		if err := writeFull(fd, buf); err != nil {
			return err
		}
		n, err := readFull(fd, buf)
		if err == nil && n < len(buf) {
			return errors.New("the connection ended")
		}
		return err
	})
}

func (c *client) udpRR() (figures, error) {
	fd, err := dial(c.target(portUDPEcho), unix.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300000}); err != nil {
		return nil, err
	}
	buf := make([]byte, 64)
	lost := 0
	fig, err := c.roundTrips(func() error {
		for {
			if _, err := rawWrite(fd, buf); err != nil {
				return err
			}
			if _, err := rawRead(fd, buf); err == nil {
				return nil
			} else if !errors.Is(err, unix.EAGAIN) {
				return err
			}
			if lost++; lost > 5 {
				return errors.New("no answer to six datagrams")
			}
		}
	})
	if err == nil {
		fig["lost"] = float64(lost)
	}
	return fig, err
}

// crr connects, asks, is answered, and closes, again and again.
func (c *client) crr(clients int) (figures, error) {
	all := make([][]int64, clients)
	t := c.target(portTCP)
	one := func(b []byte) error {
		fd, err := dial(t, unix.SOCK_STREAM)
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		defer rawClose(fd)
		b[0] = modeOnce
		if err := writeFull(fd, b[:1]); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if n, err := rawRead(fd, b[:1]); n != 1 || err != nil {
			return fmt.Errorf("read: %d bytes, %v", n, err)
		}
		if n, err := rawRead(fd, b[:1]); n != 0 || err != nil {
			return fmt.Errorf("read at the end: %d bytes, %v", n, err)
		}
		return nil
	}
	start := time.Now()
	err := each(clients, func(i int) error {
		b := make([]byte, 1)
		took := make([]int64, 0, 1<<17)
		defer func() { all[i] = took }()
		for last := time.Now(); last.Sub(start) < c.time && len(took) < cap(took); {
			if err := one(b); err != nil {
				return fmt.Errorf("after %d connections: %w", len(took), err)
			}
			now := time.Now()
			took = append(took, int64(now.Sub(last)))
			last = now
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	elapsed := time.Since(start)
	took := slices.Concat(all...)
	n := float64(len(took))
	slices.Sort(took)
	return figures{"per_s": n / elapsed.Seconds(), "p50_us": percentile(took, 0.5) / 1e3, "p99_us": percentile(took, 0.99) / 1e3}, nil
}

// bulk moves bytes in one direction; they are counted where they arrive.
func (c *client) bulk(streams int, up bool) (figures, error) {
	totals := make([]uint64, streams)
	mode := byte(modeSource)
	if up {
		mode = modeSink
	}
	fds := make([]int, streams)
	for i := range fds {
		fd, err := c.open(mode)
		if err != nil {
			return nil, err
		}
		fds[i] = fd
	}
	start := time.Now()
	err := each(streams, func(i int) error {
		buf := make([]byte, bufferBytes)
		for time.Since(start) < c.time {
			if up {
				n, err := rawWrite(fds[i], buf)
				if err != nil {
					return err
				}
				_ = n
				continue
			}
			n, err := rawRead(fds[i], buf)
			if err != nil {
				return err
			}
			if n == 0 {
				return errors.New("the stream ended")
			}
			totals[i] += uint64(n)
		}
		if !up {
			return nil
		}
		if err := unix.Shutdown(fds[i], unix.SHUT_WR); err != nil {
			return err
		}
		var b [8]byte
		if n, err := readFull(fds[i], b[:]); n != 8 {
			return fmt.Errorf("no count came back: %v", err)
		}
		totals[i] = binary.BigEndian.Uint64(b[:])
		return nil
	})
	if err != nil {
		return nil, err
	}
	elapsed := time.Since(start).Seconds()
	sum := uint64(0)
	for _, n := range totals {
		sum += n
	}
	return figures{"gbit_s": float64(sum) * 8 / elapsed / 1e9, "bytes": float64(sum)}, nil
}

// http asks for 1 KiB on connections that stay open.
func (c *client) http(clients int) (figures, error) {
	counts := make([]int, clients)
	start := time.Now()
	err := each(clients, func(i int) error {
		fd, err := dial(c.target(portHTTP), unix.SOCK_STREAM)
		if err != nil {
			return err
		}
		buf := make([]byte, len(httpAnswer))
		for time.Since(start) < c.time {
			if err := writeFull(fd, httpRequest); err != nil {
				return err
			}
			if n, err := readFull(fd, buf); n != len(buf) {
				return fmt.Errorf("answer of %d bytes: %v", n, err)
			}
			counts[i]++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n := 0
	for _, m := range counts {
		n += m
	}
	return figures{"per_s": float64(n) / time.Since(start).Seconds()}, nil
}

// received asks the server how many datagrams its sink got since the last time.
func (c *client) received() (float64, error) {
	conn, err := net.Dial("unix", c.control)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	fmt.Fprintln(conn, "udp")
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(line), 64)
}

// udp64 looks for the highest rate of datagrams of 64 bytes of which at most one in a thousand is lost, by halving
// the interval between what passed and what did not. The most that arrived at any rate is reported beside it.
func (c *client) udp64() (figures, error) {
	fd, err := dial(c.target(portUDPSink), unix.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	m := newMmsg(1024, 64)
	if _, err := m.send(fd, 1); err != nil { // opens the flow
		return nil, err
	}
	pause(50 * time.Millisecond)
	most := 0.0
	try := func(rate float64) (bool, float64, error) {
		if _, err := c.received(); err != nil {
			return false, 0, err
		}
		const length = 250 * time.Millisecond
		sent := 0
		start := time.Now()
		for {
			elapsed := time.Since(start)
			if elapsed >= length {
				break
			}
			due := min(int(rate*elapsed.Seconds())-sent, 1024)
			if due <= 0 {
				pause(100 * time.Microsecond)
				continue
			}
			n, err := m.send(fd, due)
			if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				return false, 0, err
			}
			sent += n
			if due < 1024 {
				pause(100 * time.Microsecond)
			}
		}
		took := time.Since(start).Seconds()
		pause(60 * time.Millisecond) // what is on its way
		got, err := c.received()
		if err != nil {
			return false, 0, err
		}
		most = max(most, got/took)
		// The sender must have kept up, too.
		return got >= 0.999*float64(sent) && float64(sent) >= 0.95*rate*took, float64(sent) / took, nil
	}
	good, bad := 0.0, 0.0
	rate := 40e3
	for range 10 {
		ok, real, err := try(rate)
		if err == nil && !ok { // once more: a neighbour on the machine may have been in the way
			ok, real, err = try(rate)
		}
		if err != nil {
			return nil, err
		}
		if ok {
			good = max(good, real)
		} else {
			bad = rate
		}
		switch {
		case bad == 0:
			rate *= 2
		case good == 0:
			rate /= 2
		case bad/good < 1.06:
			return figures{"per_s": good, "most_per_s": most}, nil
		default:
			rate = (good + bad) / 2
		}
	}
	return figures{"per_s": good, "most_per_s": most}, nil
}

// idle opens flows that carry one byte each way, says so, waits for a line, carries 256 KiB each way on every flow, says so,
// and waits for another line. The parent weighs the gateway in between.
func (c *client) idle(flows int, say func(string), wait func()) error {
	fds := make([]int, flows)
	const workers = 4
	err := each(workers, func(w int) error {
		var b [1]byte
		for i := w; i < flows; i += workers {
			fd, err := c.open(modeIdle)
			if err != nil {
				return fmt.Errorf("flow %d: %w", i, err)
			}
			if n, err := readFull(fd, b[:]); n != 1 {
				return fmt.Errorf("flow %d: no answer: %v", i, err)
			}
			fds[i] = fd
		}
		return nil
	})
	if err != nil {
		return err
	}
	say("opened")
	wait()
	err = each(workers, func(w int) error {
		buf := make([]byte, idleChunk)
		for range 256 << 10 / idleChunk {
			for i := w; i < flows; i += workers {
				if err := writeFull(fds[i], buf); err != nil {
					return fmt.Errorf("flow %d: %w", i, err)
				}
				if n, err := readFull(fds[i], buf); n != len(buf) {
					return fmt.Errorf("flow %d: %d bytes: %v", i, n, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	say("carried")
	wait()
	return nil
}

// run runs one test by name.
func (c *client) run(test string) (figures, error) {
	switch test {
	case "first":
		return c.first()
	case "rr":
		return c.rr()
	case "udprr":
		return c.udpRR()
	case "crr1":
		return c.crr(1)
	case "crr16":
		return c.crr(16)
	case "down1", "up1":
		return c.bulk(1, test == "up1")
	case "down8", "up8":
		return c.bulk(8, test == "up8")
	case "http":
		return c.http(16)
	case "udp64":
		return c.udp64()
	}
	return nil, fmt.Errorf("no test %q", test)
}
