package tun_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
)

func TestDeleteUnderLoad(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			q := d.Queues()[0]
			conn, err := net.Dial("udp", "10.9.0.2:9")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var load sync.WaitGroup
			var read, written atomic.Int64
			stop := make(chan struct{})
			// Owner of all three: the test. The reader and the writer end with the device, the sender with stop.
			load.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_, _ = conn.Write(make([]byte, 1000)) // fails once the route is gone
					}
				}
			})
			ends := make(chan error, 2)
			load.Go(func() {
				pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}, {Bufs: [][]byte{make([]byte, 2048)}}}
				for {
					n, err := q.Read(pkts)
					read.Add(int64(n))
					if err != nil {
						ends <- fmt.Errorf("read: %w", err)
						return
					}
				}
			})
			load.Go(func() {
				b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 1000))
				for {
					n, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}, {Bufs: [][]byte{b}}})
					written.Add(int64(n))
					if err != nil && !errors.Is(err, tun.ErrWouldBlock) && !errors.Is(err, tun.ErrDown) {
						ends <- fmt.Errorf("write: %w", err)
						return
					}
				}
			})
			waitFor(t, "packets both ways", func() bool { return read.Load() > 100 && written.Load() > 100 })
			ip(t, "link", "del", d.Name())
			for range 2 {
				wantErr(t, "end", <-ends, tun.ErrGone)
			}
			waitEvent(t, d, tun.EventGone)
			close(stop)
			load.Wait()
			if _, err := q.TryRead(make([]tun.Packet, 1)); !errors.Is(err, tun.ErrGone) {
				t.Errorf("TryRead later: %v, want %v", err, tun.ErrGone)
			}
			if fd := q.FD(); fd >= 0 && !readable(t, fd) {
				t.Error("the descriptor of a deleted device is not readable: an epoll loop would never learn of it")
			}
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

// waitFor waits until cond holds.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}

// readable reports whether fd is, now; an error condition counts, as it does for epoll.
func readable(t testing.TB, fd int) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	}
}

func TestDownUpAndMTU(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			q := d.Queues()[0]
			b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 10))
			write := func() error {
				_, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}})
				return err
			}
			waitEvent(t, d, tun.EventUp)
			for range 3 {
				ip(t, "link", "set", d.Name(), "down")
				waitEvent(t, d, tun.EventDown)
				wantErr(t, "write while down", write(), tun.ErrDown)
				if _, err := q.TryRead([]tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}}); err != nil && !errors.Is(err, tun.ErrWouldBlock) {
					t.Errorf("TryRead while down: %v", err)
				}
				ip(t, "link", "set", d.Name(), "up")
				waitEvent(t, d, tun.EventUp)
				if err := write(); err != nil {
					t.Errorf("write after up: %v", err)
				}
			}
			if got := d.Stats().WriteDrops[tun.DropDown]; got != 3 {
				t.Errorf("%d writes counted as down, want 3", got)
			}
			for _, mtu := range []int{1280, 9000, 65535, 1500} {
				ip(t, "link", "set", d.Name(), "mtu", fmt.Sprint(mtu))
				if e := waitEvent(t, d, tun.EventMTU); e.MTU != mtu || d.MTU() != mtu {
					t.Errorf("event %+v, device says %d, want %d", e, d.MTU(), mtu)
				}
			}
		})
	}
}

func TestRenamedInterfaceIsFollowed(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt"})
	ip(t, "link", "set", "wfpt", "down")
	ip(t, "link", "set", "wfpt", "name", "other0")
	ip(t, "link", "set", "other0", "mtu", "1300")
	if e := waitEvent(t, d, tun.EventMTU); e.MTU != 1300 {
		t.Errorf("event %+v, want MTU 1300", e)
	}
	ip(t, "link", "del", "other0")
	waitEvent(t, d, tun.EventGone)
}

func TestMoveToAnotherNamespaceIsNotTheEnd(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt"})
	waitEvent(t, d, tun.EventUp)
	holder := exec.Command("sleep", "60")
	holder.Path = need.Program(t, "sleep")
	holder.SysProcAttr = newNamespace()
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	ip(t, "link", "set", "wfpt", "netns", fmt.Sprint(holder.Process.Pid))
	waitEvent(t, d, tun.EventDown)
	pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}}
	for {
		_, err := d.Queues()[0].TryRead(pkts)
		if err == nil {
			continue // what was queued before
		}
		wantErr(t, "TryRead of a moved device", err, tun.ErrWouldBlock)
		break
	}
	select {
	case e := <-d.Events():
		t.Errorf("event %+v after the move", e)
	default:
	}
}

