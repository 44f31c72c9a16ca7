package names

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// servers are the rows of tests that run over name servers of both families.
var servers = []string{"192.0.2.53", "2001:db8::53"}

func TestForward(t *testing.T) {
	for _, server := range servers {
		for _, tcp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/tcp=%v", server, tcp), func(t *testing.T) {
				n := newNetwork(t)
				n.serve(server, answering(t, "www.example. 300 IN A 203.0.113.1", "www.example. 300 IN AAAA 2001:db8::1"), "udp", "tcp")
				table := NewTable(TableOptions{})
				r := newResolver(t, n, "nameserver "+server, Options{Table: table})
				req := query("WWW.example", dns.TypeA, edns(4096))
				m := lookup(t, r, req, tcp)
				if got := text(m); got != "NOERROR A 203.0.113.1, AAAA 2001:db8::1" {
					t.Errorf("answer = %s", got)
				}
				if m.Question[0] != req.Question[0] || m.IsEdns0() == nil || !m.RecursionAvailable {
					t.Errorf("question = %v, EDNS %v, want what was asked", m.Question, m.IsEdns0())
				}
				proto := "udp/"
				if tcp {
					proto = "tcp/"
				}
				if d := n.dialled(); len(d) != 1 || !strings.HasPrefix(d[0], proto) {
					t.Errorf("dialled %v, want one %s", d, proto)
				}
				for _, a := range []string{"203.0.113.1", "::ffff:203.0.113.1", "2001:db8::1"} {
					if name, ok := table.NameOf(addr(a)); name != "www.example" || !ok {
						t.Errorf("NameOf(%s) = %q, %v", a, name, ok)
					}
				}
				if s := r.Stats(); s.Queries != 1 || s.Answered != 1 || s.Forwarded != 1 || s.InFlight != 0 {
					t.Errorf("stats = %+v", s)
				}
			})
		}
	}
}

// TestEDNSKept looks at what the name server gets, and at what comes back.
func TestEDNSKept(t *testing.T) {
	n := newNetwork(t)
	got := make(chan *dns.Msg, 1)
	n.serve("192.0.2.53", func(w dns.ResponseWriter, req *dns.Msg) {
		got <- req
		m := new(dns.Msg)
		m.SetReply(req)
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeStaleAnswer, ExtraText: "old"},
			&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}}
		m.Extra = append(m.Extra, opt)
		w.WriteMsg(m)
	}, "udp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{})

	req := query("a.example", dns.TypeTXT, func(m *dns.Msg) { m.SetEdns0(4000, true); m.CheckingDisabled = true })
	subnet := &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}}
	req.IsEdns0().Option = []dns.EDNS0{subnet, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "8899aabbccddeeff"}}
	m := lookup(t, r, req, false)
	up := <-got
	if opt := up.IsEdns0(); opt == nil || !opt.Do() || !up.CheckingDisabled || opt.UDPSize() != upstreamSize || len(opt.Option) != 1 || opt.Option[0].Option() != dns.EDNS0SUBNET {
		t.Errorf("forwarded %v, want DO, CD, %d bytes, and the subnet without the cookie", up, upstreamSize)
	}
	if code, extra := ede(m); code != dns.ExtendedErrorCodeStaleAnswer || extra != "old" || len(m.IsEdns0().Option) != 1 || !m.IsEdns0().Do() {
		t.Errorf("answer %v, want the extended error without the cookie", m)
	}

	m = lookup(t, r, query("a.example", dns.TypeTXT), false)
	if up := <-got; up.IsEdns0() != nil || m.IsEdns0() != nil {
		t.Errorf("EDNS of nobody's asking: forwarded %v, answered %v", up.IsEdns0(), m.IsEdns0())
	}
}

// many is an answer of some 8 kB.
func many(t testing.TB) dns.HandlerFunc {
	var lines []string
	for i := range 500 {
		lines = append(lines, fmt.Sprintf("big.example. 60 IN A 203.%d.%d.7", 1+i/250, i%250))
	}
	return answering(t, lines...)
}

