package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
)

func TestParseSpec(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"*", "any"},
		{"*:25/tcp", "any [25] 6"},
		{"example.com", "example.com"},
		{"Example.COM.", "example.com"},
		{".example.com:80,443/tcp", ".example.com [80 443] 6"},
		{"host.wfpstack.internal:8000/tcp", "host.wfpstack.internal [8000] 6"},
		{"_dmarc.example.com/UDP", "_dmarc.example.com 17"},
		{"example.com:8000-8100,9000", "example.com [8000-8100 9000]"},
		{"dead:80", "dead [80]"},
		{"1password.com", "1password.com"},
		{"10.0.0.0/8", "10.0.0.0/8"},
		{"10.1.2.3/8", "10.0.0.0/8"},
		{"10.0.0.1", "10.0.0.1/32"},
		{"10.0.0.1:443", "10.0.0.1/32 [443]"},
		{"10.0.0.0/8:53/udp", "10.0.0.0/8 [53] 17"},
		{"10.0.0.0/8/icmp", "10.0.0.0/8 1"},
		{"0.0.0.0/0", "0.0.0.0/0"},
		{"::/0", "::/0"},
		{"2001:db8::1", "2001:db8::1/128"},
		{"2001:db8::/32/tcp", "2001:db8::/32 6"},
		{"[2001:db8::1]:443/tcp", "2001:db8::1/128 [443] 6"},
		{"[2001:db8::1]", "2001:db8::1/128"},
		{"[2001:db8::]/32:1-65535", "2001:db8::/32 [1-65535]"},
		{"[2001:db8::/32]:443", "2001:db8::/32 [443]"},
		{"::ffff:192.0.2.1", "192.0.2.1/32"},
		{"[::ffff:192.0.2.0]/120:1", "192.0.2.0/24 [1]"},
	} {
		s, err := ParseSpec(tc.in)
		if err != nil {
			t.Errorf("%s: %v", tc.in, err)
			continue
		}
		if got := describe(s); got != tc.want || s.Text != tc.in {
			t.Errorf("%s: got %s, want %s", tc.in, got, tc.want)
		}
	}
}

func describe(s Spec) string {
	var parts []string
	if s.Any {
		parts = append(parts, "any")
	}
	if s.Name != "" {
		parts = append(parts, s.Name)
	}
	if s.Prefix.IsValid() {
		parts = append(parts, s.Prefix.String())
	}
	if len(s.Ports) > 0 {
		var ports []string
		for _, r := range s.Ports {
			p := fmt.Sprint(r.Low)
			if r.High != r.Low {
				p += fmt.Sprint("-", r.High)
			}
			ports = append(ports, p)
		}
		parts = append(parts, "["+strings.Join(ports, " ")+"]")
	}
	if s.Protocol != 0 {
		parts = append(parts, fmt.Sprint(s.Protocol))
	}
	return strings.Join(parts, " ")
}

// TestSpecErrors compares every message with testdata/spec_errors.txt.
func TestSpecErrors(t *testing.T) {
	var b strings.Builder
	for _, in := range []string{
		"", " ", "a b", "example.com\x1b[31m", "exämple.com", ":80", "/tcp",
		"example.com:70000/tcp", "example.com:0", "example.com:", "example.com:80,", "example.com:80,,443", "example.com:https", "example.com:x",
		"example.com:90-80", "example.com:80-", "example.com:80:443", "example.com:99999999999999999999999",
		"example.com/tpc", "example.com/", "example.com/sctp", "example.com/tcp/udp", "example.com/tcp:80", "example.com/24",
		"*.example.com", "a*.example.com", "example..com", "-a.example.com", "a!b.com", ".", "..", strings.Repeat("a", 64) + ".com",
		strings.Repeat("abcdefgh.", 40) + "com",
		"300.1.1.1", "10.0.0", "10.0.0.0/33", "10.0.0.0/8x", "010.0.0.1", "10.0.0.0/8/tcp/8",
		"2001:db8::1:443:80:1:1:1:1:1", "2001:db8::g", "[2001:db8::1", "[2001:db8::1]x", "[10.0.0.1]:80", "[]", "2001:db8::/129", "2001:db8::/32:443",
		"[2001:db8::/32]/32", "[fe80::1%eth0]:80", "fe80::1%eth0",
		"example.com:80/icmp", strings.Repeat("a", MaxSpecLen+1), "*:" + strings.Repeat("1,", MaxSpecPorts) + "1",
	} {
		_, err := ParseSpec(in)
		var e *SpecError
		if !errors.As(err, &e) || !errors.Is(err, ErrSpec) || !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("%q: got %v, want a *SpecError", in, err)
			continue
		}
		fmt.Fprintf(&b, "%s\n\n", err)
	}
	golden(t, "spec_errors.txt", b.String())
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"*", ".example.com:80,443/tcp", "[2001:db8::]/32:8000-8100/udp", "10.0.0.0/8/icmp", "[::1", "a:b:c", "x/\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseSpec(text)
		if err != nil {
			var e *SpecError
			if !errors.As(err, &e) || e.At < 0 || e.At > len(text) {
				t.Fatalf("%q: %#v", text, err)
			}
			if msg := e.Error(); strings.ContainsAny(msg, "\x1b\x00\r") || strings.Count(msg, "\n") != 2 {
				t.Fatalf("%q: message %q", text, msg)
			}
			return
		}
		kinds := 0
		for _, is := range []bool{s.Any, s.Name != "", s.Prefix.IsValid()} {
			if is {
				kinds++
			}
		}
		if kinds != 1 {
			t.Fatalf("%q: %+v has %d destinations", text, s, kinds)
		}
		for _, r := range s.Ports {
			if r.Low == 0 || r.Low > r.High {
				t.Fatalf("%q: ports %v", text, r)
			}
		}
		if s.Prefix.IsValid() && s.Prefix != s.Prefix.Masked() {
			t.Fatalf("%q: %v has host bits", text, s.Prefix)
		}
		// What was understood can be installed.
		e := newEngine(t)
		in, err := Apply(e, Config{Allow: []Spec{s}}, Deps{StackAddrs: []netip.Addr{stack4, stack6}})
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if in.NumFilters() == 0 {
			t.Fatalf("%q: no filter", text)
		}
	})
}
