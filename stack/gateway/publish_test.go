package gateway

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// published makes a scene with a published port of each protocol and family on all addresses of the host.
func published(t *testing.T, o Options) (*scene, *space) {
	t.Helper()
	far := newServerSpace(t, 1500)
	for _, f := range families {
		any := netip.IPv4Unspecified()
		if f.v == layers.V6 {
			any = netip.IPv6Unspecified()
		}
		for _, udp := range []bool{false, true} {
			o.Publish = append(o.Publish, Publish{Host: netip.AddrPortFrom(any, 7100), Program: netip.AddrPortFrom(f.prog, 7200), UDP: udp})
		}
	}
	return newScene(t, sceneOptions{Options: o}), far
}

func TestPublishedTCP(t *testing.T) {
	s, far := published(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		l := s.prog.listenTCP(t, netip.AddrPortFrom(f.prog, 7200))
		for _, row := range []struct {
			name  string
			from  *space
			to    netip.Addr
			shown netip.Addr
		}{
			{"client on a link keeps its address", far, f.near, f.far},
			{"client on the host's loopback has the stack's", nil, loopbackOf(f).Addr(), f.stack},
		} {
			t.Run(row.name, func(t *testing.T) {
				to := netip.AddrPortFrom(row.to, 7100)
				var client *net.TCPConn
				if row.from != nil {
					client = row.from.mustDial(t, to)
				} else {
					c, err := net.Dial("tcp", to.String())
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					client = c.(*net.TCPConn)
				}
				server, err := l.AcceptTCP()
				if err != nil {
					t.Fatal(err)
				}
				defer server.Close()
				got := netip.MustParseAddrPort(server.RemoteAddr().String())
				want := netip.AddrPortFrom(row.shown, netip.MustParseAddrPort(client.LocalAddr().String()).Port())
				if got != want {
					t.Errorf("the program sees %v, want %v", got, want)
				}
				exchange(t, client, server, 8<<20)
			})
		}
		// Nobody listens: the client is connected, and then reset.
		l.Close()
		far.wantReset(t, "the client of a program that does not listen", netip.AddrPortFrom(f.near, 7100))
		until(t, "end of all flows", func() bool { st := s.g.Stats(); return st.Flows == 0 && st.Embryonic == 0 })
	})
}

// TestPublishedSpeaksFirst: what client and program say before the other does.
func TestPublishedSpeaksFirst(t *testing.T) {
	s, far := published(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		l := s.prog.listenTCP(t, netip.AddrPortFrom(f.prog, 7200))
		c := far.mustDial(t, netip.AddrPortFrom(f.near, 7100))
		mustWrite(t, c, "hello, and bye")
		_ = c.CloseWrite()
		server, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		_ = server.SetDeadline(time.Now().Add(5 * time.Second))
		if got, err := io.ReadAll(server); err != nil || string(got) != "hello, and bye" {
			t.Errorf("the program read %q, %v", got, err)
		}
		mustWrite(t, server, "bye")
		server.Close()
		if got, err := io.ReadAll(c); err != nil || string(got) != "bye" {
			t.Errorf("the client read %q, %v", got, err)
		}
	})
}

func TestPublishedBlockAndPend(t *testing.T) {
	s, far := published(t, Options{PendDeadline: 3 * time.Minute})
	eachFamily(t, func(t *testing.T, f family) {
		l := s.prog.listenTCP(t, netip.AddrPortFrom(f.prog, 7200))
		for _, row := range []struct {
			name string
			end  func(t *testing.T, h *holder)
			want error // of the client's read
		}{
			{"permit", func(t *testing.T, h *holder) {
				if err := h.op(0).Complete(h.take()[0]); err != nil {
					t.Error(err)
				}
			}, nil},
			{"permit after a retransmission", func(t *testing.T, h *holder) {
				// Netstack's timer sends the SYN again while it is held; it must not leave.
				before := s.g.Stats().Drops["pended"]
				until(t, "held SYN", func() bool { return s.g.Stats().Drops["pended"] > before })
				if err := h.op(0).Complete(h.take()[0]); err != nil {
					t.Error(err)
				}
			}, nil},
			{"deny", func(t *testing.T, h *holder) {
				h.take()[0].Release()
				if err := h.op(0).Complete(nil); err != nil {
					t.Error(err)
				}
			}, syscall.ECONNRESET},
			{"deadline", func(t *testing.T, h *holder) {
				h.take()[0].Release()
				s.advance(3*time.Minute + time.Second)
				until(t, "deadline", func() bool { return h.op(0).Cause() == layers.PendDeadline })
			}, syscall.ECONNRESET},
		} {
			t.Run(row.name, func(t *testing.T) {
				h := &acceptHolder{}
				reg := s.callout(f, t.Name(), h, layers.ALEAuthRecvAccept)
				defer s.remove(t, reg)
				inj, err := layers.NewInjector(reg.Name(), s.g)
				if err != nil {
					t.Fatal(err)
				}
				defer inj.Close()
				h.inj.Store(inj)
				c := far.mustDial(t, netip.AddrPortFrom(f.near, 7100))
				h.waitOp(t, 0)
				until(t, "pended gauge", func() bool { return s.g.Stats().Pended == 1 })
				row.end(t, &h.holder)
				if row.want == nil {
					server, err := l.AcceptTCP()
					if err != nil {
						t.Fatal(err)
					}
					mustWrite(t, server, "welcome")
					server.Close()
				}
				got, err := io.ReadAll(c)
				if errnoOf(err) != errnoOf(row.want) || row.want == nil && string(got) != "welcome" {
					t.Errorf("the client read %q, %v, want %v", got, err, row.want)
				}
				c.Close()
				if asked, _, _ := h.counts(); asked != 1 {
					t.Errorf("asked %d times, want once", asked)
				}
				if n := h.mine.Load(); (n == 1) != (row.want == nil) {
					t.Errorf("the clone was shown to its injector %d times", n)
				}
				until(t, "end of all flows", func() bool { st := s.g.Stats(); return st.Flows == 0 && st.Embryonic == 0 && st.Pended == 0 })
			})
		}
		id := s.block(f, layers.ALEAuthRecvAccept)
		far.wantReset(t, "a blocked client", netip.AddrPortFrom(f.near, 7100))
		if err := s.eng.DeleteFilter(id); err != nil {
			t.Fatal(err)
		}
	})
}

