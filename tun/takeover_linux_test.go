package tun_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/tun"
)

func TestTakeover(t *testing.T) {
	const name = "wfpt"
	leftover := func(o tun.Options) func(testing.TB) {
		return func(t testing.TB) {
			o.Name, o.Persist = name, true
			if err := open(t, o).Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	admin := func(args ...string) func(testing.TB) {
		return func(t testing.TB) { ip(t, args...) }
	}
	for _, row := range []struct {
		name   string
		before func(testing.TB)
		open   tun.Options
		want   error  // of Open
		cure   string // in its text
		stays  bool   // after Close
	}{
		{"left by one of ours", leftover(tun.Options{}), tun.Options{}, nil, "", false},
		{"left, and to be left again", leftover(tun.Options{}), tun.Options{Persist: true}, nil, "", true},
		{"left by the portable path", leftover(tun.Options{NoOffload: true}), tun.Options{}, nil, "", false},
		{"left by the fast path", leftover(tun.Options{}), tun.Options{NoOffload: true}, nil, "", false},
		{"left with several queues, one wanted", leftover(tun.Options{Queues: 4}), tun.Options{}, nil, "", false},
		{"left with several queues, portable wanted", leftover(tun.Options{Queues: 4}), tun.Options{NoOffload: true}, nil, "", false},
		{"left with several queues, several wanted", leftover(tun.Options{Queues: 4}), tun.Options{Queues: 2}, nil, "", false},
		{"left with one queue, several wanted", leftover(tun.Options{}), tun.Options{Queues: 2}, tun.ErrKind, "ip link delete wfpt", true},
		{"an administrator's", admin("tuntap", "add", "dev", name, "mode", "tun"), tun.Options{}, nil, "", true},
		{"a TAP", admin("tuntap", "add", "dev", name, "mode", "tap"), tun.Options{}, tun.ErrKind, "ip link delete wfpt", true},
		{"not a TUN at all", admin("link", "add", name, "type", "veth"), tun.Options{}, tun.ErrKind, "ip link delete wfpt", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			inNamespace(t)
			row.before(t)
			if !exists(name) {
				t.Fatal("nothing was left to take over")
			}
			row.open.Name, row.open.MTU = name, 1400
			d, err := tun.Open(row.open)
			if row.want != nil {
				wantErr(t, "Open", err, row.want)
				if !strings.Contains(err.Error(), row.cure) {
					t.Errorf("error %q does not name the cure %q", err, row.cure)
				}
			} else if err != nil {
				t.Fatalf("Open: %v", err)
			} else {
				if d.MTU() != 1400 {
					t.Errorf("MTU %d, want 1400", d.MTU())
				}
				checkEcho(t, d)
				d.Close()
			}
			if got := exists(name); got != row.stays {
				t.Errorf("interface there after Close: %v, want %v", got, row.stays)
			}
		})
	}
}

// checkEcho sees that a datagram of the kernel comes out of the device.
func checkEcho(t *testing.T, d tun.Device) {
	t.Helper()
	if err := tun.Configure(d.Name(), tun.Config{Up: true, Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}}); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("udp", "10.9.0.2:99")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if b := readMatching(t, d, isUDPTo(99)); string(b[28:]) != "hello" {
		t.Errorf("read %q", b[28:])
	}
}