func TestLargeAnswers(t *testing.T) {
	n := newNetwork(t)
	big := many(t)
	n.serve("192.0.2.53", func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(req)
		m.Truncated = true
		w.WriteMsg(m)
	}, "udp")
	n.serve("192.0.2.53", big, "tcp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{})
	for _, tc := range []struct {
		name string
		req  *dns.Msg
		tcp  bool
		size int
		tc   bool
	}{
		{"no EDNS", query("big.example", dns.TypeA), false, 512, true},
		{"silly EDNS", query("big.example", dns.TypeA, edns(5)), false, 512, true},
		{"EDNS 1232", query("big.example", dns.TypeA, edns(1232)), false, 1232, true},
		{"EDNS 65535", query("big.example", dns.TypeA, edns(65535)), false, 65507, false},
		{"TCP", query("big.example", dns.TypeA), true, 65535, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := tc.req.Pack()
			must(t, err)
			got := handle(t, r, Query{Msg: b, TCP: tc.tcp, From: client})
			m := new(dns.Msg)
			must(t, m.Unpack(got))
			if len(got) > tc.size || m.Truncated != tc.tc || (len(m.Answer) == 500) == tc.tc || len(m.Answer) == 0 {
				t.Errorf("%d bytes, %d records, truncated %v; want at most %d bytes, truncated %v", len(got), len(m.Answer), m.Truncated, tc.size, tc.tc)
			}
		})
	}
}

func TestTruncatedWithoutTCP(t *testing.T) {
	n := newNetwork(t)
	n.serve("192.0.2.53", func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(req)
		m.Truncated = true
		m.Answer = rrs(t, "a.example. 1 IN A 203.0.113.1")
		b, _ := m.Pack()
		w.Write(b[:len(b)-3]) // ends inside the record
	}, "udp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{})
	if m := lookup(t, r, query("a.example", dns.TypeA), false); m.Rcode != dns.RcodeSuccess || !m.Truncated || len(m.Question) != 1 {
		t.Errorf("answer = %v, want it truncated", m)
	}
	// A program that comes over TCP gets what datagrams give, where that is whole.
	n.serve("192.0.2.54", answering(t, "a.example. 1 IN A 203.0.113.1"), "udp")
	r = newResolver(t, n, "nameserver 192.0.2.54", Options{})
	if got := text(lookup(t, r, query("a.example", dns.TypeA), true)); got != "NOERROR A 203.0.113.1" {
		t.Errorf("over TCP with a server that has none: %s", got)
	}
}

func TestNextServer(t *testing.T) {
	good := "NOERROR A 203.0.113.1"
	for _, tc := range []struct {
		name  string
		first dns.HandlerFunc
		want  string
	}{
		{"silent", silent, good},
		{"SERVFAIL", rcode(dns.RcodeServerFailure), good},
		{"REFUSED", rcode(dns.RcodeRefused), good},
		{"garbage", func(w dns.ResponseWriter, req *dns.Msg) {
			b, _ := req.Pack()
			b[2] |= 0x80
			b[7] = 9 // records that are not there
			w.Write(b)
		}, good},
		{"NXDOMAIN is an answer", rcode(dns.RcodeNameError), "NXDOMAIN "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNetwork(t)
			n.serve("192.0.2.1", tc.first, "udp")
			n.serve("192.0.2.2", answering(t, "a.example. 60 IN A 203.0.113.1"), "udp")
			r := newResolver(t, n, "nameserver 192.0.2.1\nnameserver 192.0.2.2", Options{Timeout: 100 * time.Millisecond})
			if got := text(lookup(t, r, query("a.example", dns.TypeA), false)); got != tc.want {
				t.Errorf("answer = %q, want %q", got, tc.want)
			}
		})
	}
}

