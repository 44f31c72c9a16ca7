package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/wfpstack/wfpstack/stack/gateway"
)

func TestParsePublish(t *testing.T) {
	p4, p6 := netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd77::2")
	for _, tt := range []struct {
		text string
		ipv6 bool
		want string // host>program/udp, a space between two; or the problem
		bad  bool
	}{
		{"8080:80", true, "0.0.0.0:8080>198.18.0.2:80 [::]:8080>[fd77::2]:80", false},
		{"8080:80", false, "0.0.0.0:8080>198.18.0.2:80", false},
		{"8080:80/tcp", false, "0.0.0.0:8080>198.18.0.2:80", false},
		{"53:5353/udp", false, "0.0.0.0:53>198.18.0.2:5353/udp", false},
		{"53:5353/UDP", false, "0.0.0.0:53>198.18.0.2:5353/udp", false},
		{"127.0.0.1:8080:80", true, "127.0.0.1:8080>198.18.0.2:80", false},
		{"[::1]:8080:80", true, "[::1]:8080>[fd77::2]:80", false},
		{"2001:db8::1:8080:80", true, "[2001:db8::1]:8080>[fd77::2]:80", false},
		{"[::ffff:127.0.0.1]:8080:80", true, "127.0.0.1:8080>198.18.0.2:80", false},
		{"80", true, "-p 80:80", true},
		{"", true, "program's port is missing", true},
		{"0:80", true, `"0" is no port`, true},
		{"80:65536", true, `"65536" is no port`, true},
		{"80:80/sctp", true, `protocol "sctp"`, true},
		{"localhost:80:80", true, `"localhost" is no address`, true},
		{"80:", true, `"" is no port`, true},
		{":80", true, `"" is no port`, true},
	} {
		got, err := parsePublish(tt.text, p4, p6, tt.ipv6)
		if tt.bad {
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("-p %s: %v, want an error with %q", tt.text, err, tt.want)
			}
			continue
		}
		if s := publishText(got); err != nil || s != tt.want {
			t.Errorf("-p %s: %s, %v, want %s", tt.text, s, err, tt.want)
		}
	}
}

// FuzzParsePublish accepts nothing that could not be bound.
func FuzzParsePublish(f *testing.F) {
	for _, seed := range []string{"8080:80", "[::1]:8080:80/udp", "127.0.0.1:1:2/tcp", ":::", "[:1:2", "fe80::1%eth0:1:2"} {
		f.Add(seed)
	}
	p4, p6 := netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd77::2")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parsePublish(text, p4, p6, true)
		if (err == nil) != (len(all) > 0) {
			t.Fatalf("%q: %d ports and error %v", text, len(all), err)
		}
		for _, p := range all {
			if !p.Host.IsValid() || p.Host.Port() == 0 || p.Program.Port() == 0 || p.Host.Addr().Is4() != p.Program.Addr().Is4() {
				t.Errorf("%q: %v to %v", text, p.Host, p.Program)
			}
		}
	})
}

// FuzzParseNetwork accepts nothing in which program and stack could not talk to one another.
func FuzzParseNetwork(f *testing.F) {
	for _, seed := range []string{"10.0.0.2/24", "fd00::2/64", "0.0.0.1/0", "255.255.255.254/30", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/126", "::1/0"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := parseNetwork([]string{text})
		if err != nil {
			return
		}
		for _, pair := range []struct {
			program netip.Prefix
			stack   netip.Addr
		}{{n.program4, n.stack4}, {n.program6, n.stack6}} {
			if !pair.program.Contains(pair.stack) || pair.program.Addr() == pair.stack || pair.stack == pair.program.Masked().Addr() {
				t.Errorf("%q: program %v, stack %v", text, pair.program, pair.stack)
			}
		}
	})
}

func publishText(all []gateway.Publish) string {
	var parts []string
	for _, p := range all {
		s := fmt.Sprintf("%v>%v", p.Host, p.Program)
		if p.UDP {
			s += "/udp"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

func TestParseNetwork(t *testing.T) {
	for _, tt := range []struct {
		name  string
		texts []string
		want  string // program4 stack4 program6 stack6; or the problem
		bad   bool
	}{
		{"defaults", nil, "198.18.0.2/24 198.18.0.1 fd77::2/64 fd77::1", false},
		{"IPv4", []string{"10.9.0.5/16"}, "10.9.0.5/16 10.9.0.1 fd77::2/64 fd77::1", false},
		{"the first address is the program's", []string{"10.9.0.1/24"}, "10.9.0.1/24 10.9.0.2 fd77::2/64 fd77::1", false},
		{"both", []string{"10.9.0.2/30", "fd00::9/126"}, "10.9.0.2/30 10.9.0.1 fd00::9/126 fd00::a", false},
		{"both, the other way round", []string{"10.9.0.2/30", "fd00::a/126"}, "10.9.0.2/30 10.9.0.1 fd00::a/126 fd00::9", false},
		{"two of a family", []string{"10.9.0.2/24", "10.8.0.2/24"}, "a second address", true},
		{"no length", []string{"10.9.0.2"}, "not an address with a prefix length", true},
		{"no room", []string{"10.9.0.2/31"}, "needs room", true},
		{"one address", []string{"10.9.0.2/32"}, "needs room", true},
		{"no host part", []string{"10.9.0.0/24"}, "needs room", true},
		{"loopback", []string{"127.0.0.5/8"}, "is a loopback address", true},
		{"loopback", []string{"::5/64"}, "::1 is a loopback address", true},
		{"this network", []string{"0.0.0.5/24"}, "no address of a host", true},
		{"this network, for the stack", []string{"1.2.3.4/1"}, "0.0.0.1 is no address of a host", true},
		{"multicast", []string{"224.0.0.5/24"}, "is a multicast address", true},
		{"multicast", []string{"ff02::5/64"}, "is a multicast address", true},
		{"broadcast", []string{"10.9.0.255/24"}, "broadcast address", true},
		{"mapped", []string{"::ffff:10.9.0.2/120"}, "not an address", true},
	} {
		n, err := parseNetwork(tt.texts)
		got := fmt.Sprintf("%v %v %v %v", n.program4, n.stack4, n.program6, n.stack6)
		switch {
		case tt.bad:
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v, want an error with %q", tt.name, err, tt.want)
			}
		case err != nil || got != tt.want:
			t.Errorf("%s: %s, %v, want %s", tt.name, got, err, tt.want)
		}
	}
}

func TestEditDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"alow", "allow", 1}, {"block", "blcok", 2}, {"kitten", "sitting", 3}, {"x", "x", 0}} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q to %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestNearestFlag(t *testing.T) {
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	var f commonFlags
	f.register(flags)
	for _, tt := range []struct{ name, want string }{
		{"alow", "allow"}, {"evnts", "events"}, {"host-lopback", "host-loopback"}, {"zzzzzz", ""}, {"trace-layer", "trace-layers"}, {"deafult", "default"},
	} {
		if got := nearestFlag(flags, tt.name); got != tt.want {
			t.Errorf("--%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestInstanceNames(t *testing.T) {
	for _, tt := range []struct {
		name string
		ok   bool
	}{{"a", true}, {"build-7.x_y", true}, {"", false}, {"..", false}, {".a", false}, {"-a", false}, {"a/b", false}, {"a b", false}, {"ä", false},
		{strings.Repeat("a", 64), true}, {strings.Repeat("a", 65), false}} {
		if err := checkInstanceName(tt.name); (err == nil) != tt.ok {
			t.Errorf("%q: %v", tt.name, err)
		}
	}
}
