package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun"
)

// The tests of this file have the real kernel as the peer: a TUN device in a network namespace of the test's own, the stack at its
// one end, and sockets of the kernel in that namespace at the other.

// kernel is a network namespace with a device in it.
type kernel struct {
	dev tun.Device
	do  chan func() // runs in the namespace; closed at the end
}

// newKernel makes one. The kernel has the addresses that end in 2, the stack those that end in 1.
func newKernel(t testing.TB, o tun.Options) *kernel {
	t.Helper()
	need.Root(t)
	need.TUN(t)
	k := &kernel{do: make(chan func())}
	var done sync.WaitGroup
	// Owner: the test's cleanup, which closes do and waits. The thread stays in its namespace and ends with it.
	done.Go(func() {
		runtime.LockOSThread()
		for f := range k.do {
			f()
		}
	})
	t.Cleanup(func() { close(k.do); done.Wait() })
	var err error
	k.run(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		if k.dev, err = tun.Open(o); err != nil {
			return
		}
		c := tun.Config{Up: true, Default: true}
		for _, f := range families {
			c.Addresses = append(c.Addresses, netip.PrefixFrom(f.b, f.prefix))
		}
		err = tun.Configure(k.dev.Name(), c)
	})
	if err != nil {
		t.Fatalf("namespace with a device: %v", err)
	}
	t.Cleanup(func() { k.dev.Close() }) // the stack closed it, unless the test failed before
	return k
}

// run runs f in the namespace.
func (k *kernel) run(f func()) {
	done := make(chan struct{})
	k.do <- func() { defer close(done); f() }
	<-done
}

// listen listens with a socket of the kernel.
func (k *kernel) listen(t testing.TB, f family) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	k.run(func() { l, err = net.Listen("tcp", netip.AddrPortFrom(f.b, 0).String()) })
	if err != nil {
		t.Fatalf("listen in the namespace: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects a socket of the kernel.
func (k *kernel) dial(ctx context.Context, network string, to net.Addr) (c net.Conn, err error) {
	k.run(func() {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, to.String())
	})
	return c, err
}

// stackOn starts a stack on the kernel's device.
func (k *kernel) stackOn(t testing.TB, o pairOptions) *side {
	t.Helper()
	s := &side{engine: filter.New(filter.Options{}), log: &journal{}}
	h := o.host
	for _, f := range families {
		h.Addresses = append(h.Addresses, netip.PrefixFrom(f.a, f.prefix))
	}
	h.Ledger, h.Recorder = books, s.log
	if !o.quiet {
		h.Trace = s.log.trace
	}
	var err error
	if s.Stack, err = New(k.dev, s.engine, h); err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

// period is the length of what a bulk transfer repeats: a prime, so that no buffer size divides it.
const period = 1<<20 - 3

// TestBulkOverTheFastPath moves a gigabyte each way between a socket of the stack and one of the kernel, and compares every byte
// with what belongs at its place.
func TestBulkOverTheFastPath(t *testing.T) {
	volume := int64(1 << 30)
	if need.Race {
		volume = 64 << 20
	}
	if testing.Short() {
		volume = 16 << 20
	}
	data := pattern(2*period, 42)
	copy(data[period:], data[:period])
	for _, mtu := range []int{1500, 65520} {
		t.Run(fmt.Sprintf("mtu=%d", mtu), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				k := newKernel(t, tun.Options{MTU: mtu})
				if caps := k.dev.Offloads(); !caps.Checksum || !caps.TSO4 || !caps.TSO6 {
					need.Missing(t, "offloads of the TUN device, it has %+v", caps)
				}
				s := k.stackOn(t, pairOptions{quiet: true})
				l := k.listen(t, f)
				ch := accept(l)
				c, err := s.DialContext(withTimeout(t), "tcp", l.Addr().String())
				if err != nil {
					t.Fatalf("dial: %v", err)
				}
				defer c.Close()
				peer := <-ch
				if peer.err != nil {
					t.Fatal(peer.err)
				}
				defer peer.c.Close()
				for _, d := range []struct {
					name     string
					from, to net.Conn
				}{{"out", c, peer.c}, {"in", peer.c, c}} {
					start := time.Now()
					transfer(t, d.from, d.to, data, volume)
					t.Logf("%s: %d MiB in %v, %.1f Gbit/s", d.name, volume>>20, time.Since(start).Round(time.Millisecond), float64(volume)*8/time.Since(start).Seconds()/1e9)
				}
			})
		})
	}
}

