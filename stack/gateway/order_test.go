package gateway

import (
	"io"
	"net/netip"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// traceLine puts an indication into words: the layer, what the packet is, and a block. Bare acknowledgements are left out, as they
// come when they come.
func traceLine(in *layers.Indication, d *layers.Decision) string {
	kind := in.Layer.Kind()
	words := []string{kind.String()}
	if p := in.Packet; p != nil {
		h := p.TransportHeader()
		switch {
		case len(p.IPHeader()) == 0:
		case in.Values.Protocol() == wire.TCP || protocolOf(p) == wire.TCP:
			w := segmentWords(h, p.PayloadLen())
			if w == "" {
				return ""
			}
			words = append(words, w)
		}
	}
	if s := in.Stream; s != nil {
		switch {
		case s.Flags&layers.StreamReceive != 0:
			words = append(words, "receive")
		default:
			words = append(words, "send")
		}
		if s.Flags&layers.StreamDisconnect != 0 {
			words = append(words, "disconnect")
		}
		if s.Flags&layers.StreamAbort != 0 {
			words = append(words, "abort")
		}
	}
	if in.IsReauthorize() {
		words = append(words, "again")
	}
	if in.Meta.Operation != 0 && !in.IsReauthorize() {
		words = append(words, "completed")
	}
	switch {
	case d.Blocked() && d.Absorb:
		words = append(words, "ABSORB")
	case d.Blocked():
		words = append(words, "BLOCK")
	}
	return strings.Join(words, " ")
}

func protocolOf(p *layers.Packet) uint8 {
	ip := p.IPHeader()
	if len(ip) == header.IPv6MinimumSize {
		return ip[6]
	}
	return ip[9]
}

func segmentWords(h []byte, payload int) string {
	f := header.TCP(h).Flags()
	var w []string
	for _, n := range []struct {
		flag header.TCPFlags
		name string
	}{{header.TCPFlagSyn, "SYN"}, {header.TCPFlagFin, "FIN"}, {header.TCPFlagRst, "RST"}} {
		if f.Contains(n.flag) {
			w = append(w, n.name)
		}
	}
	if payload > 0 {
		w = append(w, "data")
	}
	return strings.Join(w, "+")
}

// tracer keeps the trace of one family.
func (j *journal) tracer(in *layers.Indication, d *layers.Decision) {
	if line := traceLine(in, d); line != "" {
		j.add(line)
	}
}

// reset forgets what was traced.
func (j *journal) reset() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = nil
}

// expect compares the trace with golden text.
func (s *scene) expect(t *testing.T, want string) {
	t.Helper()
	var lines []string
	for l := range strings.Lines(want) {
		if l = strings.TrimSpace(l); l != "" {
			lines = append(lines, l)
		}
	}
	want = strings.Join(lines, "\n")
	until(t, "length of the trace", func() bool { return strings.Count(s.log.text(), "\n") >= len(lines)-1 })
	s.onLoop(func() {})
	if got := s.log.text(); got != want {
		t.Errorf("indications:\n%s\nwant:\n%s", got, want)
	}
	s.log.reset()
}

