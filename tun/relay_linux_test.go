package tun_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// The tests of this file connect two kernels' TCP through two devices and a relay of ours: whatever segmentation and
// checksum work one kernel leaves to the device, the other must get right.
//
//	client ns: socket ─ kernel ─ wfpa ══ relay: Read, Write ══ wfpb ─ kernel ─ socket :server ns

// end is one side: a namespace with a device in it, in which sockets can be made.
type end struct {
	dev tun.Device
	do  chan func() // runs in the namespace; closed at the end
}

// newEnd makes a namespace with a device.
func newEnd(t *testing.T, o tun.Options, addrs ...string) *end {
	t.Helper()
	e := &end{do: make(chan func())}
	var done sync.WaitGroup
	// Owner: the test's cleanup, which closes do and waits. The thread stays in its namespace and ends with it.
	done.Go(func() {
		runtime.LockOSThread()
		for f := range e.do {
			f()
		}
	})
	t.Cleanup(func() { close(e.do); done.Wait() })
	var err error
	e.run(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		if e.dev, err = tun.Open(o); err != nil {
			return
		}
		c := tun.Config{Up: true, Default: true}
		for _, a := range addrs {
			c.Addresses = append(c.Addresses, netip.MustParsePrefix(a))
		}
		err = tun.Configure(e.dev.Name(), c)
	})
	if e.dev != nil {
		t.Cleanup(func() { e.dev.Close() })
	}
	if err != nil {
		t.Fatalf("namespace with %s: %v", o.Name, err)
	}
	return e
}

// run runs f in the namespace.
func (e *end) run(f func()) {
	done := make(chan struct{})
	e.do <- func() { defer close(done); f() }
	<-done
}

// relay moves packets from one queue to another until the device ends. A full or a failed write is a loss, as on a wire.
func relay(from, to tun.Queue) error {
	pkts := make([]tun.Packet, 16)
	for i := range pkts {
		pkts[i].Bufs = [][]byte{make([]byte, 128), make([]byte, 2048), make([]byte, tun.MaxPacket)}
	}
	out := make([]tun.Packet, len(pkts))
	for i := range out {
		out[i].Bufs = make([][]byte, 0, 3)
	}
	for {
		n, err := from.Read(pkts)
		for i := range n {
			out[i].Offload, out[i].Bufs = pkts[i].Offload, head(out[i].Bufs[:0], pkts[i].Bufs, pkts[i].Size)
		}
		for rest := out[:n]; len(rest) > 0; {
			w, werr := to.Write(rest)
			rest = rest[w:]
			if werr != nil {
				if errors.Is(werr, tun.ErrClosed) || errors.Is(werr, tun.ErrGone) {
					return nil
				}
				if !errors.Is(werr, tun.ErrWouldBlock) && !errors.Is(werr, tun.ErrDown) {
					return werr
				}
				rest = rest[1:]
			}
		}
		if errors.Is(err, tun.ErrClosed) || errors.Is(err, tun.ErrGone) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// head appends to dst the pieces of bufs that hold the first size bytes.
func head(dst, bufs [][]byte, size int) [][]byte {
	for _, b := range bufs {
		if size == 0 {
			break
		}
		b = b[:min(size, len(b))]
		dst = append(dst, b)
		size -= len(b)
	}
	return dst
}

// pattern is a stream without a period: blocks out of a table of noise, each from another place and stamped with its number.
type pattern struct{ block uint64 }

const patternBlock = 4096

// noise is the table, made by a generator that has no zero runs and no short cycles.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 1<<16)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(i+1)*0x9e3779b97f4a7c15)
	}
	return b
})

// fill writes the next bytes of the stream to b, whose length is a multiple of a block's.
func (p *pattern) fill(b []byte) {
	table := noise()
	for ; len(b) >= patternBlock; b = b[patternBlock:] {
		at := p.block * 7919 % uint64(len(table)-patternBlock)
		copy(b, table[at:at+patternBlock])
		binary.LittleEndian.PutUint64(b, p.block)
		p.block++
	}
}

// send writes volume bytes of pattern to w.
func send(w io.Writer, volume int) error {
	p, buf := pattern{}, make([]byte, 1<<18)
	for sent := 0; sent < volume; sent += len(buf) {
		p.fill(buf)
		if _, err := w.Write(buf); err != nil {
			return fmt.Errorf("after %d bytes: %w", sent, err)
		}
	}
	return nil
}

// receive reads volume bytes from r and compares them with the pattern by position.
func receive(r io.Reader, volume int) error {
	p, got, want := pattern{}, make([]byte, 1<<18), make([]byte, 1<<18)
	for at := 0; at < volume; at += len(got) {
		if _, err := io.ReadFull(r, got); err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		p.fill(want)
		if !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					return fmt.Errorf("byte %d is %#x, want %#x", at+i, got[i], want[i])
				}
			}
		}
	}
	return nil
}

// volume is what each transfer moves each way.
func volume() int {
	if need.Race {
		return 64 << 20
	}
	return 1 << 30
}