// transfer moves volume bytes and ends the direction.
func transfer(t testing.TB, from, to net.Conn, data []byte, volume int64) {
	t.Helper()
	errs := make(chan error, 1) // of the one sender
	go func() {
		const chunk = 256 << 10
		for at := int64(0); at < volume; {
			off := int(at % period)
			n, err := from.Write(data[off : off+int(min(chunk, volume-at))])
			at += int64(n)
			if err != nil {
				errs <- fmt.Errorf("write at %d: %w", at, err)
				return
			}
		}
		errs <- from.(interface{ CloseWrite() error }).CloseWrite()
	}()
	buf := make([]byte, 256<<10)
	at := int64(0)
	for {
		to.SetReadDeadline(time.Now().Add(patience))
		n, err := to.Read(buf)
		off := int(at % period)
		if !bytes.Equal(buf[:n], data[off:off+n]) {
			for i := range n {
				if buf[i] != data[off+i] {
					t.Fatalf("byte %d is %#x, want %#x", at+int64(i), buf[i], data[off+i])
				}
			}
		}
		at += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("read at %d: %v", at, err)
		}
	}
	if err := <-errs; err != nil || at != volume {
		t.Fatalf("%d bytes of %d came, %v", at, volume, err)
	}
}

// TestKernelConnPassesNettest has the stack's connection at one end and the kernel's at the other.
func TestKernelConnPassesNettest(t *testing.T) {
	need.Root(t)
	need.TUN(t)
	eachFamily(t, func(t *testing.T, f family) {
		k := newKernel(t, tun.Options{})
		s := k.stackOn(t, pairOptions{quiet: true})
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			l := k.listen(t, f)
			ch := accept(l)
			if c1, err = s.DialContext(context.Background(), "tcp", l.Addr().String()); err != nil {
				return nil, nil, nil, err
			}
			peer := <-ch
			return c1, peer.c, func() { c1.Close(); peer.c.Close(); l.Close() }, peer.err
		})
	})
}

// TestKernelClientOfAPendedAccept: permitted later the kernel's client is connected, blocked later it is refused, and a client that
// gave up leaves nothing behind.
func TestKernelClientOfAPendedAccept(t *testing.T) {
	eachFamilyAtOnce(t, func(t *testing.T, f family) {
		k := newKernel(t, tun.Options{})
		s := k.stackOn(t, pairOptions{})
		p := newPendCallout(t)
		s.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
		l := s.listen(t, "tcp", netip.AddrPortFrom(f.a, 80).String())
		dial := func(ctx context.Context) <-chan accepted {
			ch := make(chan accepted, 1) // the one result
			// Owner: the test; the context ends it. The connect begins in the namespace and is waited for outside.
			go func() { c, err := k.dialAsync(ctx, l.Addr()); ch <- accepted{c, err} }()
			return ch
		}
		first := dial(withTimeout(t))
		p.wait(0)
		begun := time.Now()
		eventually(t, "two retransmissions are absorbed", func() bool { return s.Stats().PendAbsorbed >= 2 })
		p.complete(0, layers.PermitHard())
		r := <-first
		if r.err != nil {
			t.Fatalf("permitted after %v: %v", time.Since(begun), r.err)
		}
		r.c.Close()
		second := dial(withTimeout(t))
		p.wait(1)
		p.complete(1, layers.BlockHard())
		if r := <-second; !errors.Is(r.err, syscall.ECONNREFUSED) {
			t.Errorf("blocked: dial = %v, want ECONNREFUSED", r.err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		third := dial(ctx)
		op := p.wait(2)
		cancel()
		if r := <-third; r.err == nil {
			t.Error("a cancelled dial connected")
		}
		select {
		case <-op.Done():
		case <-time.After(patience):
			t.Fatal("the client gave up, and its operation is still pended")
		}
		if op.Cause() != layers.PendAbandoned || s.Stats().Pending != 0 {
			t.Errorf("cause %v, %d pended", op.Cause(), s.Stats().Pending)
		}
	})
}

// TestSoakMinutesOfPend: a kernel's client waits as long as it retransmits. It takes two minutes, so that it runs in the soak only.
func TestSoakMinutesOfPend(t *testing.T) {
	if os.Getenv("WFPSTACK_SOAK") == "" {
		t.Skip("takes 100 s: set WFPSTACK_SOAK=1")
	}
	eachFamilyAtOnce(t, func(t *testing.T, f family) {
		k := newKernel(t, tun.Options{})
		s := k.stackOn(t, pairOptions{quiet: true})
		p := newPendCallout(t)
		s.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
		l := s.listen(t, "tcp", netip.AddrPortFrom(f.a, 80).String())
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
		defer cancel()
		begun := time.Now()
		ch := make(chan accepted, 1) // the one result
		go func() { c, err := k.dialAsync(ctx, l.Addr()); ch <- accepted{c, err} }()
		op := p.wait(0)
		select {
		case <-op.Done():
			t.Fatalf("ended as %v after %v", op.Cause(), time.Since(begun))
		case <-time.After(100 * time.Second):
		}
		p.complete(0, layers.PermitHard())
		r := <-ch
		if r.err != nil {
			t.Fatalf("dial after %v: %v", time.Since(begun), r.err)
		}
		t.Logf("connected after %v, %d retransmissions absorbed", time.Since(begun).Round(time.Millisecond), s.Stats().PendAbsorbed)
		r.c.Close()
	})
}

// dialAsync connects without holding the namespace's thread: the socket is made there, the connect waits in the poller.
func (k *kernel) dialAsync(ctx context.Context, to net.Addr) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	ch := make(chan result, 1) // the one result
	started := make(chan struct{})
	k.do <- func() {
		defer close(started)
		fd, err := unix.Socket(familyOf(to), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			ch <- result{nil, err}
			return
		}
		err = unix.Connect(fd, sockaddr(to))
		if err != nil && err != unix.EINPROGRESS {
			unix.Close(fd)
			ch <- result{nil, err}
			return
		}
		go func() { c, err := finishConnect(ctx, fd); ch <- result{c, err} }()
	}
	<-started
	r := <-ch
	return r.c, r.err
}

func familyOf(a net.Addr) int {
	if a.(*net.TCPAddr).AddrPort().Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a net.Addr) unix.Sockaddr {
	ap := a.(*net.TCPAddr).AddrPort()
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

// finishConnect waits until a connect has ended, or the context.
func finishConnect(ctx context.Context, fd int) (net.Conn, error) {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 20)
		if n == 0 || err == unix.EINTR {
			continue
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = syscall.Errno(code)
		}
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
		return fdConn(fd)
	}
	unix.Close(fd)
	return nil, ctx.Err()
}