func TestCloseWakesReaders(t *testing.T) {
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			inNamespace(t)
			d := open(t, path.opts)
			ends := make(chan error, 1)
			started := make(chan struct{})
			// Owner: the test, which receives its result.
			go func() {
				close(started)
				_, err := d.Queues()[0].Read([]tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}})
				ends <- err
			}()
			<-started
			if err := d.Close(); err != nil {
				t.Fatalf("Close: %v", err)
			}
			wantErr(t, "Read", <-ends, tun.ErrClosed)
			if exists(d.Name()) {
				t.Errorf("%s is still there after Close", d.Name())
			}
			if err := d.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			_, err := d.Queues()[0].Write([]tun.Packet{{Bufs: [][]byte{make([]byte, 100)}}})
			wantErr(t, "Write after Close", err, tun.ErrClosed)
			for range d.Events() { // ends: Close closed it
			}
		})
	}
}

func TestMultiQueueKeepsFlowsApart(t *testing.T) {
	d := configured(t, tun.Options{Name: "wfpt", Queues: 2})
	queues := d.Queues()
	if len(queues) != 2 {
		t.Fatalf("%d queues, want 2", len(queues))
	}
	for i, q := range queues {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer := netip.AddrPortFrom(netip.MustParseAddr("10.9.0.2"), uint16(5000+i))
		// The kernel sends a flow to the queue that last wrote it; writing teaches it which.
		b := udpPacket(peer, conn.LocalAddr().(*net.UDPAddr).AddrPort(), []byte("hello"))
		for range 3 {
			if n, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}}); n != 1 || err != nil {
				t.Fatalf("queue %d: Write: %d, %v", i, n, err)
			}
		}
		buf := make([]byte, 100)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(buf); err != nil {
			t.Fatalf("queue %d: %v", i, err)
		}
		if _, err := conn.WriteToUDPAddrPort([]byte("answer"), peer); err != nil {
			t.Fatal(err)
		}
		readMatching(t, d, isUDPTo(peer.Port()))
	}
	if s := d.Stats(); s.WrittenPackets != 6 || s.ReadPackets < 2 {
		t.Errorf("stats %+v: want 6 written and at least 2 read over both queues", s)
	}
}

func TestDownUpStormUnderLoad(t *testing.T) {
	rounds := 200
	if need.Race {
		rounds /= 10
	}
	for _, path := range paths {
		t.Run(path.name, func(t *testing.T) {
			d := configured(t, path.opts)
			q := d.Queues()[0]
			l, err := netlink.LinkByName(d.Name())
			if err != nil {
				t.Fatal(err)
			}
			var load sync.WaitGroup
			var accepted atomic.Int64
			// Owner of both: the test. Close ends them.
			load.Go(func() {
				pkts := batch(4)
				for {
					if _, err := q.Read(pkts); err != nil {
						if err != tun.ErrClosed {
							t.Errorf("Read: %v", err)
						}
						return
					}
				}
			})
			load.Go(func() {
				b := udpPacket(netip.MustParseAddrPort("10.9.0.2:1"), netip.MustParseAddrPort("10.9.0.1:9"), make([]byte, 500))
				for {
					n, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}}})
					accepted.Add(int64(n))
					switch err {
					case nil, tun.ErrDown, tun.ErrNoBuffers, tun.ErrWouldBlock:
					case tun.ErrClosed:
						return
					default:
						t.Errorf("Write: %v", err)
						return
					}
				}
			})
			for range rounds {
				if err := errors.Join(netlink.LinkSetDown(l), netlink.LinkSetMTU(l, 1400), netlink.LinkSetUp(l), netlink.LinkSetMTU(l, 1500)); err != nil {
					t.Fatal(err)
				}
			}
			before := accepted.Load()
			waitFor(t, "packets after the storm", func() bool { return accepted.Load() > before+100 })
			waitFor(t, "the last MTU", func() bool { return d.MTU() == 1500 })
			// Changes that come faster than the kernel's messages are read count as one, so that there are not four events a round.
			waitFor(t, "an event that nobody read counted as lost", func() bool {
				if err := errors.Join(netlink.LinkSetDown(l), netlink.LinkSetUp(l)); err != nil {
					t.Fatal(err)
				}
				return d.Stats().EventsLost > 0
			})
			d.Close()
			load.Wait()
		})
	}
}
