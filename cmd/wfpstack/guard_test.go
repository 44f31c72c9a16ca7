package main

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
)

// permit is a decision that no filter made.
var permit = &layers.Decision{Action: layers.Permit, Reason: layers.ReasonDefault}

func TestGuard(t *testing.T) {
	stack4, stack6 := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd77::1")
	own := netip.MustParseAddr("203.0.113.7")
	guards := map[bool]*guard{}
	for _, hostLoopback := range []bool{false, true} {
		g, err := newGuard(hostLoopback, stack4, stack6, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		if !hostLoopback {
			// The machine's own addresses are there too; one that is known goes with them.
			with := g.own.Load().InsertPersist(netip.PrefixFrom(own, own.BitLen()))
			g.own.Store(with)
		}
		guards[hostLoopback] = g
	}
	const none, loop, meta = layers.ReasonNone, layers.ReasonLoopbackGuard, layers.ReasonMetadataGuard
	for _, tt := range []struct {
		addr           string
		closed, opened layers.Reason // without and with --host-loopback
	}{
		{"198.51.100.1", none, none},
		{"2001:db8::1", none, none},
		{"127.0.0.1", loop, none},
		{"127.255.255.254", loop, none},
		{"::1", loop, none},
		{"::ffff:127.0.0.1", loop, none},
		{"0.0.0.0", loop, none},
		{"0.1.2.3", loop, none},
		{"::", loop, none},
		{"198.18.0.1", loop, none},
		{"fd77::1", loop, none},
		{"203.0.113.7", loop, none},
		{"::ffff:203.0.113.7", loop, none},
		{"169.254.169.254", meta, meta},
		{"169.254.0.1", meta, meta},
		{"::ffff:169.254.169.254", meta, meta},
		{"fd00:ec2::254", meta, meta},
		{"169.253.255.255", none, none},
		{"fd00:ec2::253", none, none},
	} {
		a := netip.MustParseAddr(tt.addr)
		for _, c := range []struct {
			name string
			got  layers.Reason
			want layers.Reason
		}{
			{"closed", guards[false].Check(a, permit), tt.closed},
			{"with --host-loopback", guards[true].Check(a, permit), tt.opened},
		} {
			if c.got != c.want {
				t.Errorf("%s, %s: %v, want %v", tt.addr, c.name, c.got, c.want)
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() { guards[false].Check(own, permit) }); n != 0 {
		t.Errorf("%v allocations a check", n)
	}
}

// TestGuardKnowsTheMachine refuses every address that this machine has.
func TestGuardKnowsTheMachine(t *testing.T) {
	g, err := newGuard(false, netip.Addr{}, netip.Addr{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.(*net.IPNet).IP)
		if r := g.Check(ip, permit); r != layers.ReasonLoopbackGuard {
			t.Errorf("%v: %v", ip, r)
		}
	}
}

const guardNamespace = "WFPSTACK_TEST_GUARD_NAMESPACE"

// TestGuardFollows adds an address to the machine and takes it away again, in a network namespace of its own.
func TestGuardFollows(t *testing.T) {
	if os.Getenv(guardNamespace) == "" {
		need.UserNS(t)
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestGuardFollows$", "-test.v=true")
		cmd.Env = append(os.Environ(), guardNamespace+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestGuardFollows") {
			t.Fatalf("in a namespace: %v\n%s", err, out)
		}
		return
	}
	g, err := newGuard(false, netip.Addr{}, netip.Addr{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	refused := func(a netip.Addr) func() bool {
		return func() bool { return g.Check(a, permit) == layers.ReasonLoopbackGuard }
	}
	for _, text := range []string{"203.0.113.9/32", "2001:db8::9/128"} {
		p := netip.MustParsePrefix(text)
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if r := g.Check(p.Addr(), permit); r != layers.ReasonNone {
			t.Errorf("%v before it is ours: %v", p, r)
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the new address to be refused", refused(p.Addr()))
		if err := netlink.AddrDel(lo, addr); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the old address to be allowed", func() bool { return !refused(p.Addr())() })
	}
	// What only the routing table knows: prefixes that are delivered locally, and all of the prefix of an address of lo.
	for _, tt := range []struct {
		route, inside, outside string
		kind                   int
	}{
		{"10.99.0.0/24", "10.99.0.200", "10.99.1.1", unix.RTN_LOCAL},
		{"2001:db8:99::/64", "2001:db8:99::1:2", "2001:db8:98::1", unix.RTN_LOCAL},
		{"2001:db8:97::/128", "2001:db8:97::", "2001:db8:97::1", unix.RTN_ANYCAST},
		{"10.98.0.255/32", "10.98.0.255", "10.98.0.254", unix.RTN_BROADCAST},
	} {
		p, inside := netip.MustParsePrefix(tt.route), netip.MustParseAddr(tt.inside)
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(p), Table: unix.RT_TABLE_LOCAL, Type: tt.kind}
		if p.Addr().Is4() {
			route.Scope = netlink.SCOPE_HOST
		}
		if refused(inside)() {
			t.Errorf("%v is refused before %v is routed", inside, p)
		}
		if err := netlink.RouteAdd(route); err != nil {
			t.Fatalf("%v: %v", p, err)
		}
		eventually(t, tt.inside+" to be refused", refused(inside))
		if refused(netip.MustParseAddr(tt.outside))() {
			t.Errorf("%s is refused with %v", tt.outside, p)
		}
		if err := netlink.RouteDel(route); err != nil {
			t.Fatalf("%v: %v", p, err)
		}
		eventually(t, tt.inside+" to be allowed", func() bool { return !refused(inside)() })
	}
	p := netip.MustParsePrefix("10.97.0.1/24")
	if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the whole prefix of an address of lo to be refused", refused(netip.MustParseAddr("10.97.0.77")))
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
