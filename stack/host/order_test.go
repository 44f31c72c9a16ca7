package host

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// settle waits until nothing has been indicated for a while on either side.
func settle(t testing.TB, sides ...*side) {
	t.Helper()
	count := func() int {
		n := 0
		for _, s := range sides {
			s.log.mu.Lock()
			n += len(s.log.lines)
			s.log.mu.Unlock()
		}
		return n
	}
	last, since := count(), time.Now()
	eventually(t, "the indications settle", func() bool {
		if n := count(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 120*time.Millisecond
	})
}

// without leaves out some lines.
func without(lines []string, drop ...string) (out []string) {
next:
	for _, l := range lines {
		for _, d := range drop {
			if l == d {
				continue next
			}
		}
		out = append(out, l)
	}
	return out
}

// TestOrderTCP covers as far as their layers are raised, in the host role: client a, server b.
func TestOrderTCP(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
		same(t, "listen", b.log.take(), []string{"ale_resource_assignment", "ale_auth_listen"})
		ch := accept(l)
		c, err := a.DialContext(withTimeout(t), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s := (<-ch).c
		settle(t, a, b)
		same(t, "connect, client", a.log.take(), []string{
			"ale_resource_assignment", "ale_auth_connect", "outbound_transport", "outbound_ippacket",
			"inbound_ippacket", "inbound_transport", "ale_flow_established", "outbound_transport", "outbound_ippacket",
		})
		same(t, "connect, server", b.log.take(), []string{
			"inbound_ippacket", "inbound_transport", "ale_auth_recv_accept", "outbound_transport", "outbound_ippacket",
			"inbound_ippacket", "inbound_transport", "ale_flow_established",
		})
		if _, err := c.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(s, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		settle(t, a, b)
		ack := []string{"inbound_ippacket", "inbound_transport"}
		same(t, "data, client", a.log.take(), append([]string{"stream send", "outbound_transport", "outbound_ippacket"}, ack...))
		got := b.log.take()
		// The delayed acknowledgement may leave before or after the program reads.
		same(t, "data, server", without(got, "outbound_transport", "outbound_ippacket"), []string{"inbound_ippacket", "inbound_transport", "stream receive"})
		if len(got) != 5 {
			t.Errorf("data, server, with the acknowledgement: %v", got)
		}
		c.Close()
		if _, err := s.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("read = %v, want EOF", err)
		}
		s.Close()
		settle(t, a, b)
		same(t, "close, client", without(a.log.take(), "inbound_ippacket", "inbound_transport", "outbound_transport", "outbound_ippacket"),
			[]string{"stream send_disconnect", "ale_endpoint_closure", "ale_resource_release"})
		same(t, "close, server", without(b.log.take(), "inbound_ippacket", "inbound_transport", "outbound_transport", "outbound_ippacket"),
			[]string{"stream receive_disconnect", "stream send_disconnect", "ale_endpoint_closure"})
		l.Close()
		same(t, "close, listener", b.log.take(), []string{"ale_endpoint_closure", "ale_resource_release"})
	})
}

// TestOrderTCPClosedPort covers X-12.
func TestOrderTCPClosedPort(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		if _, err := a.DialContext(withTimeout(t), "tcp", netip.AddrPortFrom(f.b, 81).String()); err == nil {
			t.Fatal("connected to a closed port")
		}
		settle(t, a, b)
		same(t, "server", b.log.take(), []string{"inbound_ippacket", "inbound_transport_discard", "outbound_transport", "outbound_ippacket"})
		if n := b.Stats().NoEndpoint; n != 1 {
			t.Errorf("NoEndpoint = %d, want 1", n)
		}
	})
}