func TestServerHealthAndRotation(t *testing.T) {
	clk := newClock()
	n := newNetwork(t)
	n.serve("192.0.2.2", answering(t, "a.example. 60 IN A 203.0.113.1"), "udp")
	n.serve("192.0.2.3", answering(t, "a.example. 60 IN A 203.0.113.1"), "udp")
	const one, two, three = "udp/192.0.2.1:53", "udp/192.0.2.2:53", "udp/192.0.2.3:53"
	r := newResolver(t, n, "nameserver 192.0.2.1\nnameserver 192.0.2.2", Options{Now: clk.Now})
	ask := func(want ...string) {
		t.Helper()
		if m := lookup(t, r, query("a.example", dns.TypeA), false); m.Rcode != dns.RcodeSuccess {
			t.Fatalf("answer = %v", m)
		}
		if got := n.dialled(); !slices.Equal(got, want) {
			t.Errorf("dialled %v, want %v", got, want)
		}
	}
	ask(one, two)
	ask(two) // the first one is down
	clk.add(downFor)
	ask(one, two)

	must(t, os.WriteFile(r.opt.ResolvConf, []byte("options rotate\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n"), 0o644))
	ask(two)
	ask(three)
	ask(two)
	must(t, os.WriteFile(r.opt.ResolvConf, []byte("nameserver 192.0.2.3\n"), 0o644))
	ask(three)
}

func TestNobodyAnswers(t *testing.T) {
	n := newNetwork(t)
	n.serve("192.0.2.1", silent, "udp")
	n.serve("192.0.2.9", rcode(dns.RcodeServerFailure), "udp")
	for _, tc := range []struct {
		name, resolv string
		opt          Options
		code         uint16
		extra        string
	}{
		{"all silent", "nameserver 192.0.2.1\nnameserver 192.0.2.2\noptions attempts:2", Options{Timeout: 50 * time.Millisecond},
			dns.ExtendedErrorCodeNoReachableAuthority, "192.0.2.1: no answer in time; 192.0.2.2: no answer in time"},
		{"deadline", "nameserver 192.0.2.1", Options{Deadline: 50 * time.Millisecond}, dns.ExtendedErrorCodeNoReachableAuthority, "192.0.2.1: no answer in time"},
		{"none configured", "# nothing", Options{}, dns.ExtendedErrorCodeNotReady, "no name server is configured in "},
		{"only ourselves", "nameserver 198.18.0.1", Options{StackAddrs: []netip.Addr{addr("198.18.0.1")}}, dns.ExtendedErrorCodeNotReady, "no name server"},
		{"SERVFAIL passes", "nameserver 192.0.2.9", Options{}, 0xffff, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newResolver(t, n, tc.resolv, tc.opt)
			m := lookup(t, r, query("a.example", dns.TypeA, edns(1232)), false)
			code, extra := ede(m)
			if m.Rcode != dns.RcodeServerFailure || code != tc.code || !strings.HasPrefix(extra, tc.extra) {
				t.Errorf("answer = %v, want SERVFAIL with extended error %d %q", m, tc.code, tc.extra)
			}
			if m = lookup(t, r, query("a.example", dns.TypeA), false); m.Rcode != dns.RcodeServerFailure || m.IsEdns0() != nil {
				t.Errorf("answer without EDNS = %v", m)
			}
		})
	}
	r := newResolver(t, n, "", Options{})
	must(t, os.Remove(r.opt.ResolvConf))
	m := lookup(t, r, query("a.example", dns.TypeA, edns(1232)), false)
	if code, extra := ede(m); code != dns.ExtendedErrorCodeNotReady || !strings.Contains(extra, "no such file") {
		t.Errorf("without resolv.conf: %v", m)
	}
}

