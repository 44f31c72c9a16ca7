package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// bench is a gateway on a device in memory: packets are scripted, no right is needed.
type bench struct {
	t   testing.TB
	g   *Gateway
	dev *tuntest.Device
	eng *filter.Engine
	log *journal
	clk *fakeClock
}

func newBench(t testing.TB, o Options) *bench {
	t.Helper()
	b := &bench{t: t, dev: tuntest.New(tuntest.Options{}), eng: o.Engine, log: &journal{}, clk: &fakeClock{}}
	if b.eng == nil {
		b.eng = filter.New(filter.Options{})
	}
	o.Engine, o.Ledger, o.Recorder, o.Clock = b.eng, books, b.log, b.clk.now
	o.Addr4, o.Addr6 = families[0].stack, families[1].stack
	g, err := New(b.dev, o)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	b.g = g
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		b.dev.Close()
	})
	return b
}

// inject gives the gateway a packet that nobody vouches for.
func (b *bench) inject(pkt []byte) {
	b.t.Helper()
	for {
		err := b.dev.Inject(pkt, tun.Offload{})
		if err == nil {
			return
		}
		if !errors.Is(err, tun.ErrWouldBlock) {
			b.t.Fatalf("inject: %v", err)
		}
		b.settle()
	}
}

// settle waits until the loop has taken all that was injected.
func (b *bench) settle() {
	for range 3 { // what a turn causes is done in the next
		done := make(chan struct{})
		if !b.g.loop.post(func() { close(done) }) {
			return
		}
		<-done
	}
}

// next returns the next packet for the program, nil if none comes.
func (b *bench) next() []byte {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	p, err := b.dev.Collect(ctx)
	if err != nil {
		return nil
	}
	return p.Bytes
}

// tcpPacket makes a segment with valid checksums.
func tcpPacket(src, dst netip.AddrPort, flags header.TCPFlags, seq, ack uint32, payload []byte) []byte {
	seg := make([]byte, header.TCPMinimumSize, header.TCPMinimumSize+len(payload))
	header.TCP(seg).Encode(&header.TCPFields{SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: seq, AckNum: ack, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535})
	return buildPacket(src.Addr(), dst.Addr(), wire.TCP, append(seg, payload...))
}

func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	d := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload))
	header.UDP(d).Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(header.UDPMinimumSize + len(payload))})
	return buildPacket(src.Addr(), dst.Addr(), wire.UDP, append(d, payload...))
}

func echoPacket(f family, dst netip.Addr, id uint16, payload []byte) []byte {
	m := make([]byte, 8, 8+len(payload))
	proto := uint8(wire.ICMP)
	m[0] = uint8(header.ICMPv4Echo)
	if f.v == layers.V6 {
		proto, m[0] = wire.ICMPv6, uint8(header.ICMPv6EchoRequest)
	}
	binary.BigEndian.PutUint16(m[4:], id)
	return buildPacket(f.prog, dst, proto, append(m, payload...))
}

