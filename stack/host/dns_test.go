package host

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// TestDNSRunsUnchanged: a server and a client that were written for package net, over UDP and TCP.
func TestDNSRunsUnchanged(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg)
			m.SetReply(q)
			rr, err := dns.NewRR(q.Question[0].Name + " 60 IN TXT \"asked from " + w.RemoteAddr().Network() + "\"")
			if err != nil {
				t.Error(err)
			}
			m.Answer = append(m.Answer, rr)
			if err := w.WriteMsg(m); err != nil {
				t.Error(err)
			}
		})
		at := netip.AddrPortFrom(f.b, 53).String()
		started := make(chan struct{}, 2) // one for each server
		servers := []*dns.Server{
			{PacketConn: b.packets(t, "udp", at), Handler: handler},
			{Listener: b.listen(t, "tcp", at), Handler: handler},
		}
		served := make(chan error, 2) // the ends of both
		for _, s := range servers {
			s.NotifyStartedFunc = func() { started <- struct{}{} }
			go func() { served <- s.ActivateAndServe() }()
		}
		for range servers {
			<-started
		}
		for _, network := range []string{"udp", "tcp"} {
			c, err := a.DialContext(withTimeout(t), network, at)
			if err != nil {
				t.Fatal(err)
			}
			client := dns.Client{Net: network, Timeout: patience}
			r, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion("example.org.", dns.TypeTXT), &dns.Conn{Conn: c})
			if err != nil || len(r.Answer) != 1 || r.Answer[0].(*dns.TXT).Txt[0] != "asked from "+network {
				t.Errorf("%s: %v, %v", network, r, err)
			}
			c.Close()
		}
		for _, s := range servers {
			if err := s.Shutdown(); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
		}
		for range servers {
			if err := <-served; err != nil {
				t.Errorf("serve: %v", err)
			}
		}
	})
}
