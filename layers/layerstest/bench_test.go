package layerstest

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

func TestPacketsAreRight(t *testing.T) {
	v4, w4 := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("198.51.100.2:53")
	v6, w6 := netip.MustParseAddrPort("[2001:db8::1]:1000"), netip.MustParseAddrPort("[2001:db8:77::2]:53")
	for _, tc := range []struct {
		name     string
		b        []byte
		src, dst netip.AddrPort
		proto    uint8
		payload  string
	}{
		{"TCP v4", TCPPacket(Segment{Src: v4, Dst: w4, Flags: SYN | ACK, Options: []byte{2, 4, 5, 0xb4, 4, 2}, Payload: []byte("abc")}), v4, w4, TCP, "abc"},
		{"TCP v6", TCPPacket(Segment{Src: v6, Dst: w6, Flags: FIN, Seq: 7}), v6, w6, TCP, ""},
		{"UDP v4", UDPPacket(v4, w4, []byte("query")), v4, w4, UDP, "query"},
		{"UDP v6", UDPPacket(v6, w6, nil), v6, w6, UDP, ""},
		{"echo v4", EchoPacket(Echo{Src: v4.Addr(), Dst: w4.Addr(), ID: 1, Seq: 2, Payload: []byte("p")}), netip.AddrPortFrom(v4.Addr(), 8), netip.AddrPortFrom(w4.Addr(), 0), ICMP, "p"},
		{"echo v6", EchoPacket(Echo{Src: v6.Addr(), Dst: w6.Addr(), Reply: true}), netip.AddrPortFrom(v6.Addr(), 129), netip.AddrPortFrom(w6.Addr(), 0), ICMPv6, ""},
		{"error v4", ICMPErrorPacket(v4.Addr(), w4.Addr(), 3, 4, 1280, []byte("quote")), netip.AddrPortFrom(v4.Addr(), 3), netip.AddrPortFrom(w4.Addr(), 4), ICMP, "quote"},
		{"error v6", ICMPErrorPacket(v6.Addr(), w6.Addr(), 2, 0, 1280, []byte("quote")), netip.AddrPortFrom(v6.Addr(), 2), netip.AddrPortFrom(w6.Addr(), 0), ICMPv6, "quote"},
	} {
		h, err := wire.Parse(tc.b)
		if err != nil || !h.ChecksumsValid(tc.b) {
			t.Errorf("%s: %v, checksums valid %v", tc.name, err, h.ChecksumsValid(tc.b))
			continue
		}
		if h.Source() != tc.src || h.Destination() != tc.dst || h.Protocol != tc.proto || string(tc.b[h.PayloadStart:h.PayloadEnd]) != tc.payload {
			t.Errorf("%s: %v → %v, %d, %q", tc.name, h.Source(), h.Destination(), h.Protocol, tc.b[h.PayloadStart:])
		}
	}
}

func TestIndicate(t *testing.T) {
	in := Indicate(layers.StreamV4, Tuple(TCP, "192.0.2.1:1", "192.0.2.2:2"))
	if in.Values.Has(layers.FieldProtocol) || in.Values.Remote().String() != "192.0.2.2:2" {
		t.Errorf("stream has no protocol; remote %v", in.Values.Remote())
	}
	raw := UDPPacket(MustAddrPort("192.0.2.1:1"), MustAddrPort("192.0.2.2:2"), []byte("x"))
	f := layers.NewFlow(4, nil)
	in = Indicate(layers.ALEAuthConnectV4, WithFlow(f), Packet(nil, raw, layers.Outbound, 0), App("/bin/x"), Names("b.test", "a.test"),
		Reauthorize(layers.ReauthClassifyCompletion, 9), Flags(layers.FlagIsLoopback), NoRight())
	if string(in.Packet.Payload()) != "x" || in.Meta.IPHeaderSize != 20 || in.Meta.FlowID != 4 || in.Meta.Operation != 9 || !in.IsReauthorize() ||
		in.MayDecide() || in.Values.PeerName() != "b.test" || in.Values.Flags() != layers.FlagIsLoopback|layers.FlagIsReauthorize {
		t.Errorf("indication %+v", in)
	}
}

// spy is a test that does not fail for real.
type spy struct {
	testing.TB
	errors  []string
	cleanup []func()
}

func (s *spy) Helper() {}
func (s *spy) Errorf(format string, _ ...any) {
	s.errors = append(s.errors, format)
}
func (s *spy) Cleanup(f func()) { s.cleanup = append(s.cleanup, f) }

func TestBenchNoticesLeftovers(t *testing.T) {
	s := &spy{TB: t}
	b := NewBench(s)
	i, err := layers.NewInjector("left open", b)
	if err != nil {
		t.Fatal(err)
	}
	op, err := Indicate(layers.ALEAuthConnectV6, Tuple(TCP, "[::1]:1", "[::1]:2"), Pendable(b)).Pend()
	if err != nil {
		t.Fatal(err)
	}
	b.Hold()
	raw := UDPPacket(MustAddrPort("192.0.2.1:1"), MustAddrPort("192.0.2.2:2"), []byte("x"))
	c, err := layers.NewClone(raw, "test", b.Ledger)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Send(c, nil); err != nil {
		t.Fatal(err)
	}
	s.cleanup[0]()
	if got := strings.Join(s.errors, "\n"); !strings.Contains(got, "injections wait") || !strings.Contains(got, "is open") || len(s.errors) != 3 {
		t.Errorf("leftovers: %q", s.errors)
	}
	if n := b.Complete(nil); n != 1 {
		t.Errorf("%d completions", n)
	}
	op.Cancel(layers.PendStopped)
	i.Close()
	s.errors = nil
	s.cleanup[0]()
	if len(s.errors) != 0 {
		t.Errorf("after cleaning up: %q", s.errors)
	}
}

func TestBenchPends(t *testing.T) {
	b := NewBench(t)
	in := func(port string) *layers.Indication {
		return Indicate(layers.ALEAuthRecvAcceptV4, Tuple(TCP, "192.0.2.1:80", "192.0.2.2:"+port), Pendable(b))
	}
	op, err := in("1").Pend()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := in("1").Pend(); err != nil || again != op {
		t.Errorf("the same operation again: %v, %v", again, err)
	}
	b.LimitPends(1)
	if _, err := in("2").Pend(); !errors.Is(err, layers.ErrPendLimit) {
		t.Errorf("beyond the limit: %v", err)
	}
	raw := TCPPacket(Segment{Src: MustAddrPort("192.0.2.2:1"), Dst: MustAddrPort("192.0.2.1:80"), Flags: SYN})
	c, err := layers.NewClone(raw, "test", b.Ledger)
	if err != nil {
		t.Fatal(err)
	}
	go op.Complete(c) // ends by itself; Await sees its end
	b.Await("the completion", func() bool { return len(b.Completions()) == 1 })
	if got := b.Completions()[0]; got.Op != op || string(got.Clone) != string(raw) || b.Pended() != 0 || len(b.Operations()) != 0 {
		t.Errorf("completion %+v, %d pended", got, b.Pended())
	}
	if next, err := in("1").Pend(); err != nil || next == op || !next.Cancel(layers.PendAbandoned) {
		t.Errorf("after completion: %v, %v", next, err)
	}
	if _, err := Indicate(layers.StreamV4, Pendable(b)).Pend(); !errors.Is(err, layers.ErrCannotPend) {
		t.Errorf("pend at stream: %v", err)
	}
}