func TestMalformedPacketsAreCounted(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := netip.AddrPortFrom(f.prog, 4000), netip.AddrPortFrom(f.far, 80)
		ip := header.IPv4MinimumSize
		if f.v == layers.V6 {
			ip = header.IPv6MinimumSize
		}
		syn := func() []byte { return tcpPacket(src, dst, header.TCPFlagSyn, 7, 0, nil) }
		udp := func() []byte { return udpPacket(src, dst, []byte("payload")) }
		// fix makes the checksums right again after an edit.
		fix := func(p []byte) []byte {
			if h, err := wire.Parse(p); err == nil {
				h.SetChecksums(p)
			}
			return p
		}
		edit := func(p []byte, at int, v byte) []byte { p[at] = v; return p }
		flagsOf := func(fl header.TCPFlags) []byte { return tcpPacket(src, dst, fl, 7, 0, nil) }
		multicast, unspecified, loopback := netip.MustParseAddr("224.0.0.5"), netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.9")
		if f.v == layers.V6 {
			multicast, unspecified, loopback = netip.MustParseAddr("ff02::5"), netip.IPv6Unspecified(), netip.IPv6Loopback()
		}
		rows := []struct {
			name string
			pkt  []byte
			want string
		}{
			{"TCP checksum", edit(syn(), ip+16, 0xee), "checksum"},
			{"UDP checksum", edit(udp(), ip+9, 0xee), "checksum"},
			{"ICMP checksum", edit(echoPacket(f, f.far, 1, nil), ip+2, 0x01), "checksum"},
			{"SYN and FIN", flagsOf(header.TCPFlagSyn | header.TCPFlagFin), "flags"},
			{"SYN and RST", flagsOf(header.TCPFlagSyn | header.TCPFlagRst), "flags"},
			{"no flags", flagsOf(0), "flags"},
			{"FIN, PSH and URG without ACK", flagsOf(header.TCPFlagPsh | header.TCPFlagUrg), "flags"},
			{"data offset below 5", edit(syn(), ip+12, 0x40), "malformed"},
			{"data offset behind the end", edit(syn(), ip+12, 0xf0), "malformed"},
			{"truncated TCP header", syn()[:ip+12], "malformed"},
			{"UDP length above the packet's", edit(udp(), ip+4, 0x70), "malformed"},
			{"UDP length below 8", edit(udp(), ip+5, 7), "malformed"},
			{"port 0", fix(udpPacket(src, netip.AddrPortFrom(f.far, 0), nil)), "malformed"},
			{"from the stack", udpPacket(netip.AddrPortFrom(f.stack, 1), dst, nil), "martian"},
			{"from nobody", udpPacket(netip.AddrPortFrom(unspecified, 1), dst, nil), "martian"},
			{"from loopback", udpPacket(netip.AddrPortFrom(loopback, 1), dst, nil), "martian"},
			{"from multicast", udpPacket(netip.AddrPortFrom(multicast, 1), dst, nil), "martian"},
			{"to loopback", udpPacket(src, netip.AddrPortFrom(loopback, 1), nil), "martian"},
			{"to nobody", udpPacket(src, netip.AddrPortFrom(unspecified, 1), nil), "martian"},
			{"to multicast", udpPacket(src, netip.AddrPortFrom(multicast, 1), nil), "multicast"},
			{"unknown protocol", buildPacket(f.prog, f.far, 132, []byte("12345678")), "protocol"},
			{"segment of no connection", tcpPacket(src, dst, header.TCPFlagAck, 9, 9, nil), "no_flow"},
			{"reset of no connection", tcpPacket(src, dst, header.TCPFlagRst, 9, 9, nil), "no_flow"},
		}
		if f.v == layers.V4 {
			rows = append(rows, []struct {
				name string
				pkt  []byte
				want string
			}{
				{"header checksum", edit(udp(), 10, 0), "checksum"},
				{"header length below 5", edit(udp(), 0, 0x44), "malformed"},
				{"header length behind the end", edit(udp()[:28], 0, 0x4f), "malformed"},
				{"total length above the packet's", edit(udp(), 2, 0x7f), "malformed"},
				{"to broadcast", udpPacket(src, netip.AddrPortFrom(broadcast4, 1), nil), "multicast"},
			}...)
		} else {
			mapped := udpPacket(src, dst, nil)
			copy(mapped[24:], []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1})
			none := udpPacket(src, dst, []byte("x"))
			none[ip+6], none[ip+7] = 0, 0
			rows = append(rows, []struct {
				name string
				pkt  []byte
				want string
			}{
				{"to a mapped address", fix(mapped), "martian"},
				{"UDP without checksum", none, "checksum"},
				{"payload length above the packet's", edit(udp(), 4, 0x7f), "malformed"},
				{"endless extension headers", edit(udp(), 6, 0), "malformed"},
			}...)
		}
		for _, row := range rows {
			before := b.g.Stats()
			b.inject(row.pkt)
			until(t, "count of "+row.name, func() bool { return b.g.Stats().PacketsOut == before.PacketsOut+1 })
			b.settle()
			after := b.g.Stats()
			for reason, n := range after.Drops {
				if d := n - before.Drops[reason]; (reason == row.want) != (d == 1) || d > 1 {
					t.Errorf("%s: %d drops for %q, want one for %q", row.name, d, reason, row.want)
				}
			}
			if after.Drops[row.want] == before.Drops[row.want] {
				t.Errorf("%s: not counted as %q", row.name, row.want)
			}
			if after.Embryonic != 0 || after.DatagramFlows != 0 {
				t.Errorf("%s: %d embryonic and %d datagram flows of it", row.name, after.Embryonic, after.DatagramFlows)
			}
		}
	})
}

