package identity

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
)

var ap = netip.MustParseAddrPort

// family is a row of tests that run for IPv4, IPv6 and a dual-stack socket that speaks IPv4.
type family struct {
	name   string
	domain int
	shown  netip.Addr // loopback as the flow shows it
	told   netip.Addr // loopback as the socket is told
	any    netip.Addr
	sink   netip.Addr // an address behind the device that swallows packets, as the socket is told
}

var families = []family{
	{"v4", unix.AF_INET, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified(), netip.MustParseAddr("192.0.2.9")},
	{"v6", unix.AF_INET6, netip.IPv6Loopback(), netip.IPv6Loopback(), netip.IPv6Unspecified(), netip.MustParseAddr("2001:db8::9")},
	{"dual", unix.AF_INET6, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::ffff:127.0.0.1"), netip.IPv6Unspecified(), netip.MustParseAddr("::ffff:192.0.2.9")},
}

// bound opens a socket that is bound to an address; port 0 = any.
func bound(t testing.TB, f family, typ int, addr netip.Addr, port uint16) *sock {
	t.Helper()
	s := rawSocket(t, f.domain, typ)
	if err := unix.Bind(s.fd, sockaddr(netip.AddrPortFrom(addr, port))); err != nil {
		need.Missing(t, "%s loopback: bind %v: %v", f.name, addr, err)
	}
	return s
}

// check looks a flow up and compares with the socket that should own it.
func check(t testing.TB, d *Diag, s *sock, proto Proto, local, remote netip.AddrPort, state State) Socket {
	t.Helper()
	got, err := d.Lookup(proto, local, remote)
	if err != nil {
		t.Fatalf("Lookup(%v, %v, %v) = %v", proto, local, remote, err)
	}
	if want := inodeOf(t, s); got.Inode != want || got.State != state || got.UID != uint32(os.Getuid()) || got.Cookie == 0 || got.Proto != proto {
		t.Fatalf("Lookup(%v, %v, %v) = %+v, want inode %d, uid %d, state %v", proto, local, remote, got, want, os.Getuid(), state)
	}
	return got
}

// gone asserts that no socket owns the flow.
func gone(t testing.TB, d *Diag, proto Proto, local, remote netip.AddrPort) {
	t.Helper()
	if got, err := d.Lookup(proto, local, remote); !errors.Is(err, ErrNoSocket) {
		t.Fatalf("Lookup(%v, %v, %v) = %+v, %v, want ErrNoSocket", proto, local, remote, got, err)
	}
}

func alive(t testing.TB, d *Diag, s Socket, want bool) {
	t.Helper()
	if got, err := d.Alive(s); got != want || err != nil {
		t.Errorf("Alive(%+v) = %v, %v, want %v", s, got, err, want)
	}
}

func TestLookupTCP(t *testing.T) {
	d := openHere(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := bound(t, f, unix.SOCK_STREAM, f.told, 0)
			must(t, unix.Listen(l.fd, 16))
			server := netip.AddrPortFrom(f.shown, localOf(t, l).Port())
			check(t, d, l, TCP, server, netip.AddrPortFrom(f.shown, 9), Listen)

			c := rawSocket(t, f.domain, unix.SOCK_STREAM)
			c.connect(t, netip.AddrPortFrom(f.told, server.Port()))
			client := localOf(t, c)
			s := check(t, d, c, TCP, client, server, Established)
			if s.Local != client || s.Remote != server {
				t.Errorf("addresses = %v, %v, want %v, %v", s.Local, s.Remote, client, server)
			}
			mapped := netip.AddrPortFrom(netip.AddrFrom16(client.Addr().As16()), client.Port())
			check(t, d, c, TCP, mapped, server, Established)
			gone(t, d, TCP, netip.AddrPortFrom(f.shown, 1), server)

			alive(t, d, s, true)
			c.close()
			alive(t, d, s, false)
		})
	}
}

// TestPendedConnect holds connections in SYN_SENT, as a pend does, by a listener whose queue is full.
func TestPendedConnect(t *testing.T) {
	d := openHere(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := bound(t, f, unix.SOCK_STREAM, f.told, 0)
			must(t, unix.Listen(l.fd, 0))
			at := netip.AddrPortFrom(f.told, localOf(t, l).Port())
			server := netip.AddrPortFrom(f.shown, at.Port())
			rawSocket(t, f.domain, unix.SOCK_STREAM).connect(t, at) // fills the queue of one
			c := rawSocket(t, f.domain, unix.SOCK_STREAM)
			c.connect(t, at)
			client := localOf(t, c)
			s := check(t, d, c, TCP, client, server, SynSent)
			alive(t, d, s, true)
			c.close()
			alive(t, d, s, false)

			// The same addresses again are another socket. Other programs may take the port in between.
			again := rawSocket(t, f.domain, unix.SOCK_STREAM)
			for tries := 0; ; tries++ {
				err := unix.Bind(again.fd, sockaddr(netip.AddrPortFrom(f.told, client.Port())))
				if err == nil {
					break
				}
				if err != unix.EADDRINUSE || tries == 20 {
					t.Fatalf("bind port %d again: %v", client.Port(), err)
				}
				c = rawSocket(t, f.domain, unix.SOCK_STREAM)
				c.connect(t, at)
				client = localOf(t, c)
				s = check(t, d, c, TCP, client, server, SynSent)
				c.close()
			}
			again.connect(t, at)
			s2 := check(t, d, again, TCP, client, server, SynSent)
			alive(t, d, s, false)
			alive(t, d, s2, true)
		})
	}
}

