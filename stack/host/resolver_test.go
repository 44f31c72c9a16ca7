package host

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// answer answers a question for TXT with the network by which it came. Names that begin with "long" are answered over TCP only.
func answer(t testing.TB, question []byte, network string) []byte {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(question); err != nil {
		t.Errorf("question: %v", err)
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	q := m.Questions[0]
	if network == "udp" && strings.HasPrefix(q.Name.String(), "long") {
		m.Truncated = true
	} else {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
			Body:   &dnsmessage.TXTResource{TXT: []string{"by " + network}},
		}}
	}
	b, err := m.Pack()
	if err != nil {
		t.Errorf("answer: %v", err)
	}
	return b
}

// TestResolverRunsUnchanged: the resolver of package net asks over sockets of the stack, first by UDP and then by TCP.
func TestResolverRunsUnchanged(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		at := netip.AddrPortFrom(f.b, 53).String()
		p, l := b.packets(t, "udp", at), b.listen(t, "tcp", at)
		// Owner: the test; closing the sockets ends both.
		go func() {
			buf := make([]byte, 1500)
			for {
				n, from, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				p.WriteTo(answer(t, buf[:n], "udp"), from)
			}
		}()
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			q := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(c, q); err != nil {
				return
			}
			r := answer(t, q, "tcp")
			c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(r))), r...))
		}()
		r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return a.DialContext(ctx, network, at)
		}}
		for name, want := range map[string]string{"short.example.org.": "by udp", "long.example.org.": "by tcp"} {
			got, err := r.LookupTXT(withTimeout(t), name)
			if err != nil || len(got) != 1 || got[0] != want {
				t.Errorf("%s: %v, %v; want %q", name, got, err, want)
			}
		}
	})
}