// TestSegmentOfNoConnectionIsReset: as a closed port answers. A reset is answered by nothing.
func TestSegmentOfNoConnectionIsReset(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := netip.AddrPortFrom(f.prog, 4000), netip.AddrPortFrom(f.far, 80)
		b.inject(tcpPacket(src, dst, header.TCPFlagRst, 5, 0, nil))
		b.inject(tcpPacket(src, dst, header.TCPFlagAck, 1000, 77, []byte("data")))
		got := b.next()
		h, err := wire.Parse(got)
		if err != nil {
			t.Fatalf("answer %x: %v", got, err)
		}
		seg := header.TCP(got[h.TransportStart:])
		if h.Source() != dst || h.Destination() != src || seg.Flags()&header.TCPFlagRst == 0 || seg.SequenceNumber() != 77 || !h.ChecksumsValid(got) {
			t.Errorf("answer from %v to %v, flags %v, sequence %d, want a reset with sequence 77", h.Source(), h.Destination(), seg.Flags(), seg.SequenceNumber())
		}
	})
}

// TestBlockedSYNIsAnswered: reset, or ICMP for other protocols, from the right addresses and with valid checksums.
func TestAnswersToBlocks(t *testing.T) {
	b := newBench(t, Options{})
	for _, f := range families {
		if _, err := b.eng.AddFilter(filter.Filter{Name: "block", Layer: layers.ALEAuthConnect.Layer(f.v), Action: filter.ActionBlock}); err != nil {
			t.Fatal(err)
		}
	}
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := netip.AddrPortFrom(f.prog, 4000), netip.AddrPortFrom(f.far, 80)
		b.inject(tcpPacket(src, dst, header.TCPFlagSyn, 1000, 0, nil))
		got := b.next()
		h, err := wire.Parse(got)
		if err != nil {
			t.Fatal(err)
		}
		seg := header.TCP(got[h.TransportStart:])
		if seg.Flags() != header.TCPFlagRst|header.TCPFlagAck || seg.AckNumber() != 1001 || h.Source() != dst || !h.ChecksumsValid(got) {
			t.Errorf("answer to the SYN: flags %v, ack %d from %v", seg.Flags(), seg.AckNumber(), h.Source())
		}
		for _, pkt := range [][]byte{udpPacket(src, dst, []byte("question")), echoPacket(f, f.far, 5, []byte("echo"))} {
			b.inject(pkt)
			got := b.next()
			h, err := wire.Parse(got)
			if err != nil {
				t.Fatal(err)
			}
			typ, code, proto := uint16(3), uint16(13), uint8(wire.ICMP)
			if f.v == layers.V6 {
				typ, code, proto = 1, 1, wire.ICMPv6
			}
			if h.Src != f.stack || h.Dst != f.prog || h.Protocol != proto || h.SrcPort != typ || h.DstPort != code || !h.ChecksumsValid(got) {
				t.Errorf("answer: %v → %v protocol %d type %d code %d, want prohibited from the stack", h.Src, h.Dst, h.Protocol, h.SrcPort, h.DstPort)
			}
			if quoted := got[h.PayloadStart:]; len(quoted) < 28 || string(quoted) != string(pkt[:len(quoted)]) {
				t.Errorf("the answer quotes %x, want the packet %x", quoted, pkt)
			}
		}
	})
}

// cut makes fragments of a packet, of step bytes of payload each.
func cut(pkt []byte, step int, id uint32) [][]byte {
	h, err := wire.Parse(pkt)
	if err != nil {
		panic(err)
	}
	var out [][]byte
	body := pkt[h.TransportStart:]
	for at := 0; at < len(body); at += step {
		part := body[at:min(at+step, len(body))]
		more := at+len(part) < len(body)
		frag := append([]byte(nil), pkt[:h.TransportStart]...)
		off := uint16(at)
		if h.V6 {
			if more {
				off |= 1
			}
			frag[6] = uint8(header.IPv6FragmentHeader)
			frag = append(frag, h.Protocol, 0, byte(off>>8), byte(off), byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
			binary.BigEndian.PutUint16(frag[4:], uint16(8+len(part)))
		} else {
			off /= 8
			if more {
				off |= 0x2000
			}
			binary.BigEndian.PutUint16(frag[2:], uint16(len(frag)+len(part)))
			binary.BigEndian.PutUint16(frag[4:], uint16(id))
			binary.BigEndian.PutUint16(frag[6:], off)
			frag[10], frag[11] = 0, 0
			binary.BigEndian.PutUint16(frag[10:], ^uint16(wire.Sum(0, frag)))
		}
		out = append(out, append(frag, part...))
	}
	return out
}

// answered reports whether the gateway answers an echo request to its own address that came in these fragments.
func (b *bench) answered(frags [][]byte) bool {
	b.t.Helper()
	before := b.g.Stats().PacketsOut
	for _, p := range frags {
		b.inject(p)
	}
	until(b.t, "packets taken", func() bool { return b.g.Stats().PacketsOut == before+uint64(len(frags)) })
	b.settle()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err := b.dev.Collect(ctx)
	return err == nil
}

func TestFragments(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		data := make([]byte, 800)
		fill(data, 0)
		pkt := func() []byte { return echoPacket(f, f.stack, 77, data) }
		frags := cut(pkt(), 160, 1)
		if !b.answered(frags) {
			t.Error("fragments in order were not answered")
		}
		frags = cut(pkt(), 160, 2)
		for i, j := range rand.Perm(len(frags)) {
			frags[i], frags[j] = frags[j], frags[i]
		}
		if !b.answered(frags) {
			t.Error("fragments out of order were not answered")
		}
		frags = cut(pkt(), 160, 3)
		if b.answered(append(frags[:1:1], frags[2:]...)) {
			t.Error("a packet with a gap was answered")
		}
		// A fragment that overlaps another may say something else than it: none of the packet is taken. Source: RFC 5722; RFC 8200, 4.5.
		a, c := cut(pkt(), 160, 4), cut(pkt(), 240, 4)
		if b.answered([][]byte{a[0], c[1], a[1], a[2], a[3], a[4]}) {
			t.Error("a packet with overlapping fragments was answered")
		}
	})
}

