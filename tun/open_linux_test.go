package tun_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/tun"
)

// newNamespace makes a process start in a network namespace of its own.
func newNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
}

func TestOpenInUse(t *testing.T) {
	for _, first := range []tun.Options{{}, {Queues: 2}, {NoOffload: true}} {
		for _, second := range []tun.Options{{}, {Queues: 2}, {NoOffload: true}} {
			inNamespace(t)
			first.Name, second.Name = "wfpt", "wfpt"
			d := open(t, first)
			_, err := tun.Open(second)
			if second.Queues > first.Queues && errors.Is(err, tun.ErrKind) {
				t.Errorf("%+v then %+v: %v: in use is the nearer cause", first, second, err)
			}
			wantErr(t, "second Open", err, tun.ErrInUse)
			if !strings.Contains(err.Error(), "wfpt") || !strings.Contains(err.Error(), "choose another name") {
				t.Errorf("error without name or cure: %v", err)
			}
			d.Close()
			open(t, second).Close()
		}
	}
}

func TestOpenBadOptions(t *testing.T) {
	for _, row := range []struct {
		name string
		o    tun.Options
		want error
		text string
	}{
		{"name too long", tun.Options{Name: "sixteen-bytes-16"}, tun.ErrName, "limit 15"},
		{"slash", tun.Options{Name: "a/b"}, tun.ErrName, `'/'`},
		{"space", tun.Options{Name: "a b"}, tun.ErrName, `' '`},
		{"escape", tun.Options{Name: "a\x1bb"}, tun.ErrName, `'\x1b'`},
		{"dots", tun.Options{Name: ".."}, tun.ErrName, "reserved"},
		{"percent", tun.Options{Name: "a%sb"}, tun.ErrName, "%d"},
		{"MTU too small", tun.Options{MTU: 67}, tun.ErrOption, "68…65535"},
		{"MTU too large", tun.Options{MTU: 65536}, tun.ErrOption, "68…65535"},
		{"queues", tun.Options{Queues: 65}, tun.ErrOption, "1…64"},
		{"negative queues", tun.Options{Queues: -1}, tun.ErrOption, "1…64"},
		{"portable queues", tun.Options{Queues: 2, NoOffload: true}, tun.ErrOption, "one queue"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := tun.Open(row.o)
			wantErr(t, "Open", err, row.want)
			if !strings.Contains(err.Error(), row.text) {
				t.Errorf("error %q does not say %q", err, row.text)
			}
			if e, ok := errors.AsType[*tun.OpError](err); !ok || e.Device != row.o.Name {
				t.Errorf("error %#v is no OpError that names the device", err)
			}
		})
	}
}

func TestOpenNamesByPattern(t *testing.T) {
	inNamespace(t)
	if a, b := open(t, tun.Options{Name: "wfp%d"}), open(t, tun.Options{Name: "wfp%d"}); a.Name() != "wfp0" || b.Name() != "wfp1" {
		t.Errorf("names %s and %s, want wfp0 and wfp1", a.Name(), b.Name())
	}
	if d := open(t, tun.Options{}); d.Name() != "tun0" {
		t.Errorf("name %s, want tun0", d.Name())
	}
}

func TestOpenSetsQueueLength(t *testing.T) {
	inNamespace(t)
	for _, row := range []struct{ ask, want int }{{0, tun.DefaultTxQueueLen}, {77, 77}, {-1, 500}} {
		d := open(t, tun.Options{Name: "wfpt", TxQueueLen: row.ask})
		l, err := netlink.LinkByName("wfpt")
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Attrs().TxQLen; got != row.want {
			t.Errorf("TxQueueLen %d made %d, want %d", row.ask, got, row.want)
		}
		d.Close()
	}
}

func TestOpenWithoutTheRight(t *testing.T) {
	for _, row := range []struct {
		name string
		take func(t *testing.T)
		want error
		cure string
	}{
		{"no device node", func(t *testing.T) { hideNode(t) }, tun.ErrNoTUN, "mknod -m 0666 /dev/net/tun c 10 200"},
		{"no CAP_NET_ADMIN", dropCapabilities, fs.ErrPermission, "ip tuntap add dev wfpt mode tun"},
	} {
		t.Run(row.name, func(t *testing.T) {
			inNamespace(t)
			row.take(t)
			_, err := tun.Open(tun.Options{Name: "wfpt"})
			wantErr(t, "Open", err, row.want)
			if !strings.Contains(err.Error(), row.cure) {
				t.Errorf("error %q does not name the cure %q", err, row.cure)
			}
		})
	}
}

// hideNode covers /dev/net, for the test's thread only.
func hideNode(t *testing.T) {
	t.Helper()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare mounts: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
		t.Fatalf("cover /dev/net: %v", err)
	}
}

// dropCapabilities takes all capabilities but the one to open files from the test's thread, which ends with the test.
func dropCapabilities(t *testing.T) {
	t.Helper()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: 1 << unix.CAP_DAC_OVERRIDE, Permitted: 1 << unix.CAP_DAC_OVERRIDE}}
	if err := unix.Capset(&h, &data[0]); err != nil {
		t.Fatalf("capset: %v", err)
	}
	runtime.LockOSThread()
}