// TestOrderUDP covers.
func TestOrderUDP(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		server := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
		same(t, "server bind", b.log.take(), []string{"ale_resource_assignment"})
		c, err := a.DialContext(withTimeout(t), "udp", netip.AddrPortFrom(f.b, 53).String())
		if err != nil {
			t.Fatal(err)
		}
		same(t, "client bind", a.log.take(), []string{"ale_resource_assignment"})
		c.SetDeadline(time.Now().Add(patience))
		for i, want := range []struct{ client, server []string }{
			{
				[]string{"ale_auth_connect", "ale_flow_established", "datagram_data", "outbound_transport", "outbound_ippacket"},
				[]string{"inbound_ippacket", "inbound_transport", "ale_auth_recv_accept", "ale_flow_established", "datagram_data"},
			},
			{
				[]string{"datagram_data", "outbound_transport", "outbound_ippacket"},
				[]string{"inbound_ippacket", "inbound_transport", "datagram_data"},
			},
		} {
			buf := make([]byte, 8)
			if _, err := c.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			_, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				same(t, "first send", a.log.take(), want.client)
				same(t, "first receive", b.log.take(), want.server)
				if _, err := server.WriteToUDPAddrPort(buf, from); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Read(buf); err != nil {
					t.Fatal(err)
				}
				same(t, "reply, server", b.log.take(), []string{"datagram_data", "outbound_transport", "outbound_ippacket"})
				same(t, "reply, client", a.log.take(), []string{"inbound_ippacket", "inbound_transport", "datagram_data"})
				continue
			}
			same(t, "next send", a.log.take(), want.client)
			same(t, "next receive", b.log.take(), want.server)
		}
		c.Close()
		same(t, "close", a.log.take(), []string{"ale_endpoint_closure", "ale_resource_release"})
		if n := a.Stats().Flows; n != 0 {
			t.Errorf("%d flows after the socket was closed", n)
		}
	})
}

// TestOrderUDPClosedPort is a closed UDP port; the ICMP error layers are not raised yet.
func TestOrderUDPClosedPort(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		p := a.packets(t, "udp", ":0")
		if _, err := p.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(f.b, 54)); err != nil {
			t.Fatal(err)
		}
		settle(t, a, b)
		same(t, "server", b.log.take(), []string{"inbound_ippacket", "inbound_ippacket_discard", "outbound_transport", "outbound_ippacket"})
	})
}

// TestOrderLoopback composes both sides within one stack, with the loopback flag.
func TestOrderLoopback(t *testing.T) {
	for _, addr := range []string{"127.0.0.1", "::1", "198.18.0.1", "fd77::1"} {
		t.Run(addr, func(t *testing.T) {
			a, _ := pair(t, pairOptions{})
			server := a.packets(t, "udp", netip.AddrPortFrom(netip.MustParseAddr(addr), 53).String())
			c, err := a.DialContext(withTimeout(t), "udp", server.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			a.log.take()
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, _, err := server.ReadFrom(make([]byte, 8)); err != nil {
				t.Fatal(err)
			}
			want := []string{
				"ale_auth_connect", "ale_flow_established", "datagram_data", "outbound_transport",
				"inbound_ippacket", "inbound_transport", "ale_auth_recv_accept", "ale_flow_established", "datagram_data",
			}
			for _, s := range append(a.log.indications(layers.ALEAuthConnect), a.log.indications(layers.ALEAuthRecvAccept)...) {
				if s.flags&layers.FlagIsLoopback == 0 {
					t.Errorf("%v without the loopback flag", s.layer)
				}
			}
			// Netstack shows what goes to its loopback interface to postrouting, and what stays within an interface not.
			same(t, "datagram", without(a.log.take(), "outbound_ippacket"), want)
		})
	}
}

// TestOrderEcho is a ping: the request begins a flow, the reply belongs to it.
func TestOrderEcho(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		_, b := pair(t, pairOptions{})
		other := b.dev
		for i := range 2 {
			if err := other.Inject(echoRequest(f.a, f.b, 7, uint16(i)), noOffload); err != nil {
				t.Fatal(err)
			}
			settle(t, b)
			want := []string{"inbound_ippacket", "inbound_transport", "datagram_data", "datagram_data", "outbound_transport", "outbound_ippacket"}
			if i == 0 {
				want = []string{"inbound_ippacket", "inbound_transport", "ale_auth_recv_accept", "ale_flow_established", "datagram_data",
					"datagram_data", "outbound_transport", "outbound_ippacket"}
			}
			same(t, "echo", b.log.take(), want)
		}
	})
}