func TestEchoToTheGateway(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		b.inject(echoPacket(f, f.stack, 9, []byte("are you there")))
		got := b.next()
		h, err := wire.Parse(got)
		want := uint16(header.ICMPv4EchoReply)
		if f.v == layers.V6 {
			want = uint16(header.ICMPv6EchoReply)
		}
		if err != nil || h.SrcPort != want || h.Src != f.stack || !h.ChecksumsValid(got) || string(got[h.PayloadStart:]) != "are you there" {
			t.Errorf("answer %x, %v", got, err)
		}
	})
}

// TestUnknownProtocolIsAnswered: with protocol unreachable, or its IPv6 counterpart.
func TestUnknownProtocolIsAnswered(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		b.inject(buildPacket(f.prog, f.far, 132, []byte("an SCTP packet")))
		got := b.next()
		h, err := wire.Parse(got)
		typ, code := uint16(3), uint16(2)
		if f.v == layers.V6 {
			typ, code = 4, 1
		}
		if err != nil || h.SrcPort != typ || h.DstPort != code {
			t.Errorf("answer %x, %v, want type %d code %d", got, err, typ, code)
		}
	})
}

func TestDeviceEvents(t *testing.T) {
	b := newBench(t, Options{})
	f := families[0]
	b.dev.SetDown()
	c, err := layers.NewClone(udpPacket(netip.AddrPortFrom(f.far, 1), netip.AddrPortFrom(f.prog, 2), []byte("x")), "test", books)
	if err != nil {
		t.Fatal(err)
	}
	inj, err := layers.NewInjector("test", b.g)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1) // one completion
	if err := inj.Receive(c, func(err error) { done <- err }); err != nil {
		t.Fatal(err)
	}
	<-done // whether it counts as lost or as sent is the device's business; it completes
	inj.Close()
	b.dev.SetUp()
	b.inject(echoPacket(f, f.stack, 1, nil))
	if b.next() == nil {
		t.Error("nothing comes after the device was down and up")
	}
	b.dev.Delete()
	select {
	case <-b.g.Done():
	case <-time.After(patience):
		t.Fatal("the gateway goes on without its device")
	}
	if err := b.g.Err(); !errors.Is(err, tun.ErrGone) {
		t.Errorf("Err: %v, want ErrGone", err)
	}
	if _, err := layers.NewInjector("late", b.g); err == nil {
		late, err := layers.NewClone(udpPacket(netip.AddrPortFrom(f.far, 1), netip.AddrPortFrom(f.prog, 2), nil), "test", books)
		if err != nil {
			t.Fatal(err)
		}
		i2, err := layers.NewInjector("later", b.g)
		if err != nil {
			t.Fatal(err)
		}
		if err := i2.Send(late, nil); !errors.Is(err, layers.ErrClosing) {
			t.Errorf("injection into an ended gateway: %v, want ErrClosing", err)
		}
		i2.Close()
	}
}

func TestNewFailsClean(t *testing.T) {
	dev := tuntest.New(tuntest.Options{})
	defer dev.Close()
	if _, err := New(dev, Options{}); !errors.Is(err, ErrNoEngine) {
		t.Errorf("without an engine: %v", err)
	}
	_, err := New(dev, Options{Engine: filter.New(filter.Options{}), Publish: []Publish{{Host: netip.MustParseAddrPort("203.0.113.77:1"), Program: netip.MustParseAddrPort("198.18.0.2:1")}}})
	if err == nil {
		t.Error("published on an address that is not ours")
	}
}