func TestLookupUDP(t *testing.T) {
	d := openHere(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			remote := netip.AddrPortFrom(f.shown, 5353)
			wild := bound(t, f, unix.SOCK_DGRAM, f.any, 0)
			port := localOf(t, wild).Port()
			s := check(t, d, wild, UDP, netip.AddrPortFrom(f.shown, port), remote, Close)
			alive(t, d, s, true)

			b := bound(t, f, unix.SOCK_DGRAM, f.told, 0)
			alive(t, d, check(t, d, b, UDP, localOf(t, b), remote, Close), true)

			c := rawSocket(t, f.domain, unix.SOCK_DGRAM)
			c.connect(t, netip.AddrPortFrom(f.told, 5353))
			client := localOf(t, c)
			sc := check(t, d, c, UDP, client, remote, Established)
			gone(t, d, UDP, client, netip.AddrPortFrom(f.shown, 5354))
			alive(t, d, sc, true)

			wild.close()
			c.close()
			alive(t, d, s, false)
			alive(t, d, sc, false)
			gone(t, d, UDP, netip.AddrPortFrom(f.shown, port), remote)
		})
	}
}

func TestLookupFreebind(t *testing.T) {
	// A client may use the port of a listener of its own as its source: the connected socket must win over the listener.
	f := families[0]
	d := openHere(t)
	l := bound(t, f, unix.SOCK_STREAM, f.told, 0)
	must(t, unix.Listen(l.fd, 4))
	self := netip.AddrPortFrom(f.told, localOf(t, l).Port())

	c := rawSocket(t, f.domain, unix.SOCK_STREAM)
	c.connect(t, self)
	check(t, d, c, TCP, localOf(t, c), self, Established)
	check(t, d, l, TCP, self, ap("127.0.0.1:1"), Listen)
}