func TestSpoofedAnswersAreDropped(t *testing.T) {
	for _, tc := range []struct {
		name  string
		forge func(m *dns.Msg)
	}{
		{"another id", func(m *dns.Msg) { m.Id++ }},
		{"another name", func(m *dns.Msg) { m.Question[0].Name = "b.example." }},
		{"another type", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX }},
		{"another class", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }},
		{"no question", func(m *dns.Msg) { m.Question = nil }},
		{"two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }},
		{"a question", func(m *dns.Msg) { m.Response = false }},
		{"another opcode", func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNetwork(t)
			n.serve("192.0.2.53", func(w dns.ResponseWriter, req *dns.Msg) {
				forged := new(dns.Msg)
				forged.SetReply(req)
				forged.Answer = rrs(t, "a.example. 60 IN A 198.51.100.66")
				tc.forge(forged)
				b, err := forged.Pack()
				if err != nil {
					t.Error(err)
				}
				for range 3 {
					w.Write(b)
				}
				w.Write([]byte{1, 2, 3})
				answering(t, "A.EXAMPLE. 60 IN A 203.0.113.1")(w, req)
			}, "udp")
			table := NewTable(TableOptions{})
			r := newResolver(t, n, "nameserver 192.0.2.53", Options{Table: table})
			if got := text(lookup(t, r, query("a.example", dns.TypeA), false)); got != "NOERROR A 203.0.113.1" {
				t.Errorf("answer = %s", got)
			}
			if s := r.Stats(); s.Spoofed != 4 {
				t.Errorf("spoofed = %d, want 4", s.Spoofed)
			}
			if name, ok := table.NameOf(addr("198.51.100.66")); ok {
				t.Errorf("the forged address has the name %q", name)
			}
		})
	}
}

func TestDecide(t *testing.T) {
	n := newNetwork(t)
	n.serve("192.0.2.53", answering(t, "ok.example. 60 IN A 203.0.113.1"), "udp")
	var asked []Question
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{
		StackAddrs: []netip.Addr{addr("198.18.0.1")},
		Decide: func(q Question) Decision {
			asked = append(asked, q)
			switch q.Name {
			case "bad.example", HostName:
				return Decision{Action: Block, Filter: "no-bad-names"}
			case "drop.example":
				return Decision{Action: Drop, Filter: "silence"}
			case "odd.example":
				return Decision{Action: 99}
			}
			return Decision{}
		},
	})
	for _, name := range []string{"BAD.example", HostName} {
		m := lookup(t, r, query(name, dns.TypeA, edns(1232)), false)
		if code, extra := ede(m); m.Rcode != dns.RcodeRefused || code != dns.ExtendedErrorCodeBlocked || extra != "no-bad-names" || len(m.Answer) != 0 {
			t.Errorf("blocked %s = %v, want REFUSED, Blocked, the filter's name", name, m)
		}
	}
	if m := lookup(t, r, query("bad.example", dns.TypeA), false); m.Rcode != dns.RcodeRefused || len(m.Extra) != 0 {
		t.Errorf("blocked without EDNS = %v, want REFUSED alone", m)
	}
	if m := lookup(t, r, query("odd.example", dns.TypeA), false); m.Rcode != dns.RcodeRefused {
		t.Errorf("an unknown action = %v, want REFUSED", m)
	}
	if m := lookup(t, r, query("drop.example", dns.TypeA), false); m != nil {
		t.Errorf("dropped = %v, want silence", m)
	}
	if d := n.dialled(); len(d) != 0 {
		t.Errorf("blocked names were forwarded: %v", d)
	}
	if got := text(lookup(t, r, query("ok.example", dns.TypeA), true)); got == "" {
		t.Error("permitted name: no answer")
	}
	want := Question{Name: "bad.example", Type: dns.TypeA, Client: client}
	if asked[0] != want || asked[len(asked)-1] != (Question{Name: "ok.example", Type: dns.TypeA, Client: client, TCP: true}) || want.TypeName() != "A" {
		t.Errorf("asked %+v", asked)
	}
	if s := r.Stats(); s.Blocked != 4 || s.DroppedFilter != 1 || s.Answered != 1 {
		t.Errorf("stats = %+v", s)
	}
}