// TestStackAddressWithoutHostLoopback: the host's loopback is out of reach unless that was asked for.
func TestStackAddressWithoutHostLoopback(t *testing.T) {
	b := newBench(t, Options{})
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := netip.AddrPortFrom(f.prog, 4000), netip.AddrPortFrom(f.stack, 22)
		for _, pkt := range [][]byte{tcpPacket(src, dst, header.TCPFlagSyn, 1000, 0, nil), udpPacket(src, dst, []byte("x"))} {
			before := len(b.guarded())
			b.inject(pkt)
			if b.next() == nil {
				t.Error("no refusal")
			}
			if got := b.guarded(); len(got) != before+1 {
				t.Errorf("%d records of the guard, want %d", len(got), before+1)
			}
		}
	})
}

func (b *bench) guarded() []layers.Record {
	return b.log.find(func(r *layers.Record) bool {
		return r.Type == layers.RecordVerdict && r.Decision.Blocked() && r.Decision.Reason == layers.ReasonLoopbackGuard
	})
}

// FuzzInput gives the gateway packets that no kernel made: it must account for each and survive all.
func FuzzInput(f *testing.F) {
	for _, fam := range families {
		src, dst := netip.AddrPortFrom(fam.prog, 4000), netip.AddrPortFrom(fam.stack, 80)
		f.Add(tcpPacket(src, dst, header.TCPFlagSyn, 7, 0, nil), true)
		f.Add(udpPacket(src, dst, []byte("payload")), true)
		f.Add(echoPacket(fam, fam.stack, 1, []byte("x")), true)
		for _, p := range cut(echoPacket(fam, fam.stack, 2, make([]byte, 100)), 40, 5) {
			f.Add(p, false)
		}
	}
	eng := filter.New(filter.Options{})
	for _, fam := range families {
		// Nothing leaves: the destinations are whatever the fuzzer writes.
		if _, err := eng.AddFilter(filter.Filter{Name: "block", Layer: layers.ALEAuthConnect.Layer(fam.v), Action: filter.ActionBlock}); err != nil {
			f.Fatal(err)
		}
	}
	b := newBench(f, Options{Engine: eng, Trace: func(in *layers.Indication, _ *layers.Decision) {
		if in.Packet != nil {
			_ = in.Packet.Payload()
		}
	}})
	f.Fuzz(func(t *testing.T, pkt []byte, fix bool) {
		if len(pkt) < tun.MinPacket || len(pkt) > tun.MaxPacket {
			return
		}
		pkt = append([]byte(nil), pkt...)
		h, err := wire.Parse(pkt)
		if err == nil && fix {
			h.SetChecksums(pkt)
		}
		seen := func() uint64 { return b.g.Stats().PacketsOut + b.g.link.Stats().ReadNotIP.Load() }
		before, dropsBefore := seen(), b.drops()
		if err := b.dev.Inject(pkt, tun.Offload{}); err != nil {
			t.Fatal(err)
		}
		for seen() == before {
			select {
			case <-b.g.Done():
				t.Fatalf("the gateway ended: %v", b.g.Err())
			default:
				runtime.Gosched()
			}
		}
		b.settle()
		// All is blocked: what is neither a fragment, kept for others, nor an echo request to the gateway itself, is a drop.
		echo := err == nil && (h.Protocol == wire.ICMP || h.Protocol == wire.ICMPv6) && b.g.isStackAddr(h.Dst)
		if n := b.drops() - dropsBefore; n != 1 && !(n == 0 && (echo || err == nil && h.Fragment)) && !(err == nil && h.Fragment) {
			t.Fatalf("%x: %d drops, want one: %+v", pkt, n, b.g.Stats().Drops)
		}
		for { // what it answered
			ctx, cancel := context.WithTimeout(context.Background(), time.Nanosecond)
			p, err := b.dev.Collect(ctx)
			cancel()
			if err != nil {
				break
			}
			if h, err := wire.Parse(p.Bytes); err != nil || !h.ChecksumsValid(p.Bytes) {
				t.Fatalf("answered %x with %x: %v", pkt, p.Bytes, err)
			}
		}
	})
}

// drops counts what was dropped, and what was no IP packet.
func (b *bench) drops() uint64 {
	sum := b.g.link.Stats().ReadNotIP.Load()
	for _, n := range b.g.Stats().Drops {
		sum += n
	}
	return sum
}
