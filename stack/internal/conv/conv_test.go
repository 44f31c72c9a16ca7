package conv

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/wfpstack/wfpstack/layers"
)

func TestAddressesGoThereAndBack(t *testing.T) {
	for _, s := range []string{"0.0.0.0", "198.18.0.1", "255.255.255.255", "::", "::1", "fd77::2", "::ffff:10.0.0.1"} {
		a := netip.MustParseAddr(s)
		if got := Addr(Address(a)); got != a {
			t.Errorf("Addr(Address(%v)) = %v", a, got)
		}
	}
	if got := Addr(tcpip.Address{}); got.IsValid() {
		t.Errorf("empty address = %v, want the zero Addr", got)
	}
	if got := Address(netip.Addr{}); got.Len() != 0 {
		t.Errorf("zero Addr = %v, want an empty address", got)
	}
	if n := testing.AllocsPerRun(100, func() { _ = Addr(Address(netip.IPv6LinkLocalAllNodes())) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func TestFullAddressNamesTheWildcardByNothing(t *testing.T) {
	for _, c := range []struct {
		in   string
		want tcpip.FullAddress
	}{
		{"0.0.0.0:80", tcpip.FullAddress{Port: 80}},
		{"[::]:80", tcpip.FullAddress{Port: 80}},
		{"10.0.0.1:80", tcpip.FullAddress{Port: 80, Addr: tcpip.AddrFrom4([4]byte{10, 0, 0, 1})}},
		{"[::ffff:10.0.0.1]:80", tcpip.FullAddress{Port: 80, Addr: tcpip.AddrFrom4([4]byte{10, 0, 0, 1})}},
	} {
		if got := FullAddress(netip.MustParseAddrPort(c.in)); got != c.want {
			t.Errorf("FullAddress(%s) = %+v, want %+v", c.in, got, c.want)
		}
	}
	mapped := tcpip.FullAddress{Addr: Address(netip.MustParseAddr("::ffff:10.0.0.1")), Port: 7}
	if got, want := AddrPort(mapped), netip.MustParseAddrPort("10.0.0.1:7"); got != want {
		t.Errorf("AddrPort(mapped) = %v, want %v", got, want)
	}
}

func TestSubnets(t *testing.T) {
	for _, s := range []string{"0.0.0.0/0", "10.1.2.3/8", "198.18.0.1/24", "192.0.2.1/32", "::/0", "fd77::2/64", "2001:db8::1/127"} {
		p := netip.MustParsePrefix(s)
		got, err := Subnet(p)
		if err != nil {
			t.Errorf("Subnet(%v): %v", p, err)
			continue
		}
		if Addr(got.ID()) != p.Masked().Addr() || got.Prefix() != p.Bits() {
			t.Errorf("Subnet(%v) = %v", p, got)
		}
	}
	if _, err := Subnet(netip.Prefix{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("Subnet(invalid) = %v, want EINVAL", err)
	}
}

func TestFamilies(t *testing.T) {
	for _, c := range []struct {
		addr string
		want layers.Family
		num  tcpip.NetworkProtocolNumber
	}{
		{"10.0.0.1", layers.V4, header.IPv4ProtocolNumber},
		{"fd77::1", layers.V6, header.IPv6ProtocolNumber},
	} {
		a := netip.MustParseAddr(c.addr)
		if FamilyOf(a) != c.want || NetworkProtocol(a) != c.num || Family(c.num) != c.want {
			t.Errorf("%v: %v, %d, %v", a, FamilyOf(a), NetworkProtocol(a), Family(c.num))
		}
	}
	if FamilyOf(netip.MustParseAddr("::ffff:10.0.0.1")) != layers.V4 {
		t.Error("a v4-mapped address is not IPv4")
	}
	if HookFamily(stack.IP) != layers.V4 || HookFamily(stack.IP6) != layers.V6 {
		t.Error("hook families are swapped")
	}
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		in   tcpip.Error
		want syscall.Errno
	}{
		{&tcpip.ErrConnectionRefused{}, syscall.ECONNREFUSED},
		{&tcpip.ErrConnectionReset{}, syscall.ECONNRESET},
		{&tcpip.ErrConnectionAborted{}, syscall.ECONNABORTED},
		{&tcpip.ErrTimeout{}, syscall.ETIMEDOUT},
		{&tcpip.ErrHostUnreachable{}, syscall.EHOSTUNREACH},
		{&tcpip.ErrNetworkUnreachable{}, syscall.ENETUNREACH},
		{&tcpip.ErrPortInUse{}, syscall.EADDRINUSE},
		{&tcpip.ErrBadLocalAddress{}, syscall.EADDRNOTAVAIL},
		{&tcpip.ErrClosedForSend{}, syscall.EPIPE},
		{&tcpip.ErrMessageTooLong{}, syscall.EMSGSIZE},
		{&tcpip.ErrWouldBlock{}, syscall.EAGAIN},
		{&tcpip.ErrConnectStarted{}, syscall.EINPROGRESS},
		{&tcpip.ErrNotPermitted{}, syscall.EPERM},
		{&tcpip.ErrNoBufferSpace{}, syscall.ENOBUFS},
		{&tcpip.ErrMulticastInputCannotBeOutput{}, syscall.EINVAL},
	} {
		if got := Errno(c.in); !errors.Is(got, c.want) {
			t.Errorf("Errno(%v) = %v, want %v", c.in, got, c.want)
		}
	}
	if got := Errno(nil); got != nil {
		t.Errorf("Errno(nil) = %v", got)
	}
}