func TestKnownNames(t *testing.T) {
	hosts := "127.0.0.1 localhost\n203.0.113.5 Build.Example.test build # machine\n2001:db8::5 build\n203.0.113.6 build\nbroken line\n"
	table := NewTable(TableOptions{})
	r := newResolver(t, newNetwork(t), "", Options{
		Hosts: file(t, "hosts", hosts), Table: table,
		StackAddrs: []netip.Addr{addr("198.18.0.1"), addr("fd77::1")},
		Prefixes:   []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd77::/64")},
	})
	const elsewhere = "SERVFAIL " // it was forwarded, and nobody is there
	rev := func(a string) string { s, _ := dns.ReverseAddr(a); return s }
	for _, tc := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{HostName, dns.TypeA, "NOERROR A 198.18.0.1"},
		{"HOST.wfpstack.Internal", dns.TypeAAAA, "NOERROR AAAA fd77::1"},
		{HostName, dns.TypeANY, "NOERROR A 198.18.0.1, AAAA fd77::1"},
		{HostName, dns.TypeMX, "NOERROR "},
		{"other.wfpstack.internal", dns.TypeA, "NXDOMAIN "},
		{"wfpstack.internal", dns.TypeA, "NOERROR "},
		{"xwfpstack.internal", dns.TypeA, elsewhere},
		{"localhost", dns.TypeA, "NOERROR A 127.0.0.1"},
		{"a.b.localhost", dns.TypeAAAA, "NOERROR AAAA ::1"},
		{"localhost", dns.TypeTXT, "NOERROR "},
		{`foo\.localhost`, dns.TypeA, elsewhere}, // one label with a dot in it
		{"build", dns.TypeA, "NOERROR A 203.0.113.5, A 203.0.113.6"},
		{"build", dns.TypeAAAA, "NOERROR AAAA 2001:db8::5"},
		{"build.example.test", dns.TypeAAAA, "NOERROR "},
		{"build", dns.TypeMX, elsewhere},
		{rev("198.18.0.1"), dns.TypePTR, "NOERROR PTR host.wfpstack.internal."},
		{rev("fd77::1"), dns.TypePTR, "NOERROR PTR host.wfpstack.internal."},
		{rev("198.18.0.1"), dns.TypeTXT, "NOERROR "},
		{rev("198.18.0.77"), dns.TypePTR, "NXDOMAIN "},
		{rev("fd77::77"), dns.TypePTR, "NXDOMAIN "},
		{"0.18.198.in-addr.arpa", dns.TypeSOA, "NOERROR "},
		{"18.198.in-addr.arpa", dns.TypeSOA, elsewhere},
		{rev("127.0.0.9"), dns.TypePTR, "NOERROR PTR localhost."},
		{rev("::1"), dns.TypePTR, "NOERROR PTR localhost."},
		{rev("203.0.113.5"), dns.TypePTR, "NOERROR PTR build.example.test."},
		{rev("203.0.113.99"), dns.TypePTR, elsewhere},
		{"in-addr.arpa", dns.TypeNS, elsewhere},
		{"x.y.in-addr.arpa", dns.TypePTR, elsewhere},
	} {
		t.Run(tc.name+"/"+dns.Type(tc.qtype).String(), func(t *testing.T) {
			if got := text(lookup(t, r, query(tc.name, tc.qtype), false)); got != tc.want {
				t.Errorf("answer = %q, want %q", got, tc.want)
			}
		})
	}
	// Known names need no look-up.
	if got := NewTable(TableOptions{}).NamesOf(addr("203.0.113.6")); got != nil {
		t.Errorf("names of an empty table: %v", got)
	}
	if got := table.NamesOf(addr("203.0.113.5")); !slices.Equal(got, []string{"build", "build.example.test"}) {
		t.Errorf("names = %v", got)
	}
	must(t, os.WriteFile(r.opt.Hosts, []byte("203.0.113.7 new"), 0o644))
	r.Refresh()
	if name, _ := table.NameOf(addr("203.0.113.7")); name != "new" {
		t.Errorf("after the file changed: %q", name)
	}
	must(t, os.Remove(r.opt.Hosts))
	r.Refresh()
	if name, ok := table.NameOf(addr("203.0.113.7")); ok {
		t.Errorf("after the file went: %q", name)
	}
}