func TestTransferBetweenKernels(t *testing.T) {
	for _, row := range []struct {
		name string
		opts tun.Options
		addr string
		tso  bool
	}{
		{"fast v4 MTU 1500", tun.Options{MTU: 1500}, "10.9.0.2", true},
		{"fast v6 MTU 1500", tun.Options{MTU: 1500}, "fd99::2", true},
		{"fast v4 MTU 65520", tun.Options{MTU: 65520}, "10.9.0.2", false},
		{"fast v6 MTU 65520", tun.Options{MTU: 65520}, "fd99::2", false},
		{"portable v4 MTU 65520", tun.Options{MTU: 65520, NoOffload: true}, "10.9.0.2", false},
		{"portable v6 MTU 65520", tun.Options{MTU: 65520, NoOffload: true}, "fd99::2", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			need.Root(t)
			need.TUN(t)
			a, b := row.opts, row.opts
			a.Name, b.Name = "wfpa", "wfpb"
			client := newEnd(t, a, "10.9.0.1/24", "fd99::1/64")
			server := newEnd(t, b, "10.9.0.2/24", "fd99::2/64")
			wait := startRelays(t, client.dev, server.dev)
			transfer(t, client, server, row.addr, volume())
			stats := client.dev.Stats()
			average := stats.ReadBytes / max(stats.ReadPackets, 1)
			t.Logf("average packet read: %d bytes", average)
			if row.tso && average < 2*1500 {
				t.Errorf("average packet read is %d bytes: no segmentation offload at MTU 1500", average)
			}
			for reason, n := range stats.ReadDrops {
				if n != 0 {
					t.Errorf("%d packets read refused: %v", n, tun.DropReason(reason))
				}
			}
			wait()
		})
	}
}

// The device in memory stands between the kernels here: what it does to packets, a real TCP would notice.
func TestTransferThroughMemory(t *testing.T) {
	for _, row := range []struct {
		name string
		mtu  int
		tso  bool
		addr string
	}{
		{"v4 with offload", 1500, true, "10.9.0.2"},
		{"v6 with offload", 1500, true, "fd99::2"},
		{"v4 without", 1500, false, "10.9.0.2"},
		{"v6 without", 65520, false, "fd99::2"},
	} {
		t.Run(row.name, func(t *testing.T) {
			need.Root(t)
			need.TUN(t)
			o := tun.Options{MTU: row.mtu, NoOffload: !row.tso}
			a, b := o, o
			a.Name, b.Name = "wfpa", "wfpb"
			client := newEnd(t, a, "10.9.0.1/24", "fd99::1/64")
			server := newEnd(t, b, "10.9.0.2/24", "fd99::2/64")
			left, right := tuntest.Pair(tuntest.Options{TSO: row.tso, MTU: row.mtu})
			stopLeft := startRelays(t, client.dev, left)
			stopRight := startRelays(t, right, server.dev)
			transfer(t, client, server, row.addr, volume()/16)
			for _, d := range []*tuntest.Device{left, right} {
				for reason, n := range d.Stats().ReadDrops {
					if n != 0 {
						t.Errorf("%s: %d packets refused: %v", d.Name(), n, tun.DropReason(reason))
					}
				}
			}
			stopLeft()
			stopRight()
		})
	}
}

// startRelays connects two devices; the function returned closes them and waits.
func startRelays(t *testing.T, a, b tun.Device) (wait func()) {
	t.Helper()
	var relays sync.WaitGroup
	for _, q := range [][2]tun.Queue{{a.Queues()[0], b.Queues()[0]}, {b.Queues()[0], a.Queues()[0]}} {
		// Owner: the test, which closes both devices and waits.
		relays.Go(func() {
			if err := relay(q[0], q[1]); err != nil {
				t.Errorf("relay: %v", err)
			}
		})
	}
	return func() { a.Close(); b.Close(); relays.Wait() }
}

// transfer moves volume bytes each way over one connection after the other.
func transfer(t *testing.T, client, server *end, addr string, volume int) {
	t.Helper()
	var listener net.Listener
	var err error
	server.run(func() { listener, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	defer listener.Close()
	results := make(chan error, 1)
	// Owner: the test, which receives its result.
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			defer conn.Close()
			if err = receive(conn, volume); err == nil {
				err = send(conn, volume)
			}
		}
		results <- err
	}()
	var conn net.Conn
	client.run(func() { conn, err = net.DialTimeout("tcp", listener.Addr().String(), 10*time.Second) })
	if err != nil {
		listener.Close()
		t.Fatalf("dial: %v (server: %v)", err, <-results)
	}
	defer conn.Close()
	start := time.Now()
	conn.SetDeadline(start.Add(4 * time.Minute))
	if err := send(conn, volume); err != nil {
		t.Errorf("send: %v", err)
	}
	if err := receive(conn, volume); err != nil {
		t.Errorf("receive: %v", err)
	}
	t.Logf("%d MiB each way in %v", volume>>20, time.Since(start).Round(time.Millisecond))
	conn.Close()
	if err := <-results; err != nil {
		t.Errorf("server: %v", err)
	}
}
