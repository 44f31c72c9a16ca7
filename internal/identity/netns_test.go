package identity

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
)

// inNetNS runs f on a thread with a network namespace of its own, with loopback up and a device "sink" that swallows packets to
// 192.0.2.0/24 and 2001:db8::/64. The thread is thrown away afterwards, and the namespace with it.
func inNetNS(t testing.TB, f func(sink int)) {
	t.Helper()
	need.Root(t)
	done := make(chan string)
	// Owned by this function; ends with f.
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		failed := "test function did not return"
		defer func() { done <- failed }()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			failed = "unshare: " + err.Error()
			return
		}
		index, err := sinkDevice()
		if err != nil {
			failed = "set up namespace: " + err.Error()
			return
		}
		f(index)
		failed = ""
	}()
	if msg := <-done; msg != "" {
		t.Fatal(msg)
	}
}

func sinkDevice() (int, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return 0, err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return 0, err
	}
	// A TUN device that nobody reads: it has no neighbours to look for, and drops what its queue does not hold.
	tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "sink"}, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI, Queues: 1}
	if err := netlink.LinkAdd(tun); err != nil {
		return 0, err
	}
	link, err := netlink.LinkByName("sink")
	if err != nil {
		return 0, err
	}
	for _, s := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
		addr, err := netlink.ParseAddr(s)
		if err != nil {
			return 0, err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			return 0, err
		}
	}
	return link.Attrs().Index, netlink.LinkSetUp(link)
}

// sockaddr is a netip.AddrPort for the kernel.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// rawSocket opens a socket that is closed with the test.
func rawSocket(t testing.TB, family, typ int) *sock {
	t.Helper()
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatalf("socket: %v", err)
	}
	s := &sock{fd: fd}
	t.Cleanup(s.close)
	return s
}

// sock is a socket that is closed once.
type sock struct{ fd int }

func (s *sock) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

// connect begins or makes a connection.
func (s *sock) connect(t testing.TB, to netip.AddrPort) {
	t.Helper()
	if err := unix.Connect(s.fd, sockaddr(to)); err != nil && err != unix.EINPROGRESS {
		t.Fatalf("connect to %v: %v", to, err)
	}
}

// localOf gives the address a socket is bound to, unmapped.
func localOf(t testing.TB, s *sock) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		t.Fatalf("getsockname: %v", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	default:
		t.Fatalf("getsockname: %T", sa)
		return netip.AddrPort{}
	}
}

// inodeOf gives the inode of a socket of ours.
func inodeOf(t testing.TB, s *sock) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		t.Fatalf("fstat: %v", err)
	}
	return uint32(st.Ino)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openHere(t testing.TB) *Diag {
	t.Helper()
	d, err := OpenHere()
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}