// TestOrderOfIndications: golden text of what one operation raises, the same for both families.
func TestOrderOfIndications(t *testing.T) {
	j := &journal{}
	s := newScene(t, sceneOptions{Options: Options{Trace: j.tracer}})
	s.log = j
	newServerSpace(t, 1500)
	allowPing(t, "0 0")
	eachFamily(t, func(t *testing.T, f family) {
		j.reset()
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		c := s.prog.mustDial(t, portOf(f, l.Addr()))
		server, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			ale_resource_assignment
			ale_auth_connect
			outbound_transport SYN
			outbound_ippacket SYN
			inbound_ippacket SYN
			inbound_transport SYN
			ale_flow_established`)
		mustWrite(t, c, "request")
		if _, err := io.ReadFull(server, make([]byte, 7)); err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			outbound_transport data
			outbound_ippacket data
			stream send`)
		mustWrite(t, server, "answer")
		if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			stream receive
			inbound_transport data
			inbound_ippacket data`)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(server); err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			outbound_transport FIN
			outbound_ippacket FIN
			stream send disconnect`)
		server.Close()
		if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			stream receive disconnect
			inbound_transport FIN
			inbound_ippacket FIN`)
		c.Close()
		l.Close()

		_, _ = s.prog.dial(portOf(f, l.Addr())) // refused
		s.expect(t, `
			ale_resource_assignment
			ale_auth_connect
			outbound_transport SYN
			outbound_ippacket SYN
			inbound_ippacket RST
			inbound_transport RST`)

		u := (*space)(nil).listenUDP(t, loopbackOf(f))
		echoUDP(t, u)
		cu := s.prog.dialUDP(t, portOf(f, u.LocalAddr()))
		talk := func() {
			t.Helper()
			mustWrite(t, cu, "x")
			if _, err := cu.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		talk()
		s.expect(t, `
			ale_resource_assignment
			ale_auth_connect
			ale_flow_established
			datagram_data
			outbound_transport
			outbound_ippacket
			inbound_ippacket
			inbound_transport
			datagram_data`)
		talk()
		s.expect(t, `
			datagram_data
			outbound_transport
			outbound_ippacket
			inbound_ippacket
			inbound_transport
			datagram_data`)

		out, err := s.command(need.Program(t, "ping"), "-c", "1", "-W", "2", f.far.String())
		if err != nil {
			t.Fatalf("ping: %v\n%s", err, out)
		}
		s.expect(t, `
			ale_auth_connect
			ale_flow_established
			datagram_data
			outbound_transport
			outbound_ippacket
			inbound_ippacket
			inbound_transport
			datagram_data`)
	})
}

// TestOrderOfPendedConnect and the published ports: the sequences of a pended connect and of accepts.
func TestOrderOfPendedConnect(t *testing.T) {
	j := &journal{}
	s := newScene(t, sceneOptions{Options: Options{Trace: j.tracer}})
	s.log = j
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		h := &holder{}
		h.verdict.Store(uint32(layers.Permit))
		reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
		defer s.remove(t, reg)
		j.reset()
		d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
		op := h.waitOp(t, 0)
		s.expect(t, `
			ale_resource_assignment
			ale_auth_connect ABSORB`)
		if err := op.Complete(nil); err != nil {
			t.Fatal(err)
		}
		c, err := d.wait(patience)
		if err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			ale_auth_connect again
			outbound_transport SYN
			outbound_ippacket SYN
			inbound_ippacket SYN
			inbound_transport SYN
			ale_flow_established`)
		c.Close()
		l.Close()
		until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
	})
}

func TestOrderOfPublished(t *testing.T) {
	j := &journal{}
	s, far := published(t, Options{Trace: j.tracer})
	s.log = j
	s.expect(t, strings.Repeat("ale_resource_assignment\nale_auth_listen\nale_resource_assignment\n", len(families)))
	eachFamily(t, func(t *testing.T, f family) {
		l := s.prog.listenTCP(t, netip.AddrPortFrom(f.prog, 7200))
		j.reset()
		c := far.mustDial(t, netip.AddrPortFrom(f.near, 7100))
		server, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			inbound_ippacket SYN
			inbound_transport SYN
			ale_auth_recv_accept SYN
			outbound_transport SYN
			outbound_ippacket SYN
			ale_flow_established`)
		server.Close()
		c.Close()
		until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
		s.onLoop(func() {})

		u := s.prog.listenUDP(t, netip.AddrPortFrom(f.prog, 7200))
		cu := far.dialUDP(t, netip.AddrPortFrom(f.near, 7100))
		j.reset()
		mustWrite(t, cu, "x")
		if _, err := u.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s.expect(t, `
			inbound_ippacket
			inbound_transport
			ale_auth_recv_accept
			ale_flow_established
			datagram_data`)
	})
}

// TestFieldsOfIndications: direction, addresses and protocol of an outbound and of an inbound flow.
func TestFieldsOfIndications(t *testing.T) {
	type seen struct {
		kind          layers.Kind
		local, remote netip.Addr
		direction     layers.Direction
		protocol      uint8
	}
	got := make(chan seen, 1000) // more than the test raises
	eng := filter.New(filter.Options{})
	s, far := published(t, Options{Engine: eng, Trace: func(in *layers.Indication, _ *layers.Decision) {
		if k := in.Layer.Kind(); k == layers.ALEFlowEstablished {
			got <- seen{k, in.Values.LocalAddr(), in.Values.RemoteAddr(), in.Values.Direction(), in.Values.Protocol()}
		}
	}})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		s.prog.mustDial(t, portOf(f, l.Addr()))
		if g, want := <-got, (seen{layers.ALEFlowEstablished, f.prog, f.stack, layers.Outbound, wire.TCP}); g != want {
			t.Errorf("connect: %+v, want %+v", g, want)
		}
		s.prog.listenTCP(t, netip.AddrPortFrom(f.prog, 7200))
		far.mustDial(t, netip.AddrPortFrom(f.near, 7100))
		if g, want := <-got, (seen{layers.ALEFlowEstablished, f.prog, f.far, layers.Inbound, wire.TCP}); g != want {
			t.Errorf("accept: %+v, want %+v", g, want)
		}
		mustWrite(t, far.dialUDP(t, netip.AddrPortFrom(f.near, 7100)), "x")
		if g, want := <-got, (seen{layers.ALEFlowEstablished, f.prog, f.far, layers.Inbound, wire.UDP}); g != want {
			t.Errorf("datagram in: %+v, want %+v", g, want)
		}
	})
}
