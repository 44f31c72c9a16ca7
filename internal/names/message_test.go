package names

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/internal/need"
)

func TestTurnedAway(t *testing.T) {
	r := newResolver(t, newNetwork(t), "", Options{})
	ptr := func(f func(*dns.Msg)) *dns.Msg { return query("a.example", dns.TypeA, f) }
	for _, tc := range []struct {
		name string
		req  *dns.Msg
		want int
	}{
		{"update", ptr(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		{"no question", ptr(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		{"two questions", ptr(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		{"chaos", ptr(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		{"zone transfer", ptr(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }), dns.RcodeRefused},
		{"OPT is no data", ptr(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeOPT }), dns.RcodeFormatError},
		{"two OPT", ptr(func(m *dns.Msg) { m.SetEdns0(1232, false); m.Extra = append(m.Extra, m.Extra[0]) }), dns.RcodeFormatError},
		{"EDNS 1", ptr(func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), dns.RcodeBadVers},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if m := lookup(t, r, tc.req, false); m == nil || m.Rcode != tc.want {
				t.Errorf("answer = %v, want %s", m, dns.RcodeToString[tc.want])
			}
		})
	}
	whole, err := query("a.example", dns.TypeA).Pack()
	must(t, err)
	got := handle(t, r, Query{Msg: whole[:len(whole)-1], From: client})
	if len(got) != headerSize || !bytes.Equal(got[:2], whole[:2]) || got[2] != 0x81 || got[3] != 0x81 {
		t.Errorf("answer to half a question = %x, want FORMERR with its id", got)
	}
	before := r.Stats()
	answer := bytes.Clone(whole)
	answer[2] |= 0x80
	for _, b := range [][]byte{nil, whole[:11], answer} {
		if got := handle(t, r, Query{Msg: b, From: client}); got != nil {
			t.Errorf("%x is answered with %x", b, got)
		}
	}
	if s := r.Stats(); s.Malformed != before.Malformed+3 || s.Malformed != 12 {
		t.Errorf("malformed = %d, then %d", before.Malformed, s.Malformed)
	}
}

func TestExtendedCodeWithoutEDNS(t *testing.T) {
	req := query("a.example", dns.TypeA)
	m := newReply(req, dns.RcodeBadCookie)
	got := new(dns.Msg)
	must(t, got.Unpack(pack(m, req, false)))
	if got.Rcode != dns.RcodeServerFailure {
		t.Errorf("code = %d, want SERVFAIL", got.Rcode)
	}
}

func TestFramer(t *testing.T) {
	msgs := [][]byte{{}, []byte("one"), bytes.Repeat([]byte{7}, dns.MaxMsgSize), []byte("two"), {1}}
	var stream []byte
	for _, m := range msgs {
		stream = AppendFrame(stream, m)
	}
	for _, step := range []int{1, 2, 3, 1000, len(stream)} {
		var f Framer
		i := 0
		for b := stream; len(b) > 0; {
			n := min(step, len(b))
			f.Write(b[:n])
			b = b[n:]
			for {
				m, ok := f.Next()
				if !ok {
					break
				}
				if i >= len(msgs) || !bytes.Equal(m, msgs[i]) {
					t.Fatalf("step %d: message %d has %d bytes", step, i, len(m))
				}
				i++
			}
			if f.Buffered() > dns.MaxMsgSize+1 {
				t.Fatalf("step %d: %d bytes held", step, f.Buffered())
			}
		}
		if i != len(msgs) || f.Buffered() != 0 {
			t.Errorf("step %d: %d messages, %d bytes left", step, i, f.Buffered())
		}
	}
	if got := AppendFrame([]byte("x"), make([]byte, dns.MaxMsgSize+1)); string(got) != "x" {
		t.Errorf("a message that is too long became %d bytes", len(got))
	}
}

// hostile changes a message in one of the ways that break parsers.
func hostile(rnd *rand.Rand, b []byte) []byte {
	b = bytes.Clone(b)
	for range 1 + rnd.IntN(4) {
		if len(b) == 0 {
			return b
		}
		i := rnd.IntN(len(b))
		switch rnd.IntN(6) {
		case 0:
			b[i] ^= 1 << rnd.IntN(8)
		case 1:
			b[i] = byte(rnd.Uint32())
		case 2:
			b = b[:i]
		case 3: // a pointer to anywhere
			b[i] = 0xC0
		case 4:
			b = append(b, b[i:]...)
		case 5: // counts
			if len(b) >= headerSize {
				b[4+rnd.IntN(8)] = byte(rnd.Uint32())
			}
		}
	}
	return b
}

// samples are well-formed messages of many kinds, questions and answers.
func samples(t testing.TB) [][]byte {
	t.Helper()
	var out [][]byte
	add := func(m *dns.Msg) {
		m.Compress = true
		b, err := m.Pack()
		must(t, err)
		out = append(out, b)
	}
	add(query("www.a.example", dns.TypeA))
	add(query("www.a.example", dns.TypeHTTPS, func(m *dns.Msg) {
		m.SetEdns0(1232, true)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: 1, ExtraText: "x"}, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"},
			&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 2, SourceNetmask: 56, Address: net.ParseIP("2001:db8::")}}
	}))
	m := query("www.a.example", dns.TypeA)
	m.Response = true
	m.Answer = rrs(t, "www.a.example. 60 IN CNAME b.example.", "b.example. 60 IN DNAME c.example.", "b.example. 60 IN A 203.0.113.1",
		"b.example. 60 IN AAAA 2001:db8::1", "b.example. 60 IN TXT \"x\" \"y\"", "b.example. 60 IN MX 1 m.b.example.",
		"www.a.example. 60 IN HTTPS 1 . alpn=h2,h3 port=8443 ipv4hint=203.0.113.1 ipv6hint=2001:db8::1 ech=AEn+DQBF",
		"b.example. 60 IN SRV 1 2 3 t.example.", "b.example. 60 IN TYPE65400 \\# 3 010203", "b.example. 60 IN LOC 52 22 23.000 N 4 53 32.000 E -2.00m 0.00m 10000m 10m")
	m.Ns = rrs(t, "example. 60 IN SOA a.example. b.example. 1 2 3 4 5", "example. 60 IN NSEC b.example. A AAAA RRSIG",
		"example. 60 IN RRSIG A 13 2 60 20300101000000 20200101000000 1 example. AAAA")
	m.SetEdns0(4096, true)
	add(m)
	return out
}

// TestHostileMessages feeds a hundred thousand broken messages, as questions and as a name server's answers.
func TestHostileMessages(t *testing.T) {
	count := 100_000
	if need.Race {
		count /= 10
	}
	seeds := samples(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	r := newResolver(t, newNetwork(t), "", Options{Table: NewTable(TableOptions{MaxAddrs: 100, NamesPerAddr: 4})})
	for range count {
		hostileRound(t, r, hostile(rnd, seeds[rnd.IntN(len(seeds))]), hostile(rnd, seeds[rnd.IntN(len(seeds))]))
	}
	checkTable(t, r.opt.Table)
}

// hostileRound takes one message in as a question and one as the answer to it.
func hostileRound(t testing.TB, r *Resolver, q, a []byte) {
	if len(q) >= headerSize && q[2]&0x80 == 0 {
		for _, tcp := range []bool{false, true} {
			got := r.answer(t.Context(), Query{Msg: q, TCP: tcp, From: client})
			if len(got) < headerSize || !bytes.Equal(got[:2], q[:2]) || got[2]&0x80 == 0 || !tcp && len(got) > maxUDPAnswer {
				t.Fatalf("question %x\nanswer %x", q, got)
			}
			if len(got) == headerSize {
				continue // a bare header
			}
			if _, err := unpack(got); err != nil {
				t.Fatalf("question %x\nanswer %x: %v", q, got, err)
			}
		}
	}
	req := query("www.a.example", dns.TypeA, edns(1232))
	if len(a) >= 2 {
		req.Id = binary.BigEndian.Uint16(a)
	}
	m, err := match(req, a)
	if err != nil {
		return
	}
	adopt(m, req)
	r.record(Question{Name: "www.a.example", Type: dns.TypeA}, m)
	got := pack(m, req, false)
	if len(got) < headerSize || len(got) > 1232 {
		t.Fatalf("name server's answer %x\ngiven to the program as %x", a, got)
	}
}

func FuzzMessages(f *testing.F) {
	seeds := samples(f)
	for _, a := range seeds {
		for _, b := range seeds {
			f.Add(a, b)
		}
	}
	r := NewResolver(Options{ResolvConf: "/nonexistent", Hosts: "/nonexistent", StackAddrs: []netip.Addr{addr("198.18.0.1")},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("fd77::/64")}, Table: NewTable(TableOptions{MaxAddrs: 50})})
	f.Cleanup(func() { r.Close() })
	f.Fuzz(func(t *testing.T, q, a []byte) {
		hostileRound(t, r, q, a)
		var framer Framer
		framer.Write(q)
		framer.Write(a)
		total := 0
		for m, ok := framer.Next(); ok; m, ok = framer.Next() {
			total += 2 + len(m)
		}
		if total+framer.Buffered() != len(q)+len(a) {
			t.Fatalf("%d bytes in messages, %d left, of %d", total, framer.Buffered(), len(q)+len(a))
		}
	})
}

func BenchmarkHandleKnown(b *testing.B) {
	r := newResolver(b, newNetwork(b), "", Options{Table: NewTable(TableOptions{}), StackAddrs: []netip.Addr{addr("198.18.0.1")}})
	msg, err := query(HostName, dns.TypeA, edns(1232)).Pack()
	must(b, err)
	done := make(chan struct{})
	b.ReportAllocs()
	for b.Loop() {
		r.Handle(b.Context(), Query{Msg: msg, From: client}, func([]byte) { done <- struct{}{} })
		<-done
	}
}