func TestConfigure(t *testing.T) {
	inNamespace(t)
	d := open(t, tun.Options{Name: "wfpt"})
	c := tun.Config{
		MTU: 1400, Up: true, Default: true, TxQueueLen: 99,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd99::1/64")},
		Routes:    []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")},
	}
	for i := range 2 { // the second time it is all there
		if err := tun.Configure("wfpt", c); err != nil {
			t.Fatalf("Configure, time %d: %v", i+1, err)
		}
	}
	addresses := ip(t, "addr", "show", "dev", "wfpt")
	for _, want := range []string{"10.9.0.1/24", "fd99::1/64", "mtu 1400", "qlen 99", ",UP"} {
		if !strings.Contains(addresses, want) {
			t.Errorf("no %q in:\n%s", want, addresses)
		}
	}
	if strings.Contains(addresses, "fd99::1/64 scope global tentative") {
		t.Errorf("the IPv6 address is tentative:\n%s", addresses)
	}
	routes := ip(t, "-4", "route") + ip(t, "-6", "route")
	for _, want := range []string{"default dev wfpt scope link", "192.0.2.0/24 dev wfpt", "2001:db8::/32 dev wfpt", "default dev wfpt metric"} {
		if !strings.Contains(routes, want) {
			t.Errorf("no %q in:\n%s", want, routes)
		}
	}
	waitEvent(t, d, tun.EventMTU)
}

func TestConfigureKeepsTheDefaultRouteOfOthers(t *testing.T) {
	inNamespace(t)
	open(t, tun.Options{Name: "wfpt"})
	open(t, tun.Options{Name: "uplink"})
	ip(t, "link", "set", "uplink", "up")
	ip(t, "route", "add", "default", "dev", "uplink")
	err := tun.Configure("wfpt", tun.Config{Up: true, Default: true, Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}})
	wantErr(t, "Configure", err, unix.EEXIST)
	if got := ip(t, "route"); !strings.Contains(got, "default dev uplink") {
		t.Errorf("the default route was replaced:\n%s", got)
	}
}

func TestConfigureErrors(t *testing.T) {
	for _, row := range []struct {
		name   string
		device string
		c      tun.Config
		take   func(*testing.T)
		want   error
		text   string
	}{
		{"no such interface", "nothere", tun.Config{Up: true}, nil, tun.ErrNotFound, "nothere"},
		{"no name", "", tun.Config{Up: true}, nil, tun.ErrName, "empty"},
		{"bad name", "a/b", tun.Config{Up: true}, nil, tun.ErrName, "'/'"},
		{"bad MTU", "wfpt", tun.Config{MTU: 1 << 20}, nil, tun.ErrOption, "68…65535"},
		{"bad address", "wfpt", tun.Config{Addresses: make([]netip.Prefix, 1)}, nil, tun.ErrOption, "prefix"},
		{"bad route", "wfpt", tun.Config{Up: true, Routes: make([]netip.Prefix, 1)}, nil, tun.ErrOption, "prefix"},
		{"routes while down", "wfpt", tun.Config{Routes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, nil, unix.ENETDOWN, "ip link set wfpt up"},
		{"no right", "wfpt", tun.Config{Up: true}, dropCapabilities, tun.ErrPermission, "CAP_NET_ADMIN"},
	} {
		t.Run(row.name, func(t *testing.T) {
			inNamespace(t)
			open(t, tun.Options{Name: "wfpt"})
			if row.take != nil {
				row.take(t)
			}
			err := tun.Configure(row.device, row.c)
			wantErr(t, "Configure", err, row.want)
			if !strings.Contains(err.Error(), row.text) {
				t.Errorf("error %q does not say %q", err, row.text)
			}
		})
	}
}

// openFiles returns how many descriptors this process has.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestNoDescriptorIsLeft(t *testing.T) {
	inNamespace(t)
	ip(t, "link", "add", "other", "type", "veth")
	held := open(t, tun.Options{Name: "held"})
	round := func() {
		for _, o := range []tun.Options{{Name: "wfpt"}, {Name: "wfpt", Queues: 3}, {Name: "wfpt", NoOffload: true}} {
			open(t, o).Close()
		}
		for _, name := range []string{held.Name(), "other", "a/b"} {
			for _, plain := range []bool{false, true} {
				if _, err := tun.Open(tun.Options{Name: name, NoOffload: plain}); err == nil {
					t.Fatalf("Open(%s) succeeded", name)
				}
			}
		}
		h, err := tun.OpenForHandover(tun.Options{Name: "wfpt", Queues: 2})
		if err != nil {
			t.Fatal(err)
		}
		d, err := tun.AdoptFiles("", 0, h.Files())
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		h.Close()
	}
	round() // what the runtime opens once
	before := openFiles(t)
	for range 5 {
		round()
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	if exists("wfpt") {
		t.Error("the interface is left")
	}
}
