package tun_test

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// batch returns packets with the buffers that a stack reads into.
func batch(n int) []tun.Packet {
	pkts := make([]tun.Packet, n)
	for i := range pkts {
		pkts[i].Bufs = [][]byte{make([]byte, 128), make([]byte, 2048), make([]byte, 16384), make([]byte, 65536)}
	}
	return pkts
}

// readAll reads until there is nothing.
func readAll(t testing.TB, q tun.Queue, pkts []tun.Packet) (read int) {
	for {
		n, err := q.TryRead(pkts)
		read += n
		if err == tun.ErrWouldBlock {
			return read
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	if need.Race {
		t.Skip("the race detector allocates")
	}
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) { kernelAllocations(t, path.opts) })
	}
	for _, tso := range []bool{false, true} {
		t.Run(map[bool]string{false: "memory", true: "memory with TSO"}[tso], func(t *testing.T) { memoryAllocations(t, tso) })
	}
}

// kernelAllocations checks a device of the kernel.
func kernelAllocations(t *testing.T, o tun.Options) {
	d := configured(t, o)
	conn := rawSender(t)
	q := d.Queues()[0]
	in := batch(8)
	out := []tun.Packet{
		{Bufs: [][]byte{udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 1000))}},
		{Bufs: in[0].Bufs[:1]}, // too short to be written
	}
	out[1].Bufs = [][]byte{make([]byte, 3)}
	read := 0
	allocs := testing.AllocsPerRun(500, func() {
		if n, err := q.Write(out); n != 1 || err != tun.ErrShort {
			t.Fatalf("Write: %d, %v", n, err)
		}
		if err := unix.Send(conn, out[0].Bufs[0], 0); err != nil {
			t.Fatal(err)
		}
		if n, err := q.Read(in); n < 1 || err != nil {
			t.Fatalf("Read: %d, %v", n, err)
		}
		read += readAll(t, q, in)
	})
	if allocs != 0 {
		t.Errorf("%v allocations per round, want 0", allocs)
	}
}

// memoryAllocations checks the device in memory.
func memoryAllocations(t *testing.T, tso bool) {
	a, b := tuntest.Pair(tuntest.Options{TSO: tso})
	defer a.Close()
	defer b.Close()
	b.FD()
	big := make([]byte, 60000)
	p := tun.Packet{Bufs: [][]byte{big[:100], big[100:]}}
	if tso {
		p.Offload = tun.Offload{GSO: tun.GSOTCPv4, NeedsCsum: true, CsumStart: 20, CsumOffset: 16, GSOSize: 1448, HdrLen: 40}
	}
	out := []tun.Packet{p, {Bufs: [][]byte{big[:500]}}}
	in := batch(4)
	allocs := testing.AllocsPerRun(2000, func() {
		if n, err := a.Write(out); n != 2 || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
		if n, err := b.Read(in); n != 2 || err != nil {
			t.Fatalf("Read: %d, %v", n, err)
		}
	})
	// A collection may empty the pools in between: that is a fraction, which AllocsPerRun rounds away.
	if allocs != 0 {
		t.Errorf("%v allocations per round, want 0", allocs)
	}
}

// rawSender returns a socket whose datagrams the kernel sends into the device.
func rawSender(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 9, 0, 2}, Port: 9}); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestDescriptorTellsEpoll(t *testing.T) {
	devices := map[string]func(t *testing.T) (tun.Queue, func()){
		"memory": func(t *testing.T) (tun.Queue, func()) {
			a, b := tuntest.Pair(tuntest.Options{})
			t.Cleanup(func() { a.Close(); b.Close() })
			return b, func() {
				if n, err := a.Write([]tun.Packet{{Bufs: [][]byte{make([]byte, 100)}}}); n != 1 || err != nil {
					t.Fatalf("Write: %d, %v", n, err)
				}
			}
		},
	}
	for _, path := range paths {
		devices[path.name] = func(t *testing.T) (tun.Queue, func()) {
			d := configured(t, path.opts)
			conn, err := net.Dial("udp", "10.9.0.2:9")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return d.Queues()[0], func() {
				if _, err := conn.Write(make([]byte, 72)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for name, make := range devices {
		t.Run(name, func(t *testing.T) {
			q, produce := make(t)
			pkts := batch(1)
			produce()
			fd := q.FD() // asked for while a packet waits already
			epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(epoll)
			if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
				t.Fatal(err)
			}
			for round := range 3 {
				produce()
				waitEpoll(t, epoll)
				// Level: one of two packets read, and it is still readable.
				if n, err := q.TryRead(pkts); n != 1 || err != nil {
					t.Fatalf("round %d: TryRead: %d, %v", round, n, err)
				}
				waitEpoll(t, epoll)
				waitFor(t, "end of readability", func() bool { readAll(t, q, pkts); return !readable(t, fd) })
				produce()
			}
		})
	}
}

// waitEpoll waits until something is ready.
func waitEpoll(t *testing.T, epoll int) {
	t.Helper()
	events := make([]unix.EpollEvent, 1)
	for {
		n, err := unix.EpollWait(epoll, events, 10_000)
		if err == unix.EINTR {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("epoll: %d, %v", n, err)
		}
		return
	}
}

func BenchmarkDevice(b *testing.B) {
	for _, size := range []int{100, 1472} {
		b.Run(map[int]string{100: "read/size=100", 1472: "read/size=1472"}[size], func(b *testing.B) {
			d := configured(b, tun.Options{Name: "wfpt"})
			conn, data, q, pkts := rawSender(b), make([]byte, size), d.Queues()[0], batch(64)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for read := 0; b.Loop(); {
				if read--; read <= 0 {
					b.StopTimer()
					for range 256 {
						if err := unix.Send(conn, data, 0); err != nil {
							b.Fatal(err)
						}
					}
					b.StartTimer()
					read = readAll(b, q, pkts)
				}
			}
		})
		b.Run(map[int]string{100: "write/size=100", 1472: "write/size=1472"}[size], func(b *testing.B) {
			d := configured(b, tun.Options{Name: "wfpt"})
			q := d.Queues()[0]
			p := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, size))
			pkts := []tun.Packet{{Bufs: [][]byte{p}}}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := q.Write(pkts); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	inNamespace(b)
	b.ReportAllocs()
	for b.Loop() {
		d, err := tun.Open(tun.Options{Name: "wfpt", MTU: 65520})
		if err != nil {
			b.Fatal(err)
		}
		err = tun.Configure("wfpt", tun.Config{Up: true, Default: true, Addresses: []netip.Prefix{
			netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd99::1/64")}})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		d.Close()
		b.StartTimer()
	}
}