// TestKernelSeesARefusedDatagram as it does any prohibition.
func TestKernelSeesARefusedDatagram(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		k := newKernel(t, tun.Options{})
		s := k.stackOn(t, pairOptions{})
		p := s.packets(t, "udp", netip.AddrPortFrom(f.a, 53).String())
		s.add(t, layers.ALEAuthRecvAccept, filter.Filter{Name: "no dns", Action: filter.ActionBlock})
		c, err := k.dial(withTimeout(t), "udp", p.LocalAddr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(patience))
		want := syscall.EHOSTUNREACH
		if f.v == layers.V6 {
			want = syscall.EACCES
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
			t.Errorf("read = %v, want %v", err, want)
		}
	})
}

// TestKernelClosedPort: what the kernel answers reaches the program as its error number.
func TestKernelClosedPort(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		k := newKernel(t, tun.Options{})
		s := k.stackOn(t, pairOptions{})
		if _, err := s.DialContext(withTimeout(t), "tcp", netip.AddrPortFrom(f.b, 9).String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("tcp: %v, want ECONNREFUSED", err)
		}
		c, err := s.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 9).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("udp: %v, want ECONNREFUSED", err)
		}
	})
}

// TestDeviceGoesAwayUnderLoad: connections end in errors, nothing panics, and the stack closes.
func TestDeviceGoesAwayUnderLoad(t *testing.T) {
	ip := need.Program(t, "ip")
	k := newKernel(t, tun.Options{})
	s := k.stackOn(t, pairOptions{quiet: true})
	f := families[0]
	l := k.listen(t, f)
	ch := accept(l)
	c, err := s.DialContext(withTimeout(t), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	peer := <-ch
	if peer.err != nil {
		t.Fatal(peer.err)
	}
	defer peer.c.Close()
	var moved sync.WaitGroup
	moved.Go(func() { io.Copy(io.Discard, peer.c) })
	errs := make(chan error, 1) // of the one writer
	go func() {
		buf := make([]byte, 64<<10)
		for {
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			if _, err := c.Write(buf); err != nil {
				errs <- err
				return
			}
		}
	}()
	eventually(t, "bytes flow", func() bool { return c.(*Conn).flow.bytesOut.Load() > 8<<20 })
	k.run(func() { err = deleteLink(ip, k.dev.Name()) })
	if err != nil {
		t.Fatalf("ip link del: %v", err)
	}
	if err := <-errs; err == nil {
		t.Error("writes go on without a device")
	}
	if _, err := s.DialContext(timeoutIn(t, 200*time.Millisecond), "tcp", netip.AddrPortFrom(f.b, 80).String()); err == nil {
		t.Error("connected without a device")
	}
	peer.c.Close()
	moved.Wait()
}

func timeoutIn(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