func TestPublishedUDP(t *testing.T) {
	s, far := published(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		server := s.prog.listenUDP(t, netip.AddrPortFrom(f.prog, 7200))
		client := far.dialUDP(t, netip.AddrPortFrom(f.near, 7100))
		buf := make([]byte, 1<<16)
		for _, size := range []int{0, 5, 1472, 30000} {
			msg := make([]byte, size)
			fill(msg, 1)
			if _, err := client.Write(msg); err != nil {
				t.Fatal(err)
			}
			n, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil || n != size || from.Addr() != f.far {
				t.Fatalf("the program read %d of %d bytes from %v, %v, want them from %v", n, size, from, err, f.far)
			}
			if _, err := server.WriteToUDPAddrPort(buf[:n], from); err != nil {
				t.Fatal(err)
			}
			if n, err := client.Read(buf); err != nil || n != size {
				t.Fatalf("the client read %d of %d bytes, %v", n, size, err)
			}
		}
		s.onLoop(s.endDatagrams)
		// Pended: the clones enter once decided, in order.
		h := &acceptHolder{}
		reg := s.callout(f, "pend "+f.name, h, layers.ALEAuthRecvAccept)
		inj, err := layers.NewInjector(reg.Name(), s.g)
		if err != nil {
			t.Fatal(err)
		}
		h.inj.Store(inj)
		for i := range 3 {
			mustWrite(t, client, fmt.Sprint("held ", i))
		}
		until(t, "three indications", func() bool { asked, _, _ := h.counts(); return asked == 3 })
		clones := h.take()
		if err := h.op(0).Complete(clones[0]); err != nil {
			t.Fatal(err)
		}
		for _, c := range clones[1:] {
			if err := inj.Receive(c, nil); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3 {
			if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != fmt.Sprint("held ", i) {
				t.Errorf("the program read %q, %v, want held %d", buf[:n], err, i)
			}
		}
		inj.Close()
		s.remove(t, reg)
		s.onLoop(s.endDatagrams)
		// Blocked: nothing comes through.
		id := s.block(f, layers.ALEAuthRecvAccept)
		before := s.g.Stats().Drops["policy"]
		mustWrite(t, client, "blocked")
		until(t, "blocked datagram", func() bool { return s.g.Stats().Drops["policy"] == before+1 })
		if n := s.g.Stats().DatagramFlows; n != 0 {
			t.Errorf("%d flows of a blocked client", n)
		}
		if err := s.eng.DeleteFilter(id); err != nil {
			t.Fatal(err)
		}
	})
}

// endDatagrams ends all datagram flows; it runs on the loop.
func (s *scene) endDatagrams() {
	for _, f := range s.g.datagrams.flows {
		f.end("")
	}
}

// TestPublishBlockedAtListen: a filter refuses the port, and New says so.
func TestPublishBlockedAtListen(t *testing.T) {
	for _, kind := range []layers.Kind{layers.ALEResourceAssignment, layers.ALEAuthListen} {
		eng := filter.New(filter.Options{})
		if _, err := eng.AddFilter(filter.Filter{Name: "no servers", Layer: kind.Layer(layers.V4), Action: filter.ActionBlock}); err != nil {
			t.Fatal(err)
		}
		b := newBench(t, Options{})
		_, err := New(b.dev, Options{Engine: eng, Publish: []Publish{{Host: netip.MustParseAddrPort("127.0.0.1:0"), Program: netip.MustParseAddrPort("198.18.0.2:80")}}})
		if err == nil {
			t.Errorf("blocked at %v, but published", kind)
		}
	}
}