func TestRecord(t *testing.T) {
	for _, tc := range []struct {
		name   string
		ask    string
		qtype  uint16
		answer []string
		want   map[string][]string // address → names, most recent first
	}{
		{"aliases", "www.a.example", dns.TypeA, []string{
			"www.a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME c.example.", "c.example. 60 IN A 203.0.113.1", "c.example. 60 IN A 203.0.113.2"},
			map[string][]string{"203.0.113.1": {"www.a.example", "b.example", "c.example"}, "203.0.113.2": {"www.a.example", "b.example", "c.example"}}},
		{"aliases in any order", "www.a.example", dns.TypeAAAA, []string{
			"c.example. 60 IN AAAA 2001:db8::1", "b.example. 60 IN CNAME C.example.", "www.A.example. 60 IN CNAME b.example."},
			map[string][]string{"2001:db8::1": {"www.a.example", "b.example", "c.example"}}},
		{"loop", "a.example", dns.TypeA, []string{
			"a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME a.example.", "b.example. 60 IN A 203.0.113.1"},
			map[string][]string{"203.0.113.1": {"a.example", "b.example"}}},
		{"alias of itself", "a.example", dns.TypeA, []string{"a.example. 60 IN CNAME a.example.", "a.example. 60 IN A 203.0.113.1"},
			map[string][]string{"203.0.113.1": {"a.example"}}},
		{"beside the chain", "evil.example", dns.TypeA, []string{"good.example. 60 IN A 203.0.113.1", "evil.example. 60 IN A 203.0.113.2"},
			map[string][]string{"203.0.113.1": nil, "203.0.113.2": {"evil.example"}}},
		{"reverse look-up", "1.113.0.203.in-addr.arpa", dns.TypePTR, []string{"1.113.0.203.in-addr.arpa. 60 IN PTR good.example."},
			map[string][]string{"203.0.113.1": nil}},
		{"mapped", "a.example", dns.TypeAAAA, []string{"a.example. 60 IN AAAA ::ffff:203.0.113.1"},
			map[string][]string{"203.0.113.1": {"a.example"}}},
		{"service binding", "a.example", dns.TypeHTTPS, []string{"a.example. 60 IN HTTPS 1 . alpn=h3 ipv4hint=203.0.113.1,203.0.113.2 ipv6hint=2001:db8::1"},
			map[string][]string{"203.0.113.1": {"a.example"}, "203.0.113.2": {"a.example"}, "2001:db8::1": {"a.example"}}},
		{"service binding with port and target", "_8443._https.a.example", dns.TypeHTTPS, []string{"_8443._https.a.example. 60 IN HTTPS 1 cdn.example. ipv4hint=203.0.113.1"},
			map[string][]string{"203.0.113.1": {"_8443._https.a.example"}}},
		{"service binding behind an alias that names another's target", "evil.example", dns.TypeHTTPS, []string{
			"evil.example. 60 IN CNAME www.evil.example.", "www.evil.example. 60 IN HTTPS 1 good.example. ipv4hint=203.0.113.1 ipv6hint=2001:db8::1"},
			map[string][]string{"203.0.113.1": {"evil.example", "www.evil.example"}, "2001:db8::1": {"evil.example", "www.evil.example"}}},
		{"generic service binding", "_dns.a.example", dns.TypeSVCB, []string{"_dns.a.example. 60 IN SVCB 1 . ipv6hint=2001:db8::1"},
			map[string][]string{"2001:db8::1": {"_dns.a.example"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNetwork(t)
			n.serve("192.0.2.53", answering(t, tc.answer...), "udp")
			table := NewTable(TableOptions{})
			r := newResolver(t, n, "nameserver 192.0.2.53", Options{Table: table})
			lookup(t, r, query(tc.ask, tc.qtype), false)
			for a, want := range tc.want {
				if got := table.NamesOf(addr(a)); !slices.Equal(got, want) {
					t.Errorf("NamesOf(%s) = %v, want %v", a, got, want)
				}
			}
		})
	}
}