func TestRefusedQueries(t *testing.T) {
	d := openHere(t)
	for _, tc := range []struct {
		name          string
		proto         Proto
		local, remote netip.AddrPort
		want          error
	}{
		{"icmp", 1, ap("127.0.0.1:1"), ap("127.0.0.1:2"), ErrProto},
		{"zero addresses", TCP, netip.AddrPort{}, netip.AddrPort{}, ErrNoSocket},
		{"mixed families", UDP, ap("127.0.0.1:1"), ap("[::1]:2"), ErrNoSocket},
		{"nobody", TCP, ap("127.0.0.1:1"), ap("127.0.0.1:2"), ErrNoSocket},
		{"zone of our own", TCP, ap("[fe80::1%lo]:1"), ap("[fe80::2%lo]:2"), ErrNoSocket},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if s, err := d.Lookup(tc.proto, tc.local, tc.remote); !errors.Is(err, tc.want) {
				t.Errorf("Lookup = %+v, %v, want %v", s, err, tc.want)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	d := openHere(t)
	must(t, d.Probe(TCP))
	must(t, d.Probe(UDP))
	if err := d.Probe(99); err == nil {
		t.Error("Probe(99) = nil, want an error: no such protocol")
	}
}

func TestOpenRefusesOtherFiles(t *testing.T) {
	if _, err := Open(nil); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("Open(nil) = %v, want os.ErrInvalid", err)
	}
	r, w, err := os.Pipe()
	must(t, err)
	defer w.Close()
	if _, err := Open(r); err == nil {
		t.Error("Open(pipe) = nil")
	}
	if _, err := r.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("file after a failed Open: %v, want it closed", err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	must(t, err)
	if _, err := Open(os.NewFile(uintptr(fd), "route")); err == nil {
		t.Error("Open(NETLINK_ROUTE socket) = nil")
	}
}

func TestClosed(t *testing.T) {
	d, err := OpenHere()
	must(t, err)
	must(t, d.Close())
	if _, err := d.Lookup(TCP, ap("127.0.0.1:1"), ap("127.0.0.1:2")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Lookup after Close = %v, want os.ErrClosed", err)
	}
	if err := d.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second Close = %v, want os.ErrClosed", err)
	}
}

// TestLateAnswers asks without reading, as if queries had timed out: later ones must not take the earlier answers for theirs.
func TestLateAnswers(t *testing.T) {
	d := openHere(t)
	b := bound(t, families[0], unix.SOCK_DGRAM, families[0].told, 0)
	d.mu.Lock()
	for range 5 {
		d.seq++
		d.req.encode(d.seq, UDP, sockID{src: ap("127.0.0.1:1"), dst: ap("127.0.0.1:1"), cookie: noCookie}, unix.NLM_F_REQUEST, allStates)
		if _, err := unix.Write(d.fd, d.req[:]); err != nil {
			t.Fatal(err)
		}
	}
	d.mu.Unlock()
	check(t, d, b, UDP, localOf(t, b), ap("127.0.0.1:7"), Close)
}

func TestNoAnswerIsBounded(t *testing.T) {
	d := openHere(t)
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.receiveLocked(); !errors.Is(err, ErrTimeout) {
		t.Errorf("receive with nothing asked = %v, want ErrTimeout", err)
	}
}

func TestLookupDoesNotAllocate(t *testing.T) {
	if need.Race {
		t.Skip("the race detector allocates")
	}
	d := openHere(t)
	b := bound(t, families[1], unix.SOCK_DGRAM, families[1].any, 0)
	at := netip.AddrPortFrom(families[1].shown, localOf(t, b).Port())
	if n := testing.AllocsPerRun(200, func() {
		if _, err := d.Lookup(UDP, at, ap("[::1]:53")); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("Lookup of a socket: %v allocations, want 0", n)
	}
	if n := testing.AllocsPerRun(200, func() {
		if _, err := d.Lookup(TCP, ap("127.0.0.1:1"), ap("127.0.0.1:2")); err != ErrNoSocket {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("Lookup of none: %v allocations, want 0", n)
	}
}

// TestOtherNamespace looks into a namespace from outside of it, at connects that nobody answers.
func TestOtherNamespace(t *testing.T) {
	here := openHere(t)
	var d *Diag
	inNetNS(t, func(sink int) {
		f, err := NewFile()
		if err != nil {
			t.Error(err)
			return
		}
		if d, err = Open(f); err != nil {
			t.Error(err)
			return
		}
		for _, f := range families {
			s := rawSocket(t, f.domain, unix.SOCK_STREAM)
			remote := netip.AddrPortFrom(f.sink, 443)
			s.connect(t, remote)
			got := check(t, d, s, TCP, localOf(t, s), remote, SynSent)
			gone(t, here, TCP, localOf(t, s), remote)
			alive(t, d, got, true)
			s.close()
			alive(t, d, got, false)

			// Sockets bound to the device are found only by who names it.
			s = rawSocket(t, f.domain, unix.SOCK_STREAM)
			if err := unix.BindToDevice(s.fd, "sink"); err != nil {
				t.Error(err)
				return
			}
			s.connect(t, remote)
			gone(t, d, TCP, localOf(t, s), remote)
			d.SetInterface(uint32(sink))
			got = check(t, d, s, TCP, localOf(t, s), remote, SynSent)
			if got.Interface != uint32(sink) {
				t.Errorf("%s: interface = %d, want %d", f.name, got.Interface, sink)
			}
			plain := rawSocket(t, f.domain, unix.SOCK_STREAM)
			plain.connect(t, remote)
			check(t, d, plain, TCP, localOf(t, plain), remote, SynSent)
			d.SetInterface(0)
		}
	})
	if d != nil {
		d.Close()
	}
}

func BenchmarkLookup(b *testing.B) {
	var raised unix.Rlimit
	must(b, unix.Getrlimit(unix.RLIMIT_NOFILE, &raised))
	const sockets = 4000
	if raised.Cur < sockets+100 {
		need.Missing(b, "%d open files (ulimit -n is %d)", sockets+100, raised.Cur)
	}
	f := families[0]
	d := openHere(b)
	var last *sock
	for range sockets {
		last = bound(b, f, unix.SOCK_DGRAM, f.told, 0)
	}
	at := localOf(b, last)
	b.Run("udp/sockets=4000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Lookup(UDP, at, ap("127.0.0.1:53")); err != nil {
				b.Fatal(err)
			}
		}
	})
	l := bound(b, f, unix.SOCK_STREAM, f.told, 0)
	must(b, unix.Listen(l.fd, 16))
	c := rawSocket(b, f.domain, unix.SOCK_STREAM)
	c.connect(b, localOf(b, l))
	local, remote := localOf(b, c), localOf(b, l)
	b.Run("tcp/sockets=4000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Lookup(TCP, local, remote); err != nil {
				b.Fatal(err)
			}
		}
	})
}
